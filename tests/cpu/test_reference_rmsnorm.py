"""The reference's RMSNorm, at rows so small that eps matters, at zero rows and at ordinary ones."""

import numpy as np
import pytest
from compare import assert_close, finite_difference_error, relative_l2

from apr.reference.rmsnorm import rmsnorm_backward, rmsnorm_forward

FINITE_DIFFERENCE = 1e-7  # the project's gate; measured worst 1e-10
FLOAT32 = 1e-6  # relative L2 of float32: norms; measured worst 8e-8
EXACT = 1e-12  # float64, the same mathematics in another order
EPS, C = 1e-6, 13
# Size of a row -> step of the difference, a small part of sqrt(size^2 + eps), over which the function bends.
SIZES = {1.0: 1e-5, 0.1: 1e-6, 1e-3: 1e-8, 1e-5: 1e-8, 0.0: 1e-8, 1e3: 1e-2}
SHAPES = [(1, C), (5, C), (2, 3, C), (2, 3, 4, C), (3, 1)]  # one row, rows, (B, T, C), heads, one channel


def some(rng, shape, size):
    """inp with rows of this size, weight that is not all ones, dout."""
    return size * rng.standard_normal(shape), 1 + 0.3 * rng.standard_normal(shape[-1]), rng.standard_normal(shape)


def gradients(inp, weight, dout):
    """dinp, dweight."""
    dweight = np.zeros_like(weight)
    return rmsnorm_backward(dweight, dout, inp, weight, rmsnorm_forward(inp, weight, EPS)[1]), dweight


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rmsnorm_backward_matches_finite_differences(rng, shape, size):
    inp, weight, dout = some(rng, shape, size)
    dinp, dweight = gradients(inp, weight, dout)
    def loss():
        return float((rmsnorm_forward(inp, weight, EPS)[0] * dout).sum())
    if shape[-1] > 1 or size < 0.1:  # one large channel normalises to its sign, whose slope is rounding
        assert finite_difference_error(loss, inp, dinp, rng, h=SIZES[size]) <= FINITE_DIFFERENCE
    if size:
        assert finite_difference_error(loss, weight, dweight, rng, h=1e-4) <= FINITE_DIFFERENCE


@pytest.mark.parametrize("size", SIZES)
def test_rmsnorm_float32_matches_float64(rng, size):
    arrays = some(rng, (6, 127), size)
    for ours, truth in zip(gradients(*(a.astype(np.float32) for a in arrays)), gradients(*arrays), strict=True):
        assert ours.dtype == np.float32
        assert_close(ours, truth, FLOAT32, "a gradient")
    out = rmsnorm_forward(*(a.astype(np.float32) for a in arrays[:2]), EPS)[0]
    assert_close(out, rmsnorm_forward(*arrays[:2], EPS)[0], FLOAT32, "out")


def test_rmsnorm_inputs_show_a_wrong_eps(rng):
    """The small rows above are there for this: 1e-5 for 1e-6 must move the result far beyond every tolerance."""
    inp, weight, _ = some(rng, (5, C), 1e-3)
    wrong = rmsnorm_forward(inp, weight, 1e-5)[0]
    assert relative_l2(wrong, rmsnorm_forward(inp, weight, EPS)[0]) >= 1e5 * FLOAT32


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_rmsnorm_without_eps_ignores_the_scale_of_its_input(rng, factor):
    inp, weight, _ = some(rng, (5, C), 1.0)
    expected = rmsnorm_forward(inp, weight, 1e-30)[0]
    assert_close(rmsnorm_forward(factor * inp, weight, 1e-30)[0], expected, EXACT, "out")
    rms = np.sqrt(np.mean((expected / weight) ** 2, axis=-1))
    assert_close(rms, np.ones(5), EXACT, "root mean square of the normalised rows")


def test_rmsnorm_by_hand():
    out, rstd = rmsnorm_forward(np.array([[3.0, 4.0]]), np.array([1.0, 2.0]), 12.5)
    assert_close(rstd, np.array([[0.2]]), EXACT, "rstd of mean square 12.5 and eps 12.5")
    assert_close(out, np.array([[0.6, 1.6]]), EXACT, "out")


def test_rmsnorm_of_a_zero_row_is_zero_with_a_finite_gradient(rng):
    inp, weight, dout = np.zeros((2, C)), rng.standard_normal(C), rng.standard_normal((2, C))
    assert not rmsnorm_forward(inp, weight, EPS)[0].any()
    dinp, dweight = gradients(inp, weight, dout)
    assert_close(dinp, dout * weight / np.sqrt(EPS), EXACT, "dinp")
    assert not dweight.any()


def test_rmsnorm_treats_rows_alone(rng):
    inp, weight, dout = some(rng, (5, C), 1e-3)
    order = rng.permutation(5)
    assert (rmsnorm_forward(inp[order], weight, EPS)[0] == rmsnorm_forward(inp, weight, EPS)[0][order]).all()
    assert (gradients(inp[order], weight, dout[order])[0] == gradients(inp, weight, dout)[0][order]).all()


def test_rmsnorm_backward_accumulates_and_micro_batches_add_up(rng):
    inp, weight, dout = some(rng, (6, C), 1e-3)
    rstd, start = rmsnorm_forward(inp, weight, EPS)[1], 1e3 * rng.standard_normal(C)
    sums = start.copy()
    for half in (slice(0, 2), slice(2, 6)):
        rmsnorm_backward(sums, dout[half], inp[half], weight, rstd[half])
    assert_close(sums, start + gradients(inp, weight, dout)[1], EXACT, "dweight")
