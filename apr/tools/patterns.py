"""Patterns of a wrong result that say nothing of its op: a factor, rows displaced, a transposed matrix, stale memory.

A result is seen as rows of columns: (B, T, n, HS) is B*T rows of n*HS, (B, T, C) is B*T rows, (N,) is N rows of one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from apr.tools.variants import Array, rounded, shift_rows

MATCHED = 4096  # rows or columns at most that are matched each with each
ENOUGH = 0.9    # of the rows or columns must have a partner before an order is spoken of


@dataclass(frozen=True)
class Pattern:
    """What the result would be (NaN: not said) under a pattern of `kind`, with its sentence and its number if any."""

    kind: str
    text: str
    array: Array
    number: float | None = None


def as_rows(array: Array) -> Array:
    """(N, columns)."""
    return array.reshape(-1, array.shape[-1]) if array.ndim in (2, 3) else array.reshape(
        *((-1, array.shape[-1] * array.shape[-2]) if array.ndim > 3 else (-1, 1)))


def spans(numbers: Array, limit: int = 6) -> str:
    """Sorted whole numbers as spans: `3, 17..31`; at most `limit` spans, then how many there are in all."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    parts = [f"{part[0]}..{part[-1]}" if part.size > 1 else str(part[0]) for part in np.split(numbers, breaks)]
    return ", ".join(parts[:limit]) + (f", … ({numbers.size} in all)" if len(parts) > limit else "")


def patterns(got: Array, truth: Array, before: Array | None, tolerance: float, where: Array) -> Iterator[Pattern]:
    """Every pattern that could be; got and truth are float64 of one shape, `where` says which elements are judged."""
    if before is not None and before.size == got.size:
        held = before.astype(np.float64).reshape(got.shape)
        yield Pattern("stale", "it is what the buffer held before", held)
        yield Pattern("not_cleared", "it was added to what the buffer held before", truth + held)
    yield Pattern("zero", "it is zero", np.where(where, 0.0, truth))
    yield from layouts(truth)
    if min(as_rows(got).shape[0], MATCHED) > 1:
        yield from orders(got, truth, tolerance)
    yield from factors(got, truth, where)
    for bits, name in ((10, "TF32"), (7, "bfloat16")):
        yield Pattern("precision", f"the result was rounded to {bits} bits of mantissa, as {name} does",
                      rounded(truth, bits).astype(np.float64), bits)


def factors(got: Array, truth: Array, where: Array) -> Iterator[Pattern]:
    """One factor; one vector for all rows; a factor for each column; for each row.

    Where many numbers are taken from the result, each element is predicted from the others: what they take from noise
    then explains none of it.
    """
    g, t = as_rows(np.where(where, got, 0.0)), as_rows(np.where(where, truth, 0.0))
    square = float((t * t).sum())
    if square > 0.0 and t.size > 1:
        number = float((g * t).sum()) / square
        nice = float(f"{number:.3g}")
        number = nice if abs(nice - number) < 1e-4 * abs(number) else number
        yield Pattern("scaled", f"every value is {number:.6g} times what it should be", number * truth, number)
    rows, columns = t.shape
    if rows >= 4 and columns > 1:
        vector = others_mean(g - t, as_rows(where).astype(np.float64), 0)
        size = float(np.linalg.norm(np.nan_to_num(vector[0])))
        yield Pattern("shifted", f"one vector is added to every row (norm {size:.4g}), as a bias is",
                      (as_rows(truth) + vector).reshape(truth.shape))
        gain = others_mean(g * t, t * t, 0)
        yield Pattern("gains", f"each column has a factor of its own ({np.nanmin(gain):.4g} to {np.nanmax(gain):.4g}), "
                      "as a norm's weight gives", (as_rows(truth) * gain).reshape(truth.shape))
    if columns >= 8 and rows > 1:
        factor = others_mean(g * t, t * t, 1)
        yield Pattern("row_factors", f"each row has a factor of its own ({np.nanmin(factor):.4g} to "
                      f"{np.nanmax(factor):.4g}), as a norm gives", (as_rows(truth) * factor).reshape(truth.shape))


def others_mean(values: Array, weights: Array, axis: int) -> Array:
    """For each element the sum of the other values along an axis over that of their weights; NaN for no weight."""
    below = weights.sum(axis=axis, keepdims=True) - weights
    above = values.sum(axis=axis, keepdims=True) - values
    return np.where(below > 1e-12 * weights.sum(axis=axis, keepdims=True), above / below, np.nan)


