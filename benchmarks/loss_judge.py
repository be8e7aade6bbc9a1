"""Whether two training curves are of the same training, for benchmarks/loss_curve.py.

The envelope is the peer's own: PyTorch again, every initial weight moved by one unit in its last place, at random up or
down. `spread` at a step is the largest relative difference of PyTorch's two curves up to there. What is judged (exit
code 5 where one fails):

    fp32   the first 10 losses within 1e-5 nats of PyTorch's; after that a relative difference of at most 2 spreads
    bf16   a loss on held-out rows after the last step within 0.5 % of PyTorch's; at every step a relative difference of
           at most 1 %, or 2 spreads where that is more: bf16 is rounded in other places on the two sides, so that the
           curves part from the first step on, by more than a unit in the last place of the weights explains
    both   the loss falls below 0.7 of where it began
"""

from typing import Any, NamedTuple

import numpy as np

FIRST, FIRST_LIMIT = 10, 1e-5  # fp32: steps, nats
SPREADS = 2.0
STEP_LIMIT, HELD_LIMIT, FALL = 0.01, 0.005, 0.7  # bf16, bf16, both


class Curve(NamedTuple):
    """A side's losses (steps,), its loss on the held-out rows after them, and the seconds that it took."""

    losses: np.ndarray
    held_out: float
    seconds: float


class Check(NamedTuple):
    """What was judged: a name, what was found, the most that passes."""

    name: str
    found: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether it passes; NaN does not."""
        return self.found <= self.limit


def moved(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights, each moved by one unit in its last place, at random up or down."""
    rng = np.random.default_rng(7)
    return {name: np.nextafter(a, np.where(rng.integers(0, 2, a.shape, np.int8), np.inf, -np.inf).astype(np.float32))
            for name, a in weights.items()}


def differences(mine: Curve, first: Curve, second: Curve | None) -> tuple[np.ndarray, np.ndarray]:
    """(steps,) relative difference of ours from the peer's first curve; and the spread of its own two so far."""
    apart = np.abs(mine.losses - first.losses) / first.losses
    if second is None:
        return apart, np.zeros_like(apart)
    return apart, np.maximum.accumulate(np.abs(second.losses - first.losses) / first.losses)


def judge(mine: Curve, first: Curve, second: Curve | None, precision: str) -> list[Check]:
    """What is judged of these curves; see above."""
    apart, spread = differences(mine, first, second)
    fall = float(mine.losses[-20:].mean() / mine.losses[0])
    if precision == "fp32":
        nats = float(np.abs(mine.losses - first.losses)[:FIRST].max())
        over = [] if second is None else [Check("largest difference over its spread, after those",
                                                float((apart / np.maximum(spread, 1e-12))[FIRST:].max()), SPREADS)]
        return [Check(f"first {FIRST} losses, nats", nats, FIRST_LIMIT), *over, Check("fall", fall, FALL)]
    held = abs(mine.held_out - first.held_out) / first.held_out
    allowed = np.maximum(STEP_LIMIT, SPREADS * spread)
    worst = int(np.argmax(apart / allowed)) if np.isfinite(apart).all() else int(np.argmin(np.isfinite(apart)))
    return [Check("held-out loss", held, HELD_LIMIT),
            Check(f"difference at step {worst}, the worst for its limit", float(apart[worst]), float(allowed[worst])),
            Check("fall", fall, FALL)]


def table(mine: Curve, first: Curve, second: Curve | None) -> list[dict[str, Any]]:
    """A row for each step."""
    apart, spread = differences(mine, first, second)
    return [{"step": i, "apr": f"{mine.losses[i]:.6f}", "torch": f"{first.losses[i]:.6f}",
             "torch_moved": "" if second is None else f"{second.losses[i]:.6f}", "difference": f"{apart[i]:.2e}",
             "spread": "" if second is None else f"{spread[i]:.2e}"} for i in range(len(apart))]
