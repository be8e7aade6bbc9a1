"""Files read as if they were hostile, and written so that a crash loses nothing.

Reading: only regular files (a FIFO would hang, a device never end), sizes known before anything is allocated. Writing:
to a temporary name in the same folder, fsync, rename, fsync of the folder. Operating-system errors become apr's own.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from apr.errors import AprError, ConfigError, FormatError, NotFoundError, StorageError

CHUNK = 1 << 20


def os_error(where: str, error: OSError) -> AprError:
    """The apr error that an OSError means."""
    reason = error.strerror or str(error)
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return NotFoundError(where, "an existing path", "nothing there", "check the path")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(where, "room to write", reason,
                            "free space and run again; what was complete before is intact")
    return StorageError(where, "a path that can be read and written", reason, "check permissions and the disk")


@contextlib.contextmanager
def os_errors(where: str) -> Iterator[None]:
    """Turn any OSError of the block into the apr error for `where`."""
    try:
        yield
    except OSError as e:
        raise os_error(where, e) from e


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """An open regular file and its size in bytes.

    Raises NotFoundError, StorageError, or FormatError when the path is a folder, FIFO, socket or device.
    """
    with os_errors(str(path)):
        if stat.S_ISSOCK(os.stat(path).st_mode):  # which cannot even be opened
            raise FormatError(str(path), "a regular file", "a socket", "give the path of a file")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "not a regular file"
        raise FormatError(str(path), "a regular file", kind, "give the path of a file")
    return os.fdopen(fd, "rb"), info.st_size


def open_appending(path: Path) -> BinaryIO:
    """A regular file to read and to append to, made if missing; what others may have put there is no link to follow.

    Raises StorageError, and FormatError when it is no regular file.
    """
    with os_errors(str(path)):
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError(str(path), "a regular file", "another kind", "remove it")
    return os.fdopen(fd, "a+b")


def read_bytes(path: Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    Raises as open_regular, and FormatError over the limit.
    """
    f, size = open_regular(path)
    with f, os_errors(str(path)):
        if size > limit:
            raise FormatError(str(path), f"at most {limit} bytes", f"{size}", "this is not such a file; check the path")
        return f.read(size)


def sha256_file(path: Path) -> str:
    """SHA-256 of a regular file, hexadecimal."""
    f, _ = open_regular(path)
    with f, os_errors(str(path)):
        digest = hashlib.sha256()
        while part := f.read(CHUNK):
            digest.update(part)
        return digest.hexdigest()


class PrivateFolder:
    """A new temporary folder, mode 0700, that is removed when this object or the process goes; `name` is its path.

    Unlike tempfile.TemporaryDirectory it may simply be let go: it is no mistake to keep one as long as its owner.
    """

    def __init__(self, prefix: str, dir: Path | str | None = None) -> None:
        self.name = tempfile.mkdtemp(prefix=prefix, dir=dir)
        self.remove = weakref.finalize(self, shutil.rmtree, self.name, ignore_errors=True)


def fsync_dir(path: Path) -> None:
    """Make a folder's entries durable: a rename is only on disk after this."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, durably: each is on disk when this returns."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        fsync_dir(folder.parent)


def write_durable(path: Path, *parts: bytes | memoryview) -> str:
    """Write a new file and fsync it; the name is not yet durable (fsync_dir) and the write not atomic.

    Returns the SHA-256 of what was to be written, which a disk that wrote something else cannot match.
    """
    digest = hashlib.sha256()
    with os_errors(str(path)), open(path, "wb") as f:
        for part in parts:
            f.write(part)
            digest.update(part)
        f.flush()
        os.fsync(f.fileno())
    return digest.hexdigest()


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raise StorageError unless the file system of `folder`, or of where it will be, has `needed` bytes for us."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    with os_errors(str(folder)):
        room = os.statvfs(there)
    if (free := room.f_bavail * room.f_frsize) < needed:
        raise StorageError(str(folder), f"{needed / 2**30:.2f} GiB free for {what}", f"{free / 2**30:.2f} GiB",
                           "free space, or choose another folder; what was complete before is intact")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` at the end of the block, whole or not at all.

    On any error the temporary file is removed and `path` is as it was. Raises StorageError.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with os_errors(str(path)):
            with open(temporary, "xb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
            fsync_dir(path.parent)
    finally:
        with contextlib.suppress(OSError):  # on a disk that has become read-only it stays; the error says why
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, whole or not at all, durable on return. Raises StorageError."""
    with replacing(path) as f:
        f.write(data)


@contextlib.contextmanager
def new_path(path: Path) -> Iterator[Path]:
    """A name beside `path`, for a file or folder that is called `path` at the end of the block, whole or not at all.

    Raises ConfigError when something is there already, NotFoundError without a folder to hold it, StorageError.
    """
    if os.path.lexists(path):
        raise ConfigError(str(path), "a path that does not exist yet", "something there",
                          "choose another, or remove it")
    if not path.parent.is_dir():
        raise NotFoundError(str(path), f"the folder {path.parent}", "no such folder", "make it first")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        yield temporary
        with os_errors(str(path)):
            if temporary.is_dir():
                fsync_dir(temporary)
            os.rename(temporary, path)
            fsync_dir(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
