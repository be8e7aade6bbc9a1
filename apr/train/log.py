"""train.jsonl: one JSON object a line, each with an `event`; and the sinks that see the same events.

    start       what is trained on what, by which kernels
    step        step, train_loss, grad_norm, lr, tokens_per_sec, wall_ms, tokens_seen
    parity      step, layer, sequence, positions, worst, checks, gradient, ms: held against the reference
    eval        step, epoch, val_loss                 checkpoint, guard, resume, note
    skip        step, batch, train_loss, grad_norm, tokens, skipped: not applied, passed over
    rollback    step, from_step, where, expected, found, passed_over: back to a checkpoint, past the data since
    end         status, detail, initial_val_loss, final_val_loss, …

Losses are nats per token. A resumed run cuts the file back to where its checkpoint stood, so no step is listed twice.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apr.errors import FormatError
from apr.files import fsync_dir, open_appending, os_errors

Event = dict[str, Any]
Sink = Callable[[Event], None]
NAME = "train.jsonl"


def to_line(event: Event) -> str:
    """An event as one line of JSON; NaN and infinities, which JSON cannot say, become "nan", "inf", "-inf"."""
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
    return json.dumps(plain, allow_nan=False)


class RunLog:
    """The log file of a run; calling it with an event writes a line and hands the event to the other sinks."""

    def __init__(self, run_dir: Path, sinks: list[Sink], keep_bytes: int | None = None) -> None:
        self.path, self.sinks = run_dir / NAME, sinks
        with os_errors(str(self.path)):
            self.file = open_appending(self.path)
            if keep_bytes is not None:
                if (size := self.size()) < keep_bytes:
                    self.file.close()
                    raise FormatError(str(self.path), f"at least {keep_bytes} bytes", f"{size}",
                                      "restore the log, or start a new run")
                self.file.truncate(keep_bytes)
            try:
                fsync_dir(run_dir)
            except OSError:
                self.file.close()
                raise

    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self.file.fileno()).st_size

    def __call__(self, event: Event) -> None:
        """Write the event. Raises StorageError."""
        with os_errors(str(self.path)):
            self.file.write(to_line(event).encode() + b"\n")
            self.file.flush()
        for sink in self.sinks:
            sink(event)

    def cut(self, size: int) -> None:
        """Forget what was written after the first `size` bytes. Raises StorageError."""
        with os_errors(str(self.path)):
            os.ftruncate(self.file.fileno(), size)

    def sync(self) -> int:
        """Make the file durable; returns its size."""
        with os_errors(str(self.path)):
            os.fsync(self.file.fileno())
        return self.size()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        with os_errors(str(self.path)):
            self.file.close()


class Notes:
    """Takes lines of text at any time: they become `note` events, those from before there was a log when it opens."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.sink: Sink | None = None
        self.step = 0

    def __call__(self, text: str) -> None:
        """Note a line."""
        if self.sink is None:
            self.waiting.append(text)
        else:
            self.sink({"event": "note", "step": self.step, "text": text})

    def open(self, sink: Sink, step: int) -> None:
        """Send what waited, and all that comes, to `sink`, under the number of this step."""
        self.sink, self.step = sink, step
        waiting, self.waiting = self.waiting, []
        for text in waiting:
            self(text)
