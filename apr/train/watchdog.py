"""The watchdog of a step: a thread that ends the process when a step does not end.

A kernel that waits for what never comes holds the main thread in a call that no signal and no exception gets out of.
So the process says what hung, writes its log's last event, and ends without asking the device for anything; the newest
checkpoint is as it was. Calls into CUDA give up the interpreter's lock, without which this thread could not run.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from apr.errors import DeviceFault

LOOKS = 4  # within the time that a step may take: a step itself only stores two numbers


class Watchdog:
    """Ends the process with a DeviceFault's line and exit code when a step takes more than `seconds`; 0: never.

    `doing` says what the device was given last. Use as a context manager.
    """

    def __init__(self, seconds: float, doing: Callable[[], str]) -> None:
        self.seconds, self.doing = seconds, doing
        self._watched: tuple[float, int, Callable[[str], None]] | None = None
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            threading.Thread(target=self._watch, name="apr-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @contextmanager
    def step(self, step: int, hung: Callable[[str], None]) -> Iterator[None]:
        """Watch the block, which is this step; `hung` is told before the process ends."""
        self._watched = time.monotonic() + self.seconds, step, hung
        try:
            yield
        finally:
            self._watched = None

    def _watch(self) -> None:
        while not self._over.wait(self.seconds / LOOKS):
            watched = self._watched
            if watched is not None and time.monotonic() >= watched[0]:
                self._end(*watched[1:])

    def _end(self, step: int, hung: Callable[[str], None]) -> None:
        error = DeviceFault(f"step {step}", f"its end within {self.seconds:g} s (--step-timeout)",
                            f"none{self.doing()}", "the process ends; resume from the last checkpoint")
        print(f"apr: {error}", file=sys.stderr, flush=True)
        try:
            hung(str(error))
        finally:
            os._exit(error.exit_code)
