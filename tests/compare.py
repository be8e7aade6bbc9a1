"""The one comparer of the tests: shape, dtype and finiteness first, then `not (err <= tol)`, which no NaN passes."""

import numpy as np


def relative_l2(actual: np.ndarray, truth: np.ndarray) -> float:
    """|actual - truth| / |truth| in float64; 0 when both are zero, inf when only the truth is."""
    a, t = np.asarray(actual, np.float64), np.asarray(truth, np.float64)
    error, scale = float(np.linalg.norm(a - t)), float(np.linalg.norm(t))
    return error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))


def assert_close(actual: np.ndarray, truth: np.ndarray, tol: float, what: str) -> float:
    """Demand equal shape and dtype, finite values and relative L2 error <= tol; returns the error.

    A float64 truth judges any float.
    """
    actual, truth = np.asarray(actual), np.asarray(truth)
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, expected {truth.shape}"
    assert truth.dtype == np.float64 or actual.dtype == truth.dtype, f"{what}: {actual.dtype}, expected {truth.dtype}"
    assert np.isfinite(truth).all(), f"{what}: the expected values are not finite"
    bad = np.argwhere(~np.isfinite(actual))
    assert bad.size == 0, f"{what}: {len(bad)} non-finite values, first at {tuple(bad[0])}"
    error = relative_l2(actual, truth)
    if not (error <= tol):
        gap = np.abs(np.asarray(actual, np.float64) - truth)
        at = np.unravel_index(int(gap.argmax()), gap.shape)
        raise AssertionError(f"{what}: relative L2 {error:.3e} > {tol:.0e}; worst at {tuple(map(int, at))}: "
                             f"{actual[at]!r}, expected {truth[at]!r}")
    return error


def finite_difference_error(function, array: np.ndarray, gradient: np.ndarray, rng: np.random.Generator,
                            samples: int = 64, h: float = 1e-6) -> float:
    """Relative L2 error of `gradient` against central differences of the scalar `function()` at samples of `array`.

    `array` (float64, contiguous) is what `function` reads; it is restored.
    """
    assert array.dtype == np.float64 and gradient.shape == array.shape
    flat, grad = array.reshape(-1), gradient.reshape(-1)
    where = rng.permutation(flat.size)[:samples]
    numeric = np.empty(len(where))
    for n, i in enumerate(where):
        kept = flat[i]
        flat[i] = kept + h
        above = function()
        flat[i] = kept - h
        numeric[n] = (above - function()) / (2 * h)
        flat[i] = kept
    assert np.abs(numeric).max() > 0, "the function does not depend on this array: the check would be empty"
    return relative_l2(grad[where], numeric)
