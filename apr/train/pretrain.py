"""PretrainLoop: epochs of steps, validation, guards, early stopping, checkpoints. Policy only; the work is done by what
it is given, so that the same loop drives the NumPy trainer, the GPU trainer and the synthetic stand-ins.

An epoch is `steps_per_epoch` steps, not a pass over the data. After each: validation, guards, then the checkpoint, so
that no model that failed a guard is ever saved. A step may be started before the guards have seen the one before it, as
the device itself applies nothing that is not finite; none is under way at a validation, a checkpoint, a stop, the end.
What follows on a tripped guard is RecoverFn's to say: the end of the run, or an earlier state to go on from.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from apr.config import TransformerTrainConfig, require
from apr.errors import DeviceFault, GateError, OutOfMemoryError, Stopped, StorageError
from apr.train.base import StepStats
from apr.train.flight import Flight, StepFn
from apr.train.guards import WINDOW, State, Verdict, judge_init, judge_initial, judge_step, judge_val
from apr.train.log import Event, Sink
from apr.train.schedule import lr_at
from apr.train.watchdog import Watchdog

RECENT = 10  # training losses that validation is held against
ON_DIVERGENCE = ("stop", "rollback")


class ValFn(Protocol):
    """Measures validation loss."""

    def validate(self, epoch: int) -> float:
        """Mean loss in nats per token on the held-out data; epoch -1 is before the first step."""


@dataclass(frozen=True)
class EpochArtifact:
    """What is known of a finished epoch; the fields of upstream's epoch-NNN.metadata.json."""

    epoch: int
    train_loss: float
    val_loss: float
    train_ppl: float
    val_ppl: float
    optimizer_state_sha: str | None
    wall_seconds: float
    tokens_seen: int
    grad_norm_max: float


class CheckpointFn(Protocol):
    """Keeps the model and the state of the run."""

    def save(self, artifact: EpochArtifact | None, state: "LoopState") -> None:
        """Save a resumable checkpoint, and the epoch's artifact if one is finished; perhaps beside what follows."""

    def finish(self) -> None:
        """Wait until what was saved is safe. Raises StorageError when it could not be saved."""

    def optimizer_state_sha256(self) -> str | None:
        """The hash of the real optimizer state, None where there is none (synthetic)."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Policy of a run. Defaults are upstream's.

    `max_skips`: steps of the run that may be passed over because their loss or norm is not finite; `on_divergence`:
    whether a tripped guard ends the run, or takes it back to its newest checkpoint and past the data since.
    """

    steps_per_epoch: int = 100
    target_val_loss: float = 3.0
    patience: int = 5
    min_epochs: int = 3
    max_skips: int = 0
    on_divergence: str = "stop"

    def __post_init__(self) -> None:
        require("max_skips", self.max_skips, "0 or more", self.max_skips >= 0)
        require("on_divergence", self.on_divergence, "one of " + ", ".join(ON_DIVERGENCE),
                self.on_divergence in ON_DIVERGENCE)
        require("steps_per_epoch", self.steps_per_epoch, "at least 1", self.steps_per_epoch >= 1)
        require("min_epochs", self.min_epochs, "at least 1", self.min_epochs >= 1)
        require("patience", self.patience, "0 or more", self.patience >= 0)
        require("target_val_loss", self.target_val_loss, "positive and finite", 0 < self.target_val_loss < math.inf)


@dataclass
class LoopState:
    """Where a run stands: all that resuming needs besides weights and optimizer. `step` counts finished steps."""

    step: int = 0
    epoch: int = 0
    tokens_seen: int = 0
    initial_val_loss: float | None = None
    val_losses: list[float] = field(default_factory=list)
    worse_epochs: int = 0
    losses: list[float] = field(default_factory=list)  # the last WINDOW
    epoch_loss_sum: float = 0.0
    epoch_tokens: int = 0
    epoch_grad_norm_max: float = 0.0
    epoch_seconds: float = 0.0
    wall_seconds: float = 0.0
    skipped: int = 0  # steps whose loss or norm was not finite
    passed_over: list[tuple[int, int]] = field(default_factory=list)  # batches, first and last, that rollbacks skipped


def batch_of(step: int, passed_over: list[tuple[int, int]]) -> int:
    """The number of the batch that a step trains on: its own, moved on by every range before it that is passed over."""
    batch = step
    for first, last in passed_over:
        batch += (last - first + 1) if batch >= first else 0
    return batch


class Tripped(GateError):
    """A guard that tripped at `step`, on a validation loss or (None) on the numbers of that step."""

    def __init__(self, verdict: Verdict, step: int, val_loss: float | None) -> None:
        super().__init__(f"{verdict.gate} at step {step}", verdict.expected, verdict.found, verdict.fix)
        self.step, self.val_loss = step, val_loss


class RecoverFn(Protocol):
    """Says what follows on a tripped guard."""

    def recover(self, tripped: Tripped, begin: int, made: Sequence[StepStats]) -> LoopState:
        """The state to go on from, in which the trainer is by then; `made`: the steps since the checkpoint of `begin`.

        Raises GateError to end the run, DeviceFault when the same steps do not give the same numbers.
        """


