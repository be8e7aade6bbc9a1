"""The reference's residual join: a sum, and a gradient that keeps both of its paths."""

import numpy as np
import pytest
from compare import assert_close, finite_difference_error

from apr.reference.residual import residual_backward, residual_forward

FINITE_DIFFERENCE = 1e-7  # the project's gate; measured worst 1e-10
FLOAT32 = 1e-6  # relative L2 of float32: one addition; measured worst 4e-8
SHAPES = [(1, 1, 1), (2, 1, 5), (3, 17, 13)]


def some(rng, shape):
    """inp, dout."""
    return rng.standard_normal(shape), rng.standard_normal(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_backward_matches_finite_differences(rng, shape):
    """The sub-layer here is tanh, so that its share differs from the identity's."""
    inp, dout = some(rng, shape)
    dinp = residual_backward(dout, dout * (1 - np.tanh(inp) ** 2))
    def loss():
        return float((residual_forward(inp, np.tanh(inp)) * dout).sum())
    assert finite_difference_error(loss, inp, dinp, rng, h=1e-5) <= FINITE_DIFFERENCE


def test_residual_float32_matches_float64(rng):
    inp, update = some(rng, (3, 17, 13))
    ours = residual_forward(inp.astype(np.float32), update.astype(np.float32))
    assert ours.dtype == np.float32
    assert_close(ours, inp + update, FLOAT32, "out")


def test_residual_of_nothing_is_the_input_to_the_bit(rng):
    inp, dout = some(rng, (2, 3, 5))
    nothing = np.zeros_like(inp)
    assert (residual_forward(inp, nothing) == inp).all()
    assert (residual_forward(nothing, inp) == inp).all()
    assert (residual_backward(dout, nothing) == dout).all(), "the identity's path"
    assert (residual_backward(nothing, dout) == dout).all(), "the sub-layer's path, which upstream lost"


def test_residual_results_are_new_arrays(rng):
    """The input is saved for backward and tapped: adding in place would change it behind their backs."""
    inp, update = some(rng, (2, 3, 5))
    kept = inp.copy(), update.copy()
    residual_forward(inp, update)[...] = 9.0
    residual_backward(inp, update)[...] = 9.0
    assert (inp == kept[0]).all()
    assert (update == kept[1]).all()