LAYOUTS: dict[int, dict[tuple[int, ...], str]] = {  # by dimensions: the order in memory, in words
    2: {(1, 0): "the matrix is transposed"},
    3: {(1, 0, 2): "sequences and positions are exchanged in memory",
        (0, 2, 1): "positions and channels are exchanged in memory"},
    4: {(0, 2, 1, 3): "positions and heads are exchanged in memory",
        (1, 0, 2, 3): "sequences and positions are exchanged in memory",
        (0, 1, 3, 2): "heads and their channels are exchanged in memory"},
}


def layouts(truth: Array) -> Iterator[Pattern]:
    """The right values in memory of another order of dimensions; a square matrix that is transposed among them."""
    for axes, text in LAYOUTS.get(truth.ndim, {}).items():
        yield Pattern("transposed", text, np.ascontiguousarray(truth.transpose(axes)).reshape(truth.shape))


def partners(got: Array, truth: Array, tolerance: float) -> Array | None:
    """For each row (N, D) of got the row of truth that it equals, -1 for none; None where too few do, or all their own.

    A row of zeros has no partner.
    """
    if not (1 < got.shape[0] <= MATCHED and got.shape[1] >= 4):
        return None
    sizes = (truth * truth).sum(axis=1)
    gap = (got * got).sum(axis=1)[:, None] + sizes - 2.0 * (got @ truth.T)
    limit = (3.0 * tolerance) ** 2 * sizes + 1e-14 * sizes.max(initial=0.0)
    index = np.argmin(gap - limit, axis=1)
    rows = np.arange(got.shape[0])
    index[~((gap[rows, index] <= limit[index]) & (sizes[index] > 0.0))] = -1
    return None if (index >= 0).mean() < ENOUGH or np.array_equal(index, rows) else index


def orders(got: Array, truth: Array, tolerance: float) -> Iterator[Pattern]:
    """Rows, sequences, heads or columns in another order."""
    g, t = as_rows(got), as_rows(truth)
    yield from displaced(g, t, got)
    index = partners(g, t, tolerance)
    if index is not None:
        if got.ndim > 2 and np.array_equal(index.reshape(got.shape[:2]) % got.shape[1], np.broadcast_to(
                np.arange(got.shape[1]), got.shape[:2])):
            yield Pattern("sequences", "sequences are exchanged: they hold those numbered "
                          f"{named(index.reshape(got.shape[:2])[:, 0] // got.shape[1])}", taken(t, index, got))
        yield Pattern("permuted", f"the rows hold those numbered {named(index)}", taken(t, index, got))
    if got.ndim == 4:
        by_head = [a.transpose(2, 0, 1, 3).reshape(got.shape[2], -1) for a in (got, truth)]
        index = partners(by_head[0], by_head[1], tolerance)
        if index is not None:
            array = np.where((index >= 0)[:, None], truth[:, :, index], np.nan)
            yield Pattern("permuted", f"the heads hold those numbered {named(index)}", array)
    index = partners(np.ascontiguousarray(g.T), np.ascontiguousarray(t.T), tolerance)
    if index is not None:
        steps = np.unique((index - np.arange(index.size)) % index.size)
        text = f"column c holds column c + {steps[0]}" if steps.size == 1 else (
            f"the columns hold those numbered {named(index)}")
        yield Pattern("permuted", text, np.ascontiguousarray(taken(t.T, index, t.T).T).reshape(got.shape))


def taken(rows: Array, index: Array, like: Array) -> Array:
    """Row index[i] of (N, D) as row i, NaN for -1, in another shape."""
    return np.where((index >= 0)[:, None], rows[index], np.nan).reshape(like.shape)


def named(index: Array) -> str:
    """The first of a list of numbers, `-` for none."""
    return ", ".join("-" if i < 0 else str(i) for i in index[:12].tolist()) + (", …" if index.size > 12 else "")


def displaced(g: Array, t: Array, like: Array) -> Iterator[Pattern]:
    """Row i holds row i + k, for the k by which the rows agree best: found from products, with no rounding to fear."""
    rows = g.shape[0]
    for k in range(-4, 5):
        if k and rows > 2 * abs(k) + 1 and (g.shape[1] > 1 or rows >= 16):
            yield Pattern("displaced", f"row i holds row i {k:+d}", shift_rows(t, k).reshape(like.shape), k)
