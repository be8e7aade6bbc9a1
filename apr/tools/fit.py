"""How well a hypothesis explains a result, and the search for the number of one that has a number.

A number is found by projecting what is left of the difference onto the direction in which the hypothesis moves: over
many elements that tells an effect from rounding that is larger than it in every one of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

FEW = 3.0           # tolerances within which a hypothesis explains
BETTER = 10.0       # times better than the truth
DISTINCT = 100.0    # or: the squares it takes away, over the noise's, in elements
EQUAL = 50.0        # hypotheses that differ by less than this, in elements, explain equally well
FLOAT32 = 6e-8       # half a unit in float32's last place: below it one error is as good as another
SHARE = 0.5         # of the judged elements that a hypothesis must speak of
STEP = 1e-4         # of a number, for the slope
ROUNDS = 12         # of the fit at most
SETTLED = 0.999     # of the error before: a round that leaves more was the last
DIGITS = 6          # of a number that is called round

Array = np.ndarray


def dot(a: Array, b: Array) -> float:
    """The product of two (N,) arrays, by one thread: BLAS's threads take longer to wake than these sums do."""
    return float(np.einsum("i,i->", a, b))


@dataclass(frozen=True)
class Score:
    """`explains`: relative L2 of the result against the hypothesis; `truth`: against the truth, same elements.

    `size`: how many elements those are.
    """

    explains: float
    truth: float
    size: int

    def accepted(self, tolerance: float) -> bool:
        """Whether the hypothesis explains the result: nearly all of the difference, or all but the allowed noise."""
        if not self.explains <= FEW * tolerance:
            return False
        if self.explains * BETTER <= self.truth:
            return True
        gain = math.inf if self.explains == 0.0 else self.size * ((self.truth / self.explains) ** 2 - 1.0)
        return self.explains <= tolerance and self.explains <= 0.8 * self.truth and gain >= DISTINCT

    def equal(self, best: "Score", tolerance: float) -> bool:
        """Whether this explains as well as the best does, up to chance."""
        if self.explains <= min(max(2.0 * best.explains, FLOAT32), 0.1 * tolerance):
            return True
        if best.explains == 0.0:
            return False
        return self.size * ((self.explains / best.explains) ** 2 - 1.0) <= EQUAL


@dataclass(frozen=True)
class Case:
    """A result and its truth, float64 of one shape; `where` says which elements are judged."""

    got: Array
    truth: Array
    where: Array
    tolerance: float

    @cached_property
    def of_truth(self) -> tuple[float, float]:
        """|got - truth| and |truth| over the judged elements."""
        return self.distance(self.truth, self.where)

    def distance(self, array: Array, mask: Array) -> tuple[float, float]:
        """|got - array| and |array| over the elements of a mask."""
        if mask.all():
            g, a = self.got.reshape(-1), array.reshape(-1)
        else:
            g, a = self.got[mask], array[mask]
        left = g - a
        return dot(left, left) ** 0.5, dot(a, a) ** 0.5

    def score(self, hypothesis: Array) -> Score | None:
        """None where the hypothesis speaks of too little."""
        if hypothesis.shape != self.truth.shape:
            return None
        mask = self.where & np.isfinite(hypothesis)
        judged, size = int(self.where.sum()), int(mask.sum())
        if size == 0 or size < SHARE * judged:
            return None
        explains, size_h = self.distance(hypothesis, mask)
        truth, size_t = self.of_truth if size == judged else self.distance(self.truth, mask)
        return Score(explains / (size_h or size_t or 1.0), truth / (size_t or size_h or 1.0), size)

    def error(self, hypothesis: Array) -> float:
        """The score's `explains`, infinite for none."""
        score = self.score(hypothesis)
        return math.inf if score is None or math.isnan(score.explains) else score.explains


def best_of(case: Case, run: Callable[[float], Array], numbers: Sequence[float]) -> tuple[float, Array]:
    """The number of these that explains best, and its hypothesis."""
    best = (math.inf, numbers[0], np.full(case.truth.shape, np.nan))
    for number in numbers:
        array = run(number)
        error = case.error(array)
        if error < best[0]:
            best = (error, number, array)
    return best[1], best[2]


def refine(case: Case, run: Callable[[float], Array], start: float, lowest: float) -> tuple[float, Array]:
    """The number near `start`, at least `lowest`, that explains best, as round as the noise allows; its hypothesis."""
    number, array = start, run(start)
    error = case.error(array)
    for _ in range(ROUNDS):
        small = STEP * abs(number) or 1e-12
        slope = (run(number + small) - array) / small
        mask = case.where & np.isfinite(slope) & np.isfinite(array)
        steep = dot(slope[mask], slope[mask])
        if not steep > 0.0:
            break
        left = case.got[mask] - array[mask]
        step = dot(left, slope[mask]) / steep
        for share in (1.0, 0.25, 0.05):
            tried = max(lowest, number + share * step)
            candidate = run(tried)
            if (found := case.error(candidate)) < error:
                break
        else:
            break
        settled = found > SETTLED * error
        number, array, error = tried, candidate, found
        if settled:
            break
    return rounded_number(case, run, number, array)


def rounded_number(case: Case, run: Callable[[float], Array], number: float, array: Array) -> tuple[float, Array]:
    """The roundest number that explains as well as the fitted one, and its hypothesis."""
    best = case.score(array)
    if best is None or not best.accepted(case.tolerance):
        return number, array
    for text in ("0", *(f"{number:.{digits}e}" for digits in range(DIGITS))):
        hypothesis = run(float(text))
        score = case.score(hypothesis)
        if score is not None and score.equal(best, case.tolerance):
            return float(text), hypothesis
    return number, array
