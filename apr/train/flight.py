"""Steps under way: a GPU is given its next step before the numbers of the last are read, so that it never waits.

How many is the trainer's to say (Trainer.ahead). Who asks for a step's numbers gets them in order, with
the seconds since those of the step before, or since its own start where nothing was under way then.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from apr.errors import AprError
from apr.train.base import StartedStep, StepStats


class StepFn(Protocol):
    """Makes optimizer steps."""

    def start(self, step: int, lr: float) -> StartedStep | None:
        """Start to train on the batch of `step` with `lr`; None when the data is exhausted (INV-TRAIN-011)."""

    def ahead(self, step: int) -> int:
        """How many steps may be under way when `step` is started."""


class Flight:
    """The steps of `step_fn` that were started and not finished; `rate` gives the learning rate of a step."""

    def __init__(self, step_fn: StepFn, rate: Callable[[int], float]) -> None:
        self.step_fn, self.rate = step_fn, rate
        self.under_way: deque[tuple[StartedStep, float]] = deque()
        self.exhausted = False
        self.finished_at = 0.0

    def finish(self, step: int, end: int) -> tuple[StepStats, float] | None:
        """The numbers of `step`, the oldest under way or the next to start, and its seconds; None without data.

        What may be started before them is, up to step end - 1. Raises what the steps raise.
        """
        while self._may_start(step + len(self.under_way), end):
            begin = time.perf_counter()
            started = self.step_fn.start(step + len(self.under_way), self.rate(step + len(self.under_way)))
            if started is None:
                self.exhausted = True
            else:
                self.under_way.append((started, begin))
        if not self.under_way:
            return None
        started, begin = self.under_way[0]
        stats, now = started.result(), time.perf_counter()
        self.under_way.popleft()
        seconds, self.finished_at = now - max(begin, self.finished_at), now
        return stats, seconds

    def abandon(self) -> None:
        """Wait for what was started, and forget it: the run is over. Its memory is still being written until then."""
        with suppress(AprError):
            for started, _ in self.under_way:
                started.result()
        self.under_way.clear()

    def _may_start(self, step: int, end: int) -> bool:
        return not self.exhausted and step < end and len(self.under_way) <= self.step_fn.ahead(step)
