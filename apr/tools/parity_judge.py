"""Scores against scores at every position: the numbers in which faults show, their limits, and the verdict.

No number finds all faults (docs/numerics.md): cosine is blind to scale, the largest score to everything but itself, and
one position to what is small everywhere. So each position has several, and all positions of a way are judged together
once more, where roundings cancel and a wrong scale does not.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import ThreadpoolController

from apr.tools.compare import difference
from apr.tools.gate import NEAR
from apr.tools.parity_prompts import Prompt

THREADS = 8
# float32: 24 layers of Qwen2-0.5B's shape end 1.6e-6 from float64, and five models of transformers within 2e-5 at every
# position; each further layer adds its roundings. In nats: half the square of the largest error of a score.
FP32_ERROR, FP32_KL, FP32_LAYERS = 2e-5, 1e-6, 24
# Where rounding is measured with the reference itself: another bf16 computation's was at most 2.5 times as much at one
# of 17,280 positions of 54 models, and 1.1 times over all of a model's (docs/parity.md). KL goes with the square.
AT_ONE_POSITION, OVER_ALL = 4.0, 2.0
SCALE_SHARE = 0.1  # of the error over all positions: roundings that do not cancel (measured: 0.03)
Place = tuple[int, int]  # number of the prompt, position in it
PASS, NEAR_TIE, FAIL, UNMEASURED = "pass", "near tie", "fail", "unmeasured"


@dataclass(frozen=True)
class Limit:
    """What scores may differ by: relative L2; KL divergence in nats, at one position; and over all positions together
    how far from 1 their scale may be.
    """

    relative_l2: float
    kl: float
    scale: float


@dataclass(frozen=True)
class Measured:
    """The scores of one position against the expected ones, in float64."""

    expected_argmax: int
    found_argmax: int
    cosine: float
    relative_l2: float
    max_abs: float
    mean_abs: float
    scale: float  # (found . expected) / (expected . expected)
    kl: float  # KL(softmax(expected) || softmax(found)) in nats
    nans: int
    infs: int
    rms: float  # of the expected scores
    spread: float  # largest expected score less the smallest
    gap: float  # by which the found argmax is expected to be below the expected one


@dataclass(frozen=True)
class Position:
    """One position of one prompt, taken one way (WAYS in apr/tools/parity.py), judged. `why`: what is beyond limits."""

    prompt: str
    way: str
    position: int
    token_id: int
    measured: Measured
    limit: Limit
    verdict: str
    why: str


@dataclass(frozen=True)
class Together:
    """All measured positions of a way as one array."""

    way: str
    positions: int
    relative_l2: float
    scale: float
    limit: Limit
    verdict: str
    why: str


def measure(found: np.ndarray, expected: np.ndarray) -> Measured:
    """Scores (V,) of one position against the expected ones (V,)."""
    with np.errstate(all="ignore"):  # numbers that are none are counted, and fail every comparison
        a, t = found.astype(np.float64), expected.astype(np.float64)
        d, best = difference(found, expected), int(t.argmax())
        mine = int(np.where(np.isnan(a), -np.inf, a).argmax())
        return Measured(best, mine, d.cosine, d.relative_l2, d.max_abs, float(np.abs(a - t).mean()), d.scale,
                        _divergence(a, t), d.nans, d.infs, float(np.sqrt(np.mean(t * t))), float(np.ptp(t)),
                        float(t[best] - t[mine]))


def _divergence(a: np.ndarray, t: np.ndarray) -> float:
    log_p, log_q = _log_softmax(t), _log_softmax(a)
    return float(np.exp(log_p) @ (log_p - log_q))


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max()
    out: np.ndarray = shifted - math.log(float(np.exp(shifted).sum()))
    return out


def fixed_limit(layers: int, rounding: float = 0.0) -> Limit:
    """Of float32 against float32; `rounding` is what one side's scores were rounded by when they were stored."""
    error = FP32_ERROR * max(1.0, layers / FP32_LAYERS) + rounding
    return Limit(error, FP32_KL * (error / FP32_ERROR) ** 2, error)


