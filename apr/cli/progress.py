"""What a person sees of a run: a live line on a terminal, plain lines elsewhere; and events as JSON for programs."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from apr.train.log import Event, to_line

QUIET_SECONDS = 30.0  # between lines about steps when there is no terminal


def print_json(event: Event) -> None:
    """The event as a line on stdout."""
    print(to_line(event), flush=True)


def kernels(event: Event) -> str:
    """Which kernels run where there are several: "; kernels: attention general", or nothing."""
    taken = ", ".join(f"{op} {path}" for op, path in event.get("path", {}).items())
    return taken and f"; kernels: {taken}"


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A function to call once for each of `total` things; on a terminal a bar on stderr shows how many are done."""
    console = Console(file=sys.stderr)
    with Progress(TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(24), console=console,
                  transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda name: progress.advance(task)


class Display:
    """A sink for a run's events. On a terminal: a bar with loss, rate and time left; else a line now and then."""

    def __init__(self, stream: TextIO) -> None:
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self.progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(12), TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(), TextColumn("left"), console=self.console, disable=not self.console.is_terminal)
        self.task: TaskID | None = None
        self.steps = 0
        self.last_line = time.monotonic()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None,
                 _trace: TracebackType | None) -> None:
        self.progress.stop()

    def warn(self, text: str) -> None:
        """A line that must be seen."""
        self.console.print(text, markup=False)

    def __call__(self, event: Event) -> None:
        """Show an event."""
        kind = event["event"]
        if kind == "start":
            self.steps = event["max_steps"]
            made_up = " with made-up losses (--synthetic)" if event["synthetic"] else ""
            self.warn(f"training on {event['device']}{made_up}: {event['max_steps']} steps "
                      f"of {event['tokens_per_step']} tokens{kernels(event)}")
        elif kind == "step":
            self._step(event)
        elif kind == "eval":
            where = "before training" if event["epoch"] < 0 else f"epoch {event['epoch']}, step {event['step']}"
            self.warn(f"{where}: val_loss {event['val_loss']:.4f}")
        elif kind == "note":
            self.warn(event["text"])
        elif kind == "skip":
            self.warn(f"step {event['step']} is passed over: loss {event['train_loss']}, norm {event['grad_norm']}, "
                      f"{event['tokens']} targets")
        elif kind == "rollback":
            first, last = event["passed_over"][-1]
            self.warn(f"back to step {event['step']}, and past batches {first} to {last}: {event['where']}: "
                      f"expected {event['expected']}, found {event['found']}")
        elif kind == "resume":
            self.warn(f"resumed from {event['checkpoint']}{kernels(event)}")

    def _step(self, event: Event) -> None:
        numbers = f"loss {event['train_loss']:.4f} lr {event['lr']:.1e} {event['tokens_per_sec']:,.0f} tok/s"
        if self.console.is_terminal:
            if self.task is None:
                self.progress.start()
                self.task = self.progress.add_task("", total=self.steps or None, completed=event["step"],
                                                   numbers=numbers)
            self.progress.update(self.task, completed=event["step"] + 1, numbers=numbers)
        elif time.monotonic() - self.last_line >= QUIET_SECONDS:
            self.last_line = time.monotonic()
            print(f"step {event['step']}  {numbers}", file=self.console.file or sys.stderr, flush=True)
