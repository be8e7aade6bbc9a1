"""A disk that breaks: each call by which Python writes or reads below a folder is numbered, and a Fault befalls one.

    with Disk(folder, Fault(5, errno.ENOSPC)):  the call number 5 fails            Fault(5): the process dies at it
    with Disk(folder) as disk: ...              disk.calls is then what was done, for power_loss.py

It stands in for `open` and for functions of `os`, through which pathlib, shutil and tempfile go too: no compiler,
tracer or mount is needed. Files are real; the buffers above them are Python's own.
"""

import builtins
import contextlib
import io
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from apr.errors import AprError

OS = {"open": "open", "fsync": "fsync", "rename": "rename", "replace": "rename", "mkdir": "mkdir", "unlink": "unlink",
      "remove": "unlink", "rmdir": "rmdir", "truncate": "truncate", "pread": "read"}  # function of os: kind of call
GROWING = frozenset({"open", "write", "fsync", "rename", "mkdir"})  # what a full disk refuses
WRITING = GROWING | {"unlink", "rmdir", "truncate"}
READING = frozenset({"read"})
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Call(NamedTuple):
    """A call that was made. `at`: where a write began, or the new size of a truncated file; `to`: the new name."""

    kind: str
    path: str
    data: bytes = b""
    at: int = 0
    to: str = ""


class Fault(NamedTuple):
    """What befalls the call number `at`: the error `number`, or SIGKILL where that is None, or nothing where it is 0.

    `half`: a write or read does half of its work first. `lasting`: and so does every later call.
    """

    at: int
    number: int | None = None
    half: bool = False
    lasting: bool = False


class Disk:
    """Calls of these kinds below `folder`, counted, within a `with` block. `calls` are those that were made."""

    def __init__(self, folder: Path, fault: Fault | None = None, kinds: frozenset[str] = WRITING) -> None:
        self.folder, self.fault, self.kinds = str(folder.resolve()), fault, kinds
        self.calls: list[Call] = []
        self.count = 0
        self.whole_open = builtins.open

    def __enter__(self) -> "Disk":
        with contextlib.ExitStack() as stack:
            for name, kind in OS.items():
                stack.enter_context(mock.patch.object(os, name, self._stand_in(kind, getattr(os, name))))
            for module in (builtins, io):
                stack.enter_context(mock.patch.object(module, "open", self._open))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @property
    def struck(self) -> bool:
        """Whether the fault's turn came."""
        return self.fault is not None and self.count > self.fault.at

    def promise(self, what: str) -> None:
        """Note that from here on a crash may not lose `what`."""
        self.calls.append(Call("promise", what))

    def where(self, path: object, folder: int | None = None) -> str | None:
        """A path or descriptor as a path relative to the folder ("": itself), None elsewhere."""
        text = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fsdecode(path)  # type: ignore
        if folder is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
        text = os.path.abspath(text)
        return text[len(self.folder) + 1:] if f"{text}/".startswith(f"{self.folder}/") else None

    def _due(self) -> Fault | None:
        """Count a call; the fault, if it befalls this one."""
        n, self.count = self.count, self.count + 1
        fault = self.fault
        return fault if fault and (n == fault.at or (fault.lasting and n > fault.at)) else None

    def _stand_in(self, kind: str, real: Callable) -> Callable:
        def call(path, *arguments, **options):
            where = self.where(path, options.get("dir_fd", options.get("src_dir_fd")))
            only_read = kind == "open" and not arguments[0] & TO_WRITE
            if where is None or kind not in self.kinds or only_read:
                return real(path, *arguments, **options)
            if fault := self._due():
                if kind == "read" and fault.half and arguments[0] > 1:
                    return real(path, arguments[0] // 2, *arguments[1:])
                strike(fault)
            done = real(path, *arguments, **options)
            to = self.where(arguments[0], options.get("dst_dir_fd")) if kind == "rename" else None
            at = arguments[0] if kind == "truncate" else 0
            emptied = kind == "open" and arguments[0] & os.O_TRUNC
            self.calls += [Call(kind, where, at=at, to=to or "")] + [Call("truncate", where)] * bool(emptied)
            return done
        return call

    def _open(self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        """As the built-in, through a File where that is below the folder."""
        if self.where(file) is None:
            return self.whole_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = File(self, file, "".join(c for c in mode if c not in "bt"), closefd)
        kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
        if buffering == 0:
            return raw
        file = kind(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
        return file if "b" in mode else io.TextIOWrapper(file, encoding, errors, newline)


class File(io.FileIO):
    """A file whose writes and reads the disk counts; buffers call it as they call the one of C."""

    def __init__(self, disk: Disk, file, mode: str, closefd: bool) -> None:
        super().__init__(file, mode, closefd, None if isinstance(file, int) else lambda p, f: os.open(p, f, 0o666))
        self.disk = disk

    def write(self, data) -> int:
        """Write, or as much as the fault leaves; an error comes at the next call, as that of a full disk does."""
        data, disk = memoryview(data).cast("B"), self.disk
        if "write" not in disk.kinds:
            return super().write(data)
        fault, part = disk._due(), len(data)
        if fault and fault.half and part > 1:
            part //= 2
        elif fault:
            strike(fault)
        at = self.tell()
        done = super().write(data[:part])
        disk.calls.append(Call("write", disk.where(self.fileno()) or "", bytes(data[:done]), at))
        if fault and fault.half and fault.number is None:
            strike(fault)
        if fault and fault.half and fault.number:
            disk.fault = fault._replace(at=fault.at + 1, half=False)
        return done

    def readinto(self, buffer) -> int:
        """Read, or as much as the fault leaves."""
        view = memoryview(buffer).cast("B")
        fault = self.disk._due() if "read" in self.disk.kinds else None
        if fault and fault.half and len(view) > 1:
            return super().readinto(view[:len(view) // 2])
        if fault:
            strike(fault)
        return super().readinto(view)

    def readall(self) -> bytes:
        """The rest, by readinto."""
        whole, part = b"", bytearray(1 << 16)
        while n := self.readinto(part):
            whole += part[:n]
        return whole


def strike(fault: Fault) -> None:
    """Fail as the fault says, or die."""
    if fault.number is None:
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.number:
        raise OSError(fault.number, os.strerror(fault.number))


def faults(number: int | None = None, half: bool = False, lasting: bool = False) -> Iterator[Fault]:
    """The fault at call 0, 1, 2 …; a test that takes them ends when one's turn did not come."""
    return (Fault(n, number, half, lasting) for n in range(100_000))


def end_of(action: Callable[[], object]) -> int:
    """How a child ends that runs `action`: 0, an AprError's exit code, or the negative number of a signal."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            action()
            code = 0
        except AprError as e:
            code = e.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