def checkpoint_event(step: int, artifact: dict[str, Any] | None) -> Event:
    """The event that follows a saved checkpoint; resuming repeats it, since the log is cut back to before it."""
    return {"event": "checkpoint", "step": step, **(artifact or {})}


class PretrainLoop:
    """Runs a training to its end; `emit` takes every event, `stop_requested` is asked after each step.

    `fresh`: the weights are random. `from_init`: they were given, and must show it before the first step (judge_init)
    unless `force_init_loss`.
    """

    def __init__(self, config: LoopConfig, train: TransformerTrainConfig, vocab_size: int, fresh: bool, step_fn: StepFn,
                 val_fn: ValFn, checkpoint_fn: CheckpointFn, emit: Sink, stop_requested: Callable[[], str | None],
                 state: LoopState | None = None, *, from_init: bool = False, force_init_loss: bool = False,
                 recover_fn: RecoverFn | None = None, watchdog: Watchdog | None = None) -> None:
        self.config, self.train, self.vocab_size, self.fresh = config, train, vocab_size, fresh
        self.val_fn, self.checkpoint_fn = val_fn, checkpoint_fn
        self.flight = Flight(step_fn, lambda step: lr_at(train, step))
        self.emit, self.stop_requested = emit, stop_requested
        self.from_init, self.force_init_loss = from_init, force_init_loss
        self.state = state or LoopState()
        self.recover_fn, self.watchdog = recover_fn, watchdog
        self.made: list[StepStats] = []  # steps since the last checkpoint, which is of step saved_at
        self.saved_at = self.state.step

    def run(self) -> dict[str, Any]:
        """Run to the end; returns the `end` event.

        Raises GateError when a guard trips (after an `end` event ABORTED) and Stopped on request (STOPPED, checkpoint
        written); StorageError when nothing can be written, perhaps not even that event.
        """
        s = self.state
        try:
            if s.initial_val_loss is None:
                s.initial_val_loss = self._validate(-1)
                self._judge_start(s.initial_val_loss)
                self._save(None)  # a full disk or a wrong permission shows now, not after an epoch
            ended = self._decision(exhausted=False)  # a finished run that is resumed is finished
            while ended is None:
                ended = self._recovering_epoch()
            self.checkpoint_fn.finish()
            return self._end(*ended)
        except GateError as e:
            self.flight.abandon()
            self._end("ABORTED", str(e))
            raise
        except StorageError as e:
            self.flight.abandon()
            with suppress(StorageError):
                self._end("ABORTED", str(e))
            raise
        except (DeviceFault, OutOfMemoryError) as e:
            self._end("ABORTED", str(e))
            raise
        except Stopped as e:
            self._end("STOPPED", str(e))
            raise

    def _judge_start(self, val_loss: float) -> None:
        self._require(judge_initial(val_loss, self.vocab_size, self.fresh))
        verdict = judge_init(val_loss, self.vocab_size)
        if self.from_init and verdict.tripped and self.force_init_loss:
            self.emit({"event": "note", "step": self.state.step,
                       "text": f"{verdict.gate} is passed over (--force-init-loss): expected {verdict.expected}, "
                               f"found {verdict.found}"})
        elif self.from_init:
            self._require(verdict)

    def _recovering_epoch(self) -> tuple[str, str] | None:
        try:
            return self._epoch()
        except Tripped as e:
            self.flight.abandon()
            self.checkpoint_fn.finish()
            if self.recover_fn is None:
                raise
            self.state = self.recover_fn.recover(e, self.saved_at, self.made)
            self.made, self.flight.exhausted = [], False
            return None

    def _epoch(self) -> tuple[str, str] | None:
        """One epoch, or what is left of it; the run's end as (status, detail), or None to go on."""
        s, exhausted = self.state, False
        last = min((s.epoch + 1) * self.config.steps_per_epoch, self.train.max_steps)
        while s.step < last and not exhausted:
            exhausted = not self._step(last)
            while self.flight.under_way and self.stop_requested() is not None:
                self._step(s.step)  # what was started is finished, and nothing more is started
            if s.step < last:
                self._stop_if_asked(save=not exhausted)
        if s.epoch_tokens:
            self._finish_epoch()
        elif s.step >= last and not exhausted:
            self._require(Verdict(State.TRIP, "INV-TRAIN-007", "a step of the epoch that was applied", "none"))
        ended = self._decision(exhausted)
        if ended is None:
            self._stop_if_asked(save=False)
        return ended

    def _stop_if_asked(self, save: bool) -> None:
        if (name := self.stop_requested()) is not None:
            if save:
                self._save(None)
            self.checkpoint_fn.finish()
            raise Stopped(f"step {self.state.step}", "the run to go on", name, "continue with --resume")

    def _step(self, end: int) -> bool:
        """One step and its guards; False when the data is exhausted. Steps before `end` may be started meanwhile."""
        s = self.state
        with nullcontext() if self.watchdog is None else self.watchdog.step(s.step, self._hung):
            finished = self.flight.finish(s.step, end)
        if finished is None:
            return False
        stats, seconds = finished
        self.made.append(stats)
        if self._skip(stats):
            return True
        rate, wall_ms = stats.tokens / seconds, seconds * 1000
        verdict = judge_step(stats.loss, stats.grad_norm, stats.lr, rate, wall_ms, s.losses)
        self._require(verdict)
        s.tokens_seen += stats.tokens
        self.emit({"event": "step", "step": s.step, "train_loss": stats.loss, "grad_norm": stats.grad_norm,
                   "lr": stats.lr, "tokens_per_sec": round(rate, 1), "wall_ms": round(wall_ms, 3),
                   "tokens_seen": s.tokens_seen})
        s.step += 1
        s.losses = [*s.losses[1 - WINDOW:], stats.loss]
        s.epoch_loss_sum += stats.loss * stats.tokens
        s.epoch_tokens += stats.tokens
        s.epoch_grad_norm_max = max(s.epoch_grad_norm_max, stats.grad_norm)
        s.epoch_seconds += seconds
        s.wall_seconds += seconds
        return True

    def _skip(self, stats: StepStats) -> bool:
        """Whether a step is passed over: without a target it has no loss, and so many may have one that is no number.
        """
        s, finite = self.state, math.isfinite(stats.loss) and math.isfinite(stats.grad_norm)
        if stats.tokens and (finite or s.skipped >= self.config.max_skips):
            return False
        s.skipped += stats.tokens > 0
        self.emit({"event": "skip", "step": s.step, "batch": batch_of(s.step, s.passed_over), "train_loss": stats.loss,
                   "grad_norm": stats.grad_norm, "tokens": stats.tokens, "skipped": s.skipped})
        s.step += 1
        return True

    def _hung(self, text: str) -> None:
        with suppress(StorageError):
            self._end("ABORTED", text)

    def _finish_epoch(self) -> None:
        s = self.state
        val_loss, previous = self._validate(s.epoch), s.val_losses[-1] if s.val_losses else s.initial_val_loss
        recent = sum(s.losses[-RECENT:]) / RECENT if len(s.losses) >= RECENT else None
        self._require(judge_val(val_loss, previous, self.vocab_size, recent), val_loss)
        s.worse_epochs = 0 if val_loss < min(s.val_losses, default=math.inf) else s.worse_epochs + 1
        s.val_losses.append(val_loss)
        train_loss = s.epoch_loss_sum / s.epoch_tokens
        artifact = EpochArtifact(s.epoch, train_loss, val_loss, math.exp(train_loss), math.exp(val_loss),
                                 self.checkpoint_fn.optimizer_state_sha256(), s.epoch_seconds, s.tokens_seen,
                                 s.epoch_grad_norm_max)
        s.epoch += 1
        s.epoch_loss_sum, s.epoch_tokens, s.epoch_grad_norm_max, s.epoch_seconds = 0.0, 0, 0.0, 0.0
        self._save(artifact)

    def _decision(self, exhausted: bool) -> tuple[str, str] | None:
        """Whether the run is over, from its state alone: (status, detail), or None."""
        s = self.state
        if s.val_losses and s.epoch_tokens == 0 and s.epoch >= self.config.min_epochs:
            if s.val_losses[-1] <= self.config.target_val_loss:
                return "OK", f"converged: val_loss {s.val_losses[-1]:.4f} <= target {self.config.target_val_loss:g}"
            if s.worse_epochs > self.config.patience:
                return "EARLY_STOP", f"val_loss has not improved for {s.worse_epochs} epochs"
        if s.step >= self.train.max_steps and s.epoch_tokens == 0:
            return "OK", f"all {s.step} steps done"
        if exhausted:
            return "EXHAUSTED", f"no data left after step {s.step}; allow another pass with --allow-shard-cycle"
        return None

    def _validate(self, epoch: int) -> float:
        start = time.perf_counter()
        val_loss = self.val_fn.validate(epoch)
        self.state.wall_seconds += time.perf_counter() - start
        self.emit({"event": "eval", "step": self.state.step, "epoch": epoch, "val_loss": val_loss})
        return val_loss

    def _save(self, artifact: EpochArtifact | None) -> None:
        self.checkpoint_fn.save(artifact, self.state)
        self.made, self.saved_at = [], self.state.step
        self.emit(checkpoint_event(self.state.step, asdict(artifact) if artifact else None))

    def _require(self, verdict: Verdict, val_loss: float | None = None) -> None:
        if verdict.tripped:
            self.emit({"event": "guard", "step": self.state.step, "gate": verdict.gate, "expected": verdict.expected,
                       "found": verdict.found})
            raise Tripped(verdict, self.state.step, val_loss)

    def _end(self, status: str, detail: str) -> dict[str, Any]:
        s = self.state
        event = {"event": "end", "status": status, "detail": detail, "initial_val_loss": s.initial_val_loss,
                 "final_val_loss": s.val_losses[-1] if s.val_losses else None, "epochs_completed": s.epoch,
                 "steps_recorded": s.step, "val_loss_history": s.val_losses, "tokens_seen": s.tokens_seen,
                 "wall_seconds": round(s.wall_seconds, 3)}
        self.emit(event)
        return event
