"""Guards: pure functions of host numbers that say whether a run may go on.

Three states and no NaN tricks: WARMUP (too little history to judge by it), OK, TRIP. Anything not finite is TRIP in
every state. Upstream's bounds passed on garbage (an epoch-0 cap of 2 ln V, one side only); these have two sides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median

WINDOW = 20  # losses that a spike is judged against
SPIKE = 3.0  # times the window's median, plus one nat: far beyond any spike that training recovers from
DIVERGENCE_RATIO = 2.0  # validation loss over the previous one
ABOVE_UNIFORM = 1.0  # nats above ln V at which a model is worse than no model
BELOW_UNIFORM = 0.5  # nats below ln V that untrained weights can explain
INIT_SHARE = 0.7  # of ln V: what a model that learnt from text must beat on text of its kind
SUSPICIOUS_RATIO = 0.2  # validation loss over recent training loss: upstream's broken eval gave 0.0007


class State(Enum):
    """What a guard says."""

    WARMUP = "warmup"
    OK = "ok"
    TRIP = "trip"


@dataclass(frozen=True)
class Verdict:
    """A state, and for TRIP the id of the broken invariant, the reason, and what to do."""

    state: State
    gate: str = ""
    expected: str = ""
    found: str = ""
    fix: str = "the run ended here; the last checkpoint is from before this step"

    @property
    def tripped(self) -> bool:
        """Whether the run must end."""
        return self.state is State.TRIP


def _trip(gate: str, expected: str, found: str) -> Verdict:
    return Verdict(State.TRIP, gate, expected, found)


def judge_step(loss: float, grad_norm: float, lr: float, tokens_per_sec: float, wall_ms: float,
               history: Sequence[float]) -> Verdict:
    """A training step: loss in nats, gradient norm, learning rate, rate, milliseconds; `history`: earlier losses."""
    for name, value in (("loss", loss), ("grad_norm", grad_norm), ("lr", lr)):
        if not math.isfinite(value):
            return _trip("INV-TRAIN-007", f"a finite {name}", str(value))
    if loss == 1.0 and grad_norm == 1.0:
        return _trip("INV-TRAIN-011", "a measured loss and norm",
                     "exactly 1.0 and 1.0, the placeholder of exhausted data")
    if not (loss > 0 and grad_norm >= 0 and lr >= 0):
        return _trip("INV-TRAIN-008", "loss > 0, grad_norm >= 0, lr >= 0", f"{loss}, {grad_norm}, {lr}")
    for name, value in (("tokens_per_sec", tokens_per_sec), ("wall_ms", wall_ms)):
        if not (math.isfinite(value) and value >= 0):
            return _trip("INV-TRAIN-008", f"{name} finite and 0 or more", str(value))
    if len(history) < WINDOW:
        return Verdict(State.WARMUP)
    limit = SPIKE * median(history[-WINDOW:]) + 1.0
    if not loss <= limit:
        return _trip("INV-TRAIN-005",
                     f"a loss of at most {limit:.3f} (median of the last {WINDOW} steps, times {SPIKE:g}, plus 1)",
                     f"{loss:.4f}")
    return Verdict(State.OK)


def judge_initial(val_loss: float, vocab_size: int, fresh: bool) -> Verdict:
    """The validation loss before the first step; random weights (`fresh`) must be near ln V on both sides."""
    uniform = math.log(vocab_size)
    low, high = (uniform - BELOW_UNIFORM, uniform + ABOVE_UNIFORM) if fresh else (0.0, math.inf)
    if not (math.isfinite(val_loss) and val_loss > 0 and low <= val_loss <= high):
        return _trip("EVAL-METHODOLOGY-001", f"an initial val_loss in [{low:.3f}, {high:.3f}] (ln V = {uniform:.3f})",
                     f"{val_loss}")
    return Verdict(State.OK)


def judge_init(val_loss: float, vocab_size: int) -> Verdict:
    """The validation loss of weights that a run was given, before the first step. Scrambled ones are near ln V."""
    limit = INIT_SHARE * math.log(vocab_size)
    if not (math.isfinite(val_loss) and val_loss <= limit):
        return Verdict(State.TRIP, "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-003",
                       f"an initial val_loss of at most {INIT_SHARE} ln V = {limit:.4f}", f"{val_loss:.4f}",
                       "check that model, tokenizer and data belong together, or add --force-init-loss")
    return Verdict(State.OK)


def judge_val(val_loss: float, previous: float | None, vocab_size: int, recent_train: float | None) -> Verdict:
    """A validation loss after an epoch, in nats, against the one before and the mean of the last training losses."""
    ceiling = math.log(vocab_size) + ABOVE_UNIFORM
    if not math.isfinite(val_loss):
        return _trip("INV-TRAIN-007", "a finite val_loss", str(val_loss))
    if not val_loss > 0:
        return _trip("EVAL-METHODOLOGY-001", "a val_loss above 0", str(val_loss))
    if not val_loss <= ceiling:
        return _trip("INV-TRAIN-005", f"val_loss of at most ln V + 1 = {ceiling:.3f}", f"{val_loss:.4f}")
    if previous is not None and not val_loss <= DIVERGENCE_RATIO * previous:
        return _trip("INV-TRAIN-005", f"val_loss of at most {DIVERGENCE_RATIO:g} times the previous {previous:.4f}",
                     f"{val_loss:.4f}")
    if recent_train is not None and not val_loss >= SUSPICIOUS_RATIO * recent_train:
        return _trip("EVAL-METHODOLOGY-002",
                     f"val_loss of at least {SUSPICIOUS_RATIO:g} times the recent training loss {recent_train:.4f}",
                     f"{val_loss:.6f}")
    return Verdict(State.WARMUP if previous is None else State.OK)
