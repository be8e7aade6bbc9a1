"""How far an array is from the truth, in the numbers that faults show in: none of them finds all (docs/numerics.md)."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """An array against the truth, both of one shape; in float64, over the elements that are finite in both.

    Cosine is blind to scale and `relative_l2` to what is small beside the rest, so there are several numbers;
    `relative_l2` is NaN where the array is not finite and the truth is, so that no comparison with it holds.
    """

    relative_l2: float  # |array - truth| / |truth|; |array| where the truth is zero
    scale: float        # (array . truth) / (truth . truth), 1 where the truth is zero
    cosine: float       # 1 where both are zero, 0 where one is
    max_abs: float      # the largest |array - truth|
    nans: int           # in the array
    infs: int           # in the array


def difference(array: np.ndarray, truth: np.ndarray) -> Difference:
    """`array` against `truth`, which has as many elements."""
    a, t = array.astype(np.float64).reshape(-1), truth.astype(np.float64).reshape(-1)
    nans, infs = int(np.isnan(a).sum()), int(np.isinf(a).sum())
    both = np.isfinite(a) & np.isfinite(t)
    error, scale = relative(a[both], t[both])
    if not bool((np.isfinite(t) <= np.isfinite(a)).all()):
        error = math.nan
    norms = float(np.linalg.norm(a[both]) * np.linalg.norm(t[both]))
    cosine = float(a[both] @ t[both]) / norms if norms else float(not a[both].any() and not t[both].any())
    return Difference(error, scale, cosine, float(np.abs(a[both] - t[both]).max(initial=0.0)), nans, infs)


def relative(array: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """|array - truth| / |truth| and (array . truth) / (truth . truth), in float64; NaN where the array has one."""
    a, t = array.astype(np.float64).reshape(-1), truth.astype(np.float64).reshape(-1)
    square = float(t @ t)
    if square == 0.0:
        return float(np.linalg.norm(a)), 1.0
    return float(np.linalg.norm(a - t)) / square ** 0.5, float(a @ t) / square
