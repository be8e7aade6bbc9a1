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
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apr.errors import AprError
from apr.files import PrivateFolder
from apr.strict import parse_json

MAGIC, SUFFIX, TEMPORARY = b"APRKERN1", ".kernel", ".tmp"
MAX_BYTES = 64 << 20
MAX_NAME = 255  # bytes of a file name
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # no link is followed, no FIFO waited for


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
    if end >= len(data) - 32:
        return "damaged (no code after its header)"
    try:
        header = parse_json(data[16:end], "kernel cache entry")
    except AprError:
        header = None
    if not isinstance(header, dict) or set(header) != {"key", "meta"} or not isinstance(header["key"], str) \
            or not isinstance(header["meta"], dict):
        return "damaged (its header is not readable)"
    return Entry(header["key"], header["meta"], data[end:-32])


def file_name(key: str) -> str:
    """The file of a key: the key, or its end, which holds the SHA-256, where file systems allow no more."""
    return (key + SUFFIX)[-MAX_NAME:]


class PtxStore:
    """A folder of entries. `folder` None, or one that cannot be trusted or used, means a private one that ends with
    the process; `path` says which it is, and is None where not even that could be made: then nothing is kept.
    """

    def __init__(self, folder: Path | None, warn: Callable[[str], None], rejected: Callable[[], None]) -> None:
        self.warn, self.rejected = warn, rejected
        self.private: PrivateFolder | None = None
        self.path, self.handle = folder, -1
        reason = ""
        if folder is not None:
            try:
                self.handle, reason = open_folder(folder)
            except OSError as e:
                reason = e.strerror or str(e)
        if self.handle < 0:
            self.path = None
            with contextlib.suppress(OSError):  # a full /tmp, or none
                self.private = PrivateFolder(prefix="apr-cache-")
                self.handle, _ = open_folder(Path(self.private.name))
                self.path = Path(self.private.name) if self.handle >= 0 else None
            rejected()
            what = f"{folder} is not used ({reason})" if folder is not None else \
                "there is no home folder (APR_CACHE_DIR names another place)"
            warn(f"kernel cache: {what}; kernels are kept for this process only")
        if self.handle >= 0:
            weakref.finalize(self, os.close, self.handle)

    def read(self, key: str) -> Entry | None:
        """The entry of this key, or None: not there, not sound, not the user's, or of another key."""
        found = self._read(file_name(key))
        if found is None or (isinstance(found, Entry) and found.key == key):
            return found if isinstance(found, Entry) else None
        self.refuse(key, found if isinstance(found, str) else f"it holds {found.key}")
        return None

    def refuse(self, key: str, problem: str) -> None:
        """Say and count that the entry of this key is not used."""
        self.rejected()
        self.warn(f"kernel cache: entry {key} is not used ({problem}) and is built again")

    def _read(self, name: str) -> Entry | str | None:
        """What a file holds, or what is wrong with it; None if it is not there. Never raises."""
        if self.handle < 0:
            return None
        try:
            descriptor = os.open(name, READ, dir_fd=self.handle)
        except FileNotFoundError:
            return None
        except OSError as e:
            return "it is a link" if _is_link(name, self.handle) else e.strerror or str(e)
        try:
            return _read_trusted(descriptor)
        except OSError as e:
            return e.strerror or str(e)
        finally:
            os.close(descriptor)

    def write(self, entry: Entry) -> bool:
        """Publish an entry, whole or not at all; whether it worked. Failure is no error: the caller has the build."""
        if self.handle < 0:
            return False
        temporary = f".{os.getpid()}-{os.urandom(8).hex()}{TEMPORARY}"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600,
                                 dir_fd=self.handle)
            try:
                with os.fdopen(descriptor, "wb") as f:
                    f.write(entry.encode())
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(temporary, file_name(entry.key), src_dir_fd=self.handle, dst_dir_fd=self.handle)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self.handle)
                raise
        except OSError as e:
            self.warn(f"kernel cache: {self.path} cannot be written ({e.strerror or e}); kernels will be compiled "
                      "again next time")
            return False
        return True

    def discard(self, key: str) -> bool:
        """Remove an entry, if that can be done; whether it was."""
        return self._unlink(file_name(key))

    def files(self) -> list[str]:
        """The names of the entries' files, sorted."""
        return self._listed(SUFFIX)

    def leftovers(self) -> list[str]:
        """Temporary files that killed processes left, or that others are writing now."""
        return self._listed(TEMPORARY)

    def entries(self) -> Iterator[tuple[str, Entry | str]]:
        """Every file with its entry, or with what is wrong with it."""
        for name in self.files():
            found = self._read(name)
            if isinstance(found, Entry) and file_name(found.key) != name:
                found = f"it holds {found.key}"
            yield name, "gone" if found is None else found

    def sweep(self, seconds: float) -> int:
        """Remove leftovers that are older than `seconds`; how many."""
        count = 0
        for name in self.leftovers():
            with contextlib.suppress(OSError):
                info = os.stat(name, dir_fd=self.handle, follow_symlinks=False)
                if time.time() - info.st_mtime >= seconds:
                    count += self._unlink(name)
        return count

    def clear(self) -> tuple[int, int]:
        """Remove every entry and leftover; how many of each were removed."""
        return sum(map(self._unlink, self.files())), self.sweep(float("-inf"))

    def _listed(self, suffix: str) -> list[str]:
        return sorted(n for n in os.listdir(self.handle) if n.endswith(suffix)) if self.handle >= 0 else []

    def _unlink(self, name: str) -> bool:
        try:
            os.unlink(name, dir_fd=self.handle)
        except OSError:
            return False
        return True


def open_folder(folder: Path) -> tuple[int, str]:
    """A handle of the folder, made if missing; or (-1, why it is not to be trusted). Raises OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if folder.is_symlink():  # only for the message: O_NOFOLLOW is what refuses it
        return -1, "it is a link"
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    reason = "it cannot be examined"
    try:
        reason = _distrust(os.fstat(handle))
    finally:
        if reason:
            os.close(handle)
    return (-1, reason) if reason else (handle, "")


def _distrust(info: os.stat_result) -> str:
    """Why what others may have written is not to be trusted, or ''."""
    if info.st_uid != os.geteuid():
        return f"it belongs to user {info.st_uid}"
    return "others may write in it" if info.st_mode & OTHERS_WRITE else ""


def _is_link(name: str, handle: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _read_trusted(descriptor: int) -> Entry | str:
    """The entry of an open file that is regular, the user's own, closed to others and of a sane size."""
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        return "it is no regular file"
    if reason := _distrust(info):
        return reason
    if info.st_size > MAX_BYTES:
        return f"{info.st_size} bytes, more than {MAX_BYTES}"
    with os.fdopen(descriptor, "rb", closefd=False) as f:
        return decode(f.read(MAX_BYTES))
