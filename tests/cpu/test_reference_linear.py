"""The reference's matrix product with a weight stored [out, in], and its bias."""

import numpy as np
import pytest
from compare import assert_close, finite_difference_error

from apr.reference.linear import bias_backward, bias_forward, linear_backward, linear_forward

FINITE_DIFFERENCE = 1e-7  # the project's gate; linear, so only rounding remains; measured worst 3e-11
FLOAT32 = 2e-6  # relative L2 of float32: products up to K = 4096; measured worst 4e-7
EXACT = 1e-13  # float64, another order of the same sums
SHAPES = [((1, 1), 1, 1), ((2, 1), 5, 3), ((2, 3), 5, 7), ((3, 17), 33, 9), ((4,), 6, 6)]  # rows, I, O


def some(rng, rows, i, o):
    """inp, weight, bias, dout."""
    return tuple(rng.standard_normal(shape) for shape in ((*rows, i), (o, i), o, (*rows, o)))


def gradients(inp, weight, bias, dout):
    """dinp, dweight, dbias."""
    dweight, dbias = np.zeros_like(weight), np.zeros_like(bias)
    bias_backward(dbias, dout)
    return linear_backward(dweight, dout, inp, weight), dweight, dbias


def forward(inp, weight, bias):
    return bias_forward(linear_forward(inp, weight), bias)


@pytest.mark.parametrize(("rows", "i", "o"), SHAPES)
def test_linear_backward_matches_finite_differences(rng, rows, i, o):
    inp, weight, bias, dout = some(rng, rows, i, o)
    def loss():
        return float((forward(inp, weight, bias) * dout).sum())
    for array, gradient in zip((inp, weight, bias), gradients(inp, weight, bias, dout), strict=True):
        assert finite_difference_error(loss, array, gradient, rng, h=1e-4) <= FINITE_DIFFERENCE


@pytest.mark.parametrize(("rows", "i", "o"), [*SHAPES, ((2, 9), 896, 129)])
def test_linear_float32_matches_float64(rng, rows, i, o):
    arrays = some(rng, rows, i, o)
    small = [a.astype(np.float32) for a in arrays]
    assert_close(forward(*small[:3]), forward(*arrays[:3]), FLOAT32, "out")
    for ours, truth, name in zip(gradients(*small), gradients(*arrays), ("dinp", "dweight", "dbias"), strict=True):
        assert ours.dtype == np.float32
        assert_close(ours, truth, FLOAT32, name)


def test_linear_weight_is_stored_out_by_in():
    """A square weight would hide a transposition, so its numbers are asymmetric: out_0 = 1*x_0 + 2*x_1."""
    out = forward(np.array([[10.0, 1.0]]), np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0.5, 0.0]))
    assert out.tolist() == [[12.5, 34.0]]


def test_linear_of_the_identity_is_the_input(rng):
    inp = rng.standard_normal((2, 3, 5))
    assert (linear_forward(inp, np.eye(5)) == inp).all()
    assert not linear_forward(inp, np.zeros((7, 5))).any()


def test_bias_forward_leaves_its_input_alone(rng):
    """The value before the bias is a tap of its own: adding in place would falsify it."""
    out, bias = rng.standard_normal((2, 3)), np.ones(3)
    kept = out.copy()
    assert (bias_forward(out, bias) == kept + 1).all()
    assert (out == kept).all()


def test_linear_backward_accumulates_and_micro_batches_add_up(rng):
    inp, weight, bias, dout = some(rng, (4, 5), 6, 7)
    _, dweight, dbias = gradients(inp, weight, bias, dout)
    starts = rng.standard_normal(weight.shape), rng.standard_normal(bias.shape)
    sums = [s.copy() for s in starts]
    for half in (slice(0, 1), slice(1, 4)):
        linear_backward(sums[0], dout[half], inp[half], weight)
        bias_backward(sums[1], dout[half])
    assert_close(sums[0], starts[0] + dweight, EXACT, "dweight")
    assert_close(sums[1], starts[1] + dbias, EXACT, "dbias")
