"""The kernel cache on disk: one file per entry, believed only as far as it proves itself.

    file    b"APRKERN1", 8 bytes: length of the JSON, JSON {key, meta}, cubin, SHA-256 of all before it

A cubin is code that runs with the user's data, and a checksum proves nothing about who wrote it: what counts is that
nobody else can write the folder. So the folder is the user's own, no link, not writable by others, and is opened once;
everything after goes through that handle. Any doubt or any failing call means: compile, say so once, count, go on.
"""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr.errors import AprError
from apr.strict import parse_json

MAGIC, SUFFIX = b"APRKERN1", ".kernel"
MAX_BYTES = 64 << 20
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Entry:
    """A compiled module: its key, what it was made of and what it uses, the cubin."""

    key: str
    meta: dict[str, Any]
    image: bytes

    def encode(self) -> bytes:
        """The bytes of the file."""
        text = json.dumps({"key": self.key, "meta": self.meta}).encode()
        body = MAGIC + len(text).to_bytes(8, "little") + text + self.image
        return body + hashlib.sha256(body).digest()


def decode(data: bytes) -> Entry | str:
    """The entry of a file's bytes, or in a word what is wrong with them."""
    if len(data) < 48 or data[:8] != MAGIC:
        return "not a kernel cache entry"
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        return "damaged (its SHA-256 differs)"
    end = 16 + int.from_bytes(data[8:16], "little")
    if end > len(data) - 32:
        return "damaged (its header is longer than the file)"
    try:
        header = parse_json(data[16:end], "kernel cache entry")
        return Entry(str(header["key"]), dict(header["meta"]), data[end:-32])
    except (AprError, KeyError, TypeError, ValueError):
        return "damaged (its header is not readable)"


class PtxStore:
    """A folder of entries. `folder` None, or one that cannot be trusted or used, means a private one that ends with
    the process; `path` says which it is.
    """

    def __init__(self, folder: Path | None, warn: Callable[[str], None], rejected: Callable[[], None]) -> None:
        self.warn, self.rejected = warn, rejected
        self.private: tempfile.TemporaryDirectory[str] | None = None
        self.handle = -1
        reason = "no home folder" if folder is None else ""
        if folder is not None:
            try:
                self.handle, reason = open_folder(folder)
            except OSError as e:
                reason = e.strerror or str(e)
        self.path = folder
        if self.handle < 0:
            self.private = tempfile.TemporaryDirectory(prefix="apr-cache-")
            self.path = Path(self.private.name)
            self.handle, _ = open_folder(self.path)
            rejected()
            warn(f"kernel cache: {folder} is not used ({reason}); kernels are kept for this process only")

    def read(self, key: str) -> Entry | None:
        """The entry of this key, or None: not there, not sound, not the user's, or of another key."""
        problem = ""
        try:
            descriptor = os.open(key + SUFFIX, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                                 dir_fd=self.handle)
        except FileNotFoundError:
            return None
        except OSError as e:
            problem = e.strerror or str(e)
        else:
            with os.fdopen(descriptor, "rb") as f:
                found = _read_trusted(f)
            if isinstance(found, Entry) and found.key == key:
                return found
            problem = found if isinstance(found, str) else f"it holds {found.key}"
        self.rejected()
        self.warn(f"kernel cache: entry {key} is not used ({problem}) and is built again")
        return None

    def write(self, entry: Entry) -> None:
        """Publish an entry, whole or not at all. Failure is no error: the caller has the build."""
        temporary = f".{os.getpid()}-{os.urandom(8).hex()}.tmp"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600,
                                 dir_fd=self.handle)
            try:
                with os.fdopen(descriptor, "wb") as f:
                    f.write(entry.encode())
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(temporary, entry.key + SUFFIX, src_dir_fd=self.handle, dst_dir_fd=self.handle)
            except OSError:
                os.unlink(temporary, dir_fd=self.handle)
                raise
        except OSError as e:
            self.warn(f"kernel cache: {self.path} cannot be written ({e.strerror or e}); kernels will be compiled "
                      "again next time")

    def discard(self, key: str) -> None:
        """Remove an entry, if that can be done."""
        try:
            os.unlink(key + SUFFIX, dir_fd=self.handle)
        except OSError:
            return

    def names(self) -> list[str]:
        """The keys that have a file, sorted."""
        return sorted(n.removesuffix(SUFFIX) for n in os.listdir(self.handle) if n.endswith(SUFFIX))

    def leftovers(self) -> list[str]:
        """Temporary files that killed processes left."""
        return sorted(n for n in os.listdir(self.handle) if n.endswith(".tmp"))

    def entries(self) -> Iterator[tuple[str, Entry | str]]:
        """Every key with its entry, or with what is wrong with it."""
        for key in self.names():
            try:
                descriptor = os.open(key + SUFFIX, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                                     dir_fd=self.handle)
            except OSError as e:
                yield key, e.strerror or str(e)
                continue
            with os.fdopen(descriptor, "rb") as f:
                found = _read_trusted(f)
            yield key, found if isinstance(found, str) or found.key == key else f"it holds {found.key}"


def open_folder(folder: Path) -> tuple[int, str]:
    """A handle of the folder, made if missing; or (-1, why it is not to be trusted). Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    info = os.fstat(handle)
    if info.st_uid != os.geteuid():
        reason = f"it belongs to user {info.st_uid}"
    elif info.st_mode & OTHERS_WRITE:
        reason = "others may write in it"
    else:
        return handle, ""
    os.close(handle)
    return -1, reason


def _read_trusted(f: Any) -> Entry | str:
    """The entry of an open file that is regular, the user's own, closed to others and of a sane size."""
    info = os.fstat(f.fileno())
    if not stat.S_ISREG(info.st_mode):
        return "not a regular file"
    if info.st_uid != os.geteuid():
        return f"it belongs to user {info.st_uid}"
    if info.st_mode & OTHERS_WRITE:
        return "others may write to it"
    if info.st_size > MAX_BYTES:
        return f"{info.st_size} bytes, more than {MAX_BYTES}"
    try:
        return decode(f.read(MAX_BYTES))
    except OSError as e:
        return e.strerror or str(e)
