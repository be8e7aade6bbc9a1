"""The reference's gated activation, at ordinary, large and very negative gates."""

import math

import numpy as np
import pytest
from compare import assert_close, finite_difference_error

from apr.reference.swiglu import sigmoid, silu, swiglu_backward, swiglu_forward

FINITE_DIFFERENCE = 1e-7  # the project's gate; measured worst 1e-9
FLOAT32 = 1e-6  # relative L2 of float32: elementwise; 1 - sigmoid cancels at large gates; measured worst 2e-7
EXACT = 1e-14  # float64, the same mathematics in another order
SHAPES = [(1, 1), (2, 3, 5), (3, 17, 33)]


def some(rng, shape, size):
    """gate, up, dout."""
    return size * rng.standard_normal(shape), rng.standard_normal(shape), rng.standard_normal(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_swiglu_backward_matches_finite_differences(rng, shape, size):
    gate, up, dout = some(rng, shape, size)
    def loss():
        return float((swiglu_forward(gate, up) * dout).sum())
    for array, gradient in zip((gate, up), swiglu_backward(dout, gate, up), strict=True):
        assert finite_difference_error(loss, array, gradient, rng, h=1e-5) <= FINITE_DIFFERENCE


@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
def test_swiglu_float32_matches_float64(rng, size):
    arrays = some(rng, (5, 129), size)
    gate, up, dout = (a.astype(np.float32) for a in arrays)
    gate64, up64, dout64 = (a.astype(np.float64) for a in (gate, up, dout))
    assert_close(swiglu_forward(gate, up), swiglu_forward(gate64, up64), FLOAT32, "out")
    for ours, truth in zip(swiglu_backward(dout, gate, up), swiglu_backward(dout64, gate64, up64), strict=True):
        assert ours.dtype == np.float32
        assert_close(ours, truth, FLOAT32, "a gradient")


def test_silu_by_hand():
    x = np.array([0.0, 1.0, -2.0, math.log(3)])
    expected = [0.0, 1 / (1 + math.exp(-1)), -2 / (1 + math.exp(2)), 0.75 * math.log(3)]
    assert_close(silu(x), np.array(expected), EXACT, "silu")


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_silu_at_the_ends_is_the_identity_and_zero(kind):
    """No overflow warning either: warnings are errors here."""
    x = np.array([1e3, 1e4, -1e3, -1e4], kind)
    assert silu(x).tolist() == [1e3, 1e4, 0, 0]
    assert sigmoid(x).tolist() == [1, 1, 0, 0]
    dgate, dup = swiglu_backward(np.ones(4, kind), x, np.ones(4, kind))
    assert dgate.tolist() == [1, 1, 0, 0]
    assert dup.tolist() == [1e3, 1e4, 0, 0]


def test_silu_of_opposites_differs_by_their_value(rng):
    x = rng.standard_normal(100)
    assert_close(silu(x) - silu(-x), x, EXACT, "silu(x) - silu(-x)")


def test_swiglu_gates_with_its_first_argument(rng):
    gate, up, _ = some(rng, (2, 3, 5), 1.0)
    assert_close(swiglu_forward(gate, up), gate * up / (1 + np.exp(-gate)), EXACT, "out")
    assert not swiglu_forward(np.zeros_like(up), up).any()
    assert not swiglu_forward(gate, np.zeros_like(up)).any()


def test_swiglu_leaves_its_inputs_alone(rng):
    arrays = some(rng, (2, 3, 5), 1.0)
    kept = [a.copy() for a in arrays]
    swiglu_forward(*arrays[:2])
    swiglu_backward(arrays[2], *arrays[:2])
    for array, before in zip(arrays, kept, strict=True):
        assert (array == before).all()
