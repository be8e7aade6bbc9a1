"""After a guard tripped: is it the device, or the data and the run? Then the end, or an earlier state to go on from.

A run is repeatable to the last bit, so the answer is to make its steps again: from the newest checkpoint on they must
give the same numbers. If one does not, the device or its memory is at fault, and nothing since that checkpoint is to
be believed. If they do, a number that is not finite is followed to the first point of the model where it appears, and
the run ends; or, where it was asked to, it goes on from the checkpoint, past the data that led here.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from apr.data.batch import LMBatch
from apr.errors import AprError, DeviceFault, GateError
from apr.taps import split_name
from apr.train import checkpoint
from apr.train.base import StepStats, Trainer
from apr.train.log import RunLog
from apr.train.pretrain import LoopState, Tripped, batch_of, checkpoint_event
from apr.train.real_run import RealRun, SavedState, saved_state

ROLLBACKS = 3  # of a run: data that diverge again and again are no accident


class Recovery:
    """RecoverFn of a run on real data: `work` is its trainer, corpus and folder."""

    def __init__(self, work: RealRun, log: RunLog) -> None:
        self.work, self.log = work, log

    def recover(self, tripped: Tripped, begin: int, made: Sequence[StepStats]) -> LoopState:
        """Make the steps again, then end the run or take it back; see RecoverFn."""
        self.log({"event": "note", "step": tripped.step,
                  "text": f"{tripped}: {len(made)} steps are made again from the checkpoint of step {begin}, to tell a "
                          "fault of the device from one of the data"})
        try:
            found = checkpoint.read_checkpoint(self.work.ckpt_dir / checkpoint.name_of(begin))
        except AprError as e:
            raise GateError(tripped.where, tripped.expected, f"{tripped.found}; not made again, for {e}",
                            tripped.fix) from None
        saved, past = saved_state(found), self.work.passed_over
        first, last = (batch_of(step, past) for step in (begin, begin + len(made) - 1))
        where = f"{tripped.where} (batch {last})"
        self.work.restore(found, saved)
        self._again(begin, made, tripped.val_loss)
        why = f"{tripped.found}, and again when made again from step {begin}" + self._origin(tripped, made, begin)
        if self.work.config.loop.on_divergence == "stop" or len(past) >= ROLLBACKS:
            why += f", after {len(past)} rollbacks" if past else ""
            raise GateError(where, tripped.expected, why, tripped.fix)
        self.work.restore(found, saved)
        self.work.passed_over = [*past, (first, last)]
        return self._back(saved, tripped, where, why)

    def _again(self, begin: int, made: Sequence[StepStats], val_loss: float | None) -> None:
        """Make the steps again. Raises DeviceFault for the first that gives other numbers."""
        for step, before in enumerate(made, begin):
            now = self.work.again(step, before.lr)
            self._compare(f"step {step}", (before.loss, before.grad_norm), (now.loss, now.grad_norm), begin)
        if val_loss is not None:
            self._compare("the validation", (val_loss,), (self.work.validate(0),), begin)

    def _compare(self, what: str, before: tuple[float, ...], now: tuple[float, ...], begin: int) -> None:
        if any(a != b and not (math.isnan(a) and math.isnan(b)) for a, b in zip(before, now, strict=True)):
            raise DeviceFault(f"{what}, made again from step {begin}", f"the numbers of the first time {before}",
                              f"{now}", "the device or its memory computes wrongly: resume from the last checkpoint on "
                                        "another one")

    def _origin(self, tripped: Tripped, made: Sequence[StepStats], begin: int) -> str:
        """Where a number that is not finite comes from, as far as it can be seen."""
        last = made[-1] if made else None
        if tripped.val_loss is not None and not math.isfinite(tripped.val_loss):
            batches: Sequence[LMBatch] = self.work.corpus.heldout
        elif tripped.val_loss is None and last is not None and not math.isfinite(last.loss + last.grad_norm):
            batches = self.work.micro(begin + len(made) - 1)
        else:
            return ""
        return f"; {first_not_finite(self.work.trainer, batches)}"

    def _back(self, saved: SavedState, tripped: Tripped, where: str, why: str) -> LoopState:
        """The state of the checkpoint, past what is passed over by now; the log is cut back to it, and says why."""
        past = self.work.passed_over
        self.log.cut(saved.log_bytes)
        self.log(checkpoint_event(saved.step, saved.artifact))
        self.log({"event": "rollback", "step": saved.step, "from_step": tripped.step, "where": where,
                  "expected": tripped.expected, "found": why, "passed_over": past})
        return replace(saved.loop, passed_over=past)


def first_not_finite(trainer: Trainer, batches: Sequence[LMBatch]) -> str:
    """The first thing that is not finite in a pass over these batches, in the order in which a pass makes things."""
    for name, array in trainer.params.items():
        if not np.isfinite(array).all():
            return f"first not finite: parameter {name}, already before the step"
    found: list[str] = []

    def look(name: str, array: np.ndarray) -> None:
        if not found and not (finite := np.isfinite(array)).all():
            stage, layer, grad = split_name(name)
            at = [int(i) for i in np.unravel_index(int(np.argmin(finite)), array.shape)]
            found.append(f"first not finite: {'gradient at ' if grad else ''}"
                         f"{'' if layer is None else f'layer {layer}, '}{stage.name} ({stage.meaning}), "
                         f"{array[tuple(at)]} at {at}")

    tokens = sum(b.num_tokens for b in batches)
    with np.errstate(all="ignore"):
        for number, batch in enumerate(batches):
            trainer.gradients(batch, 1.0 / tokens, look)
            if found:
                return found[0] + (f" of micro-batch {number}" if len(batches) > 1 else "")
    return "every point of the model is finite: their sums are not"
