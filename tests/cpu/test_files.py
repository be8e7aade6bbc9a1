"""Reading only what is a file, writing whole or not at all, and the errors that a user sees."""

import errno
import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from apr import files
from apr.errors import AprError, FormatError, NotFoundError, StorageError
from apr.files import CHUNK, open_regular, os_error, os_errors, read_bytes, replacing, sha256_file, write_atomic

OLD, NEW = b"old contents", b"new contents, longer than the old"


def code_and_line(action) -> tuple[int, str]:
    """The exit code and message of the AprError that `action` raises."""
    with pytest.raises(AprError) as caught:
        action()
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()
    return caught.value.exit_code, str(caught.value)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
def test_read_and_hash(tmp_path, size):
    data = (os.urandom(251) * (size // 251 + 1))[:size]
    path = tmp_path / "a"
    path.write_bytes(data)
    assert read_bytes(path, size) == data
    assert sha256_file(path) == hashlib.sha256(data).hexdigest()
    f, found = open_regular(path)
    with f:
        assert found == size
    if size:
        code, line = code_and_line(lambda: read_bytes(path, size - 1))
        assert code == 4 and line.startswith(f"{path}: expected at most {size - 1} bytes, found {size}; ")


def test_links_to_files_are_read(tmp_path):
    (tmp_path / "a").write_bytes(OLD)
    (tmp_path / "b").symlink_to("a")
    assert read_bytes(tmp_path / "b", 100) == OLD


def make(path: Path, kind: str) -> Path:
    """Something that is no regular file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(os.path.relpath(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    return path


@pytest.mark.parametrize(("kind", "code", "part"), [
    ("folder", 4, "a folder"), ("FIFO", 4, "not a regular file"), ("socket", 4, "a regular file"),
    ("device", 4, "not a regular file"), ("link to nothing", 3, "nothing there"),
    ("link to itself", 7, "check permissions"), ("missing", 3, "nothing there")])
@pytest.mark.parametrize("read", [open_regular, sha256_file, lambda p: read_bytes(p, 10)], ids=["open", "hash", "read"])
def test_what_is_no_file_is_refused(tmp_path, monkeypatch, read, kind, code, part):
    monkeypatch.chdir(tmp_path)  # a socket's name has room for about a hundred bytes
    path = make(tmp_path / "x", kind)
    found, line = code_and_line(lambda: read(path))
    assert found == code and line.startswith(f"{path}: ") and part in line


def test_a_file_used_as_a_folder_is_not_found(tmp_path):
    (tmp_path / "a").write_bytes(OLD)
    assert code_and_line(lambda: read_bytes(tmp_path / "a" / "b", 10))[0] == 3


@pytest.mark.parametrize(("number", "kind", "part"), [
    (errno.ENOENT, NotFoundError, "check the path"), (errno.ENOTDIR, NotFoundError, "check the path"),
    (errno.ENOSPC, StorageError, "free space"), (errno.EDQUOT, StorageError, "free space"),
    (errno.EFBIG, StorageError, "free space"), (errno.EACCES, StorageError, "check permissions"),
    (errno.EIO, StorageError, "check permissions"), (errno.EROFS, StorageError, "Read-only file system")])
def test_operating_system_errors_become_ours(number, kind, part):
    error = os_error("w\nhere", OSError(number, os.strerror(number)))
    assert type(error) is kind and part in str(error) and str(error).startswith("w\\x0ahere: ")
    with pytest.raises(kind), os_errors("where"):
        raise OSError(number, os.strerror(number))
    with pytest.raises(KeyError), os_errors("where"):
        raise KeyError("not of the operating system")


@pytest.mark.parametrize("before", [OLD, None])
def test_write_atomic(tmp_path, before):
    path = tmp_path / "a"
    if before is not None:
        path.write_bytes(before)
    write_atomic(path, NEW)
    assert path.read_bytes() == NEW and os.listdir(tmp_path) == ["a"]


def test_write_atomic_is_durable_in_the_right_order(tmp_path, monkeypatch):
    """Contents first, then the name, then the folder that holds the name."""
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        calls.append("folder" if Path(f"/dev/fd/{fd}").is_dir() else "file")
        real_fsync(fd)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append("name"), real_replace(a, b)))
    write_atomic(tmp_path / "a", NEW)
    assert calls == ["file", "name", "folder"]
    calls.clear()
    files.write_durable(tmp_path / "b", NEW)
    assert calls == ["file"] and (tmp_path / "b").read_bytes() == NEW


def failing(number: int):
    """A stand-in for a system call that fails."""
    def call(*_) -> None:
        raise OSError(number, os.strerror(number))
    return call


@pytest.mark.parametrize("before", [OLD, None])
@pytest.mark.parametrize(("call", "number"), [("fsync", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.EACCES)])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, before, call, number):
    path = tmp_path / "a\nb"
    if before is not None:
        path.write_bytes(before)
    monkeypatch.setattr(files.os, call, failing(number))
    code, line = code_and_line(lambda: write_atomic(path, NEW))
    assert code == 7 and "a\\x0ab" in line
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == ({} if before is None else {path.name: before})


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_an_error_in_the_block_leaves_what_was_there(tmp_path, error):
    (tmp_path / "a").write_bytes(OLD)
    with pytest.raises(error), replacing(tmp_path / "a") as f:
        f.write(NEW)
        raise error
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": OLD}


def test_the_old_file_is_there_until_the_end(tmp_path):
    (tmp_path / "a").write_bytes(OLD)
    with replacing(tmp_path / "a") as f:
        f.write(NEW)
        f.flush()
        assert (tmp_path / "a").read_bytes() == OLD
    assert (tmp_path / "a").read_bytes() == NEW


def test_writing_into_a_missing_folder_or_over_a_folder(tmp_path):
    assert code_and_line(lambda: write_atomic(tmp_path / "no" / "a", NEW))[0] == 3
    (tmp_path / "d").mkdir()
    assert code_and_line(lambda: write_atomic(tmp_path / "d", NEW))[0] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from apr.errors import StorageError
from apr.files import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomic(Path(sys.argv[1]), bytes(100_000))
except StorageError as e:
    print(e.exit_code, e)
"""


def test_a_file_that_may_not_grow_leaves_what_was_there(tmp_path):
    """The real thing: the write itself fails half-way, as on a full disk."""
    path = tmp_path / "a"
    path.write_bytes(OLD)
    run = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=60,
                         check=False)
    assert run.stdout.startswith(f"7 {path}: expected room to write, found File too large; free space"), run.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": OLD}


def test_refusals_are_typed(tmp_path):
    for kind, action in ((NotFoundError, lambda: sha256_file(tmp_path / "a")),
                         (FormatError, lambda: sha256_file(tmp_path))):
        with pytest.raises(kind):
            action()