def judge(prompt: Prompt, way: str, position: int, measured: Measured, limit: Limit) -> Position:
    """The verdict of one position. Every comparison is such that a NaN fails it."""
    m, why = measured, []
    if not (math.isfinite(m.rms) and m.spread > 0):
        why = ["the expected scores are not finite, or all equal: nothing can be compared with them"]
        return Position(prompt.name, way, position, prompt.ids[position], m, limit, UNMEASURED, why[0])
    if m.nans or m.infs:
        why.append(f"{m.nans} NaN and {m.infs} infinite scores")
    if not m.relative_l2 <= limit.relative_l2:
        why.append(f"relative L2 {m.relative_l2:.3g} > {limit.relative_l2:.3g}")
    if not m.kl <= limit.kl:
        why.append(f"KL {m.kl:.3g} > {limit.kl:.3g} nats")
    if not m.gap <= near_tie(m, limit):
        why.append(f"token {m.found_argmax} the likeliest and not {m.expected_argmax}, {m.gap:.3g} above it")
    verdict = FAIL if why else PASS if m.found_argmax == m.expected_argmax else NEAR_TIE
    return Position(prompt.name, way, position, prompt.ids[position], m, limit, verdict, "; ".join(why))


def near_tie(m: Measured, limit: Limit) -> float:
    """How far below the best a score may be expected to be and still come out best.

    NEAR of the spread, as at the start gate; or twice what the limit leaves to a score, where that is more: rounding
    may take that much from the one and give it to the other.
    """
    return max(NEAR * m.spread, 2 * limit.relative_l2 * m.rms)


class Limits:
    """The limits of every position: fixed ones, or as multiples of what rounding alone does there.

    `noise[i][t]` measures the reference in plain arithmetic against a finer one at position t of prompt i; None: fixed
    limits.
    """

    def __init__(self, floor: Limit, noise: list[list[Measured]] | None) -> None:
        self.floor, self.noise = floor, noise
        every = [m for row in noise or [] for m in row if math.isfinite(m.relative_l2 + m.kl)]
        self.error = float(np.mean([m.relative_l2 for m in every])) if every else 0.0
        self.kl = float(np.mean([m.kl for m in every])) if every else 0.0

    def at(self, prompt: int, position: int) -> Limit:
        """The limit of one position: rounding is luck there, so it is no less than for the average one."""
        if self.noise is None:
            return self.floor
        here = self.noise[prompt][position]
        error = AT_ONE_POSITION * max(here.relative_l2, self.error)
        kl = AT_ONE_POSITION ** 2 * max(here.kl, self.kl)
        return Limit(max(error, self.floor.relative_l2), max(kl, self.floor.kl), error)

    def together(self, places: Sequence[Place]) -> Limit:
        """The limit of many positions taken as one array; with few of them luck remains."""
        if self.noise is None:
            return self.floor
        error, _ = _together([self.noise[i][t] for i, t in places])
        luck = 1 / math.sqrt(len(places))
        factor = OVER_ALL + (AT_ONE_POSITION - OVER_ALL) * luck
        return Limit(max(factor * error, self.floor.relative_l2), math.inf,
                     max(error * max(SCALE_SHARE, luck), self.floor.scale))


def _together(measured: Sequence[Measured]) -> tuple[float, float]:
    """Relative L2 and scale of positions as one array."""
    squares = np.array([m.rms ** 2 for m in measured])
    errors = np.array([m.relative_l2 ** 2 for m in measured])
    scales = np.array([m.scale for m in measured])
    return math.sqrt(float(errors @ squares / squares.sum())), float(scales @ squares / squares.sum())


def judge_together(way: str, positions: Sequence[Position], limit: Limit) -> Together:
    """The verdict of all measured positions of a way."""
    error, scale = _together([p.measured for p in positions])
    why = []
    if not error <= limit.relative_l2:
        why.append(f"relative L2 {error:.3g} > {limit.relative_l2:.3g}")
    if not abs(scale - 1) <= limit.scale:
        why.append(f"scale {scale:.5f}, more than {limit.scale:.3g} from 1")
    return Together(way, len(positions), error, scale, limit, FAIL if why else PASS, "; ".join(why))


def judge_way(prompts: Sequence[Prompt], way: str, places: Sequence[Place], measured: Sequence[Measured],
              limits: Limits) -> tuple[list[Position], Together | None]:
    """The positions at `places`, measured, and all of them together; None where not one of them could be."""
    positions = [judge(prompts[i], way, t, m, limits.at(i, t)) for (i, t), m in zip(places, measured, strict=True)]
    known = [(p, place) for p, place in zip(positions, places, strict=True) if p.verdict != UNMEASURED]
    if not known:
        return positions, None
    return positions, judge_together(way, [p for p, _ in known], limits.together([place for _, place in known]))


def measure_all(places: Sequence[Place], found: Sequence[np.ndarray], expected: Sequence[np.ndarray]
                ) -> list[Measured]:
    """`measure` at each place, on several threads: a vocabulary in float64 is some megabytes of work.

    BLAS gets one for each of them: its own would wait for each other, which took four times as long.
    """
    with ThreadpoolController().select(user_api="blas").limit(limits=1), ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda place: measure(found[place[0]][place[1]], expected[place[0]][place[1]]), places))
