"""Saving beside the training: what was copied from a GPU is written by a thread while the next steps are made.

One save is under way at a time: the next waits for it, and so do a stop, a rollback and the end. What a save could not
do is raised there, at the next save at the latest. A disk is often full for minutes only, so a save is tried again.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from apr.errors import DeviceFault, StorageError

RETRY_SECONDS = (1.0, 10.0)  # between tries


class Saver:
    """Makes saves, one at a time. `note` is told, in the thread of its owner, what went wrong meanwhile.

    Use as a context manager.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="apr-save")
        self._under_way: Future[None] | None = None
        self._said: list[str] = []

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The run is over, and so must its writing be; but a process that lost its device is to end at once."""
        self._thread.shutdown(wait=kind is None or not issubclass(kind, DeviceFault))

    def save(self, write: Callable[[], None], beside: bool, again: bool = True) -> None:
        """Call `write`, in the thread if `beside`, and more than once if it fails and `again`.

        Raises what the save before could not do, and StorageError when this one cannot be made, unless `beside`.
        """
        self.finish()
        tries = RETRY_SECONDS if again else ()
        if beside:
            self._under_way = self._thread.submit(self._write, write, tries, self._said.append)
        else:
            self._write(write, tries, self.note)

    def finish(self) -> None:
        """Wait for the save that is under way. Raises what it could not do."""
        try:
            if (future := self._under_way) is not None:
                self._under_way = None
                future.result()
        finally:
            self.tell()

    def tell(self) -> None:
        """Hand on what went wrong in the thread so far."""
        while self._said:
            self.note(self._said.pop(0))

    def _write(self, write: Callable[[], None], tries: tuple[float, ...], say: Callable[[str], None]) -> None:
        for wait in tries:
            try:
                return write()
            except StorageError as e:
                with suppress(StorageError):  # the log may be on that disk
                    say(f"not saved: {e}; again in {wait:g} s")
                time.sleep(wait)
        return write()
