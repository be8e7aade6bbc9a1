"""The reference's gradient norm over all parameters, and the clip factor."""

import math

import numpy as np
import pytest

from apr.reference.global_norm import BLOCK, clip_factor, global_norm

FLOAT64 = 1e-14  # sums are float64 whatever the gradients are


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 5, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_global_norm_matches_its_definition(rng, size, kind):
    grads = rng.standard_normal(size).astype(kind)
    expected = math.sqrt(math.fsum(float(g) ** 2 for g in grads))
    assert math.isclose(global_norm(grads), expected, rel_tol=FLOAT64)


def test_global_norm_by_hand():
    assert global_norm(np.array([3.0, -4.0])) == 5
    assert global_norm(np.zeros(10)) == 0
    assert global_norm(np.zeros(0)) == 0


def test_global_norm_sums_squares_beyond_float32():
    """1e25 squared is no float32, and a million small squares beside a large one vanish in a float32 sum."""
    with np.errstate(over="ignore"):  # an overflow must show in the result
        assert math.isclose(global_norm(np.full(4, 1e25, np.float32)), 2e25, rel_tol=1e-6)
    grads = np.full(2**20 + 1, 1e-3, np.float32)
    grads[0] = 1e3
    small = float(np.float32(1e-3))
    assert math.isclose(global_norm(grads), math.sqrt(1e6 + 2**20 * small**2), rel_tol=FLOAT64)


@pytest.mark.parametrize("at", [0, BLOCK, 2 * BLOCK])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_global_norm_shows_a_non_finite_gradient_anywhere(rng, at, bad):
    grads = rng.standard_normal(2 * BLOCK + 1)
    grads[at] = bad
    assert not math.isfinite(global_norm(grads))


@pytest.mark.parametrize(("norm", "factor"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (2.0, 0.5), (1e6, 1e-6)])
def test_clip_factor_by_hand(norm, factor):
    assert clip_factor(norm, 1.0) == factor


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_clipped_gradients_have_at_most_the_norm_allowed(rng, size):
    grads = size * rng.standard_normal(1001)
    norm = global_norm(grads)
    clipped = global_norm(grads * clip_factor(norm, 0.7))
    assert math.isclose(clipped, min(norm, 0.7), rel_tol=1e-12)


def test_clip_factor_of_nan_is_nan():
    assert np.isnan(clip_factor(float("nan"), 1.0)) and clip_factor(float("inf"), 1.0) == 0.0
