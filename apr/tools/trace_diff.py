"""Two traces, point by point: how far apart, and the first point beyond its tolerance.

The tolerance is end to end: what rounding does up to the last layer is allowed at the first. So this finds where two
runs part and sees no small fault late in a deep model; `apr bisect` gives each op the same inputs and is sharp.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from apr.errors import FormatError, GateError, MeasureError
from apr.taps import split_name
from apr.tools.compare import Difference, difference
from apr.tools.config_diff import POINTS, check_shapes
from apr.tools.trace import Trace

ID = "TRACE-DIFF"
# Relative L2, forward and gradients, twice the worst that rounding alone did to the sharp models of tests/models.py
# (docs/trace.md). fp32 hardly grows with depth; bf16 does, about as the root of the number of layers.
FP32 = {False: 2e-5, True: 5e-5}
BF16 = {False: 0.04, True: 0.12}  # times the root of the layers
LOOSEST = 0.5


@dataclass(frozen=True)
class PointDifference:
    """A point of one trace against the same of another, which is taken as the truth; `std` is None as in Statistics.

    `strange`: the numbers on the two sides together that are not finite.
    """

    name: str
    difference: Difference
    std: float | None
    other_std: float | None
    strange: int
    tolerance: float
    within: bool


def default_tolerance(mine: Trace, other: Trace, gradient: bool) -> float:
    """Relative L2 that two traces of one model may differ by, end to end."""
    if mine.precision == other.precision == "fp32":
        return FP32[gradient]
    return min(LOOSEST, BF16[gradient] * math.sqrt(mine.config.L))


def weak_tokens(tokens: Sequence[int]) -> str | None:
    """Why a prompt can hide faults, or None."""
    if len(set(tokens)) == 1:
        return f"{len(tokens)} equal tokens: attention, mask and rotation hardly show; give a prompt of several words"
    return None


def diff(mine: Trace, other: Trace, tolerance: float | None = None) -> list[PointDifference]:
    """Every point of `mine` against that of `other`, in order of computation; both must keep their arrays.

    `tolerance` None means default_tolerance. Raises ConfigError for models of different shapes, FormatError for
    different tokens and points that one of them lacks, MeasureError when there is nothing in either to compare.
    """
    check_shapes(mine.config, other.config, f"{mine.model} and {other.model}", POINTS)
    if mine.tokens != other.tokens:
        at = next((i for i, (a, b) in enumerate(zip(mine.tokens, other.tokens, strict=False)) if a != b),
                  min(len(mine.tokens), len(other.tokens)))
        raise FormatError(f"{other.model}: tokens", f"the {len(mine.tokens)} of {mine.model}",
                          f"{len(other.tokens)}, the first other one at position {at}", "trace the same tokens")
    lonely = [next(iter([n for n in a.arrays if n not in b.arrays]), None) for a, b in ((mine, other), (other, mine))]
    if lonely != [None, None]:
        raise FormatError("points to compare", f"the same in {mine.model} and {other.model}",
                          f"only in the first: {lonely[0]}, only in the second: {lonely[1]}",
                          "trace the same stages and layers")
    if not any(array.any() for array in other.arrays.values()):
        raise MeasureError(ID, "numbers to compare", f"{len(other.arrays)} points, nothing but zeros in {other.model}",
                           "check the model, the stages and the layers")
    return [_compare(name, mine, other, tolerance) for name in mine.arrays]


def _compare(name: str, mine: Trace, other: Trace, tolerance: float | None) -> PointDifference:
    found = difference(mine.arrays[name], other.arrays[name])
    limit = default_tolerance(mine, other, split_name(name)[2]) if tolerance is None else tolerance
    a, b = mine.statistics[name], other.statistics[name]
    strange = a.nan + a.inf + b.nan + b.inf
    return PointDifference(name, found, a.std, b.std, strange, limit, strange == 0 and found.relative_l2 <= limit)


def judge(points: Sequence[PointDifference]) -> None:
    """Raise GateError for the first point beyond its tolerance, MeasureError for no points."""
    if not points:
        raise MeasureError(ID, "points to compare", "none", "choose other stages or layers")
    first = next((p for p in points if not p.within), None)
    if first is not None:
        d = first.difference
        raise GateError(f"{ID} {first.name}", f"a relative L2 of at most {first.tolerance:.3g} and finite numbers",
                        f"{d.relative_l2:.3g}, scale {d.scale:.5f}, cosine {d.cosine:.5f}, {first.strange} not finite "
                        f"({sum(not p.within for p in points)} of {len(points)} points are beyond)",
                        "it is the first in the order of computation; 'apr bisect' names the op and the cause")
