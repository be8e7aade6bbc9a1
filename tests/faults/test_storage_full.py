"""A4: the disk is full, for a moment or for good, at any call of a writer: exit 7, nothing lost, nothing left over."""

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from broken_disk import GROWING, WRITING, Disk, end_of, faults
from saves import TINY, newest, save, state_of, temporaries

from apr.data.shards import open_shards, write_shards
from apr.errors import AprError, StorageError, one_line
from apr.files import write_atomic, write_durable
from apr.formats.model_file import load_model, save_model
from apr.formats.safetensors import open_safetensors, write_safetensors
from apr.train.log import RunLog

TOKENIZER = SimpleNamespace(vocab_size=100, sha256="a" * 64, json='{"stand": "in"}', eos_id=0, require_eos=lambda: 0)
OLD, NEW = 1, 2
KINDS = {  # number, lasting, half
    "ENOSPC-transient": (errno.ENOSPC, False, False), "ENOSPC-persistent": (errno.ENOSPC, True, False),
    "ENOSPC-transient-half-way": (errno.ENOSPC, False, True), "ENOSPC-persistent-half-way": (errno.ENOSPC, True, True),
    "EDQUOT-transient": (errno.EDQUOT, False, False), "EIO-persistent-half-way": (errno.EIO, True, True)}


class Writer(NamedTuple):
    """`write(folder, version)` replaces what `read(folder)` gives the version of; 0: nothing is there.

    `over`: there is an old one that it replaces.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], int]
    over: bool = True


def model_version(folder: Path) -> int:
    _, params, metadata = load_model(folder / "m.apr")
    assert all(np.array_equal(params[k], v) for k, v in state_of(int(metadata["name"]))[0].items())
    return int(metadata["name"])


def tensors_version(folder: Path) -> int:
    with open_safetensors(folder / "t.safetensors") as opened:
        found = opened.read_all()
    return next(n for n in (OLD, NEW) if all(np.array_equal(found[k], v) for k, v in state_of(n)[0].items()))


def shards_version(folder: Path) -> int:
    if not (folder / "out").exists():
        return 0
    source = open_shards(folder / "out", TOKENIZER, 100)
    return NEW if source.read(0, source.tokens).tolist() == [*range(1, 40), 0] else -1


WRITERS = {
    "checkpoint": Writer(lambda f, n: [save(f, step) for step in ((0, OLD) if n == OLD else (NEW,))], newest),
    "model": Writer(lambda f, n: save_model(f / "m.apr", TINY, state_of(n)[0], str(n), "{}", 0), model_version),
    "safetensors": Writer(lambda f, n: write_safetensors(f / "t.safetensors", state_of(n)[0], {}), tensors_version),
    "run.json": Writer(lambda f, n: write_atomic(f / "run.json", bytes([n]) * 100),
                       lambda f: [None, bytes([OLD]) * 100, bytes([NEW]) * 100].index((f / "run.json").read_bytes())),
    "shards": Writer(lambda f, n: write_shards(f / "out", iter([range(1, 40)]), TOKENIZER, 16), shards_version, False),
}


def start(writer: Writer, folder: Path) -> Path:
    """A folder with the old version."""
    folder.mkdir()
    if writer.over:
        writer.write(folder, OLD)
    return folder


@pytest.mark.parametrize(("number", "lasting", "half"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", WRITERS)
def test_A4_every_call_fails(tmp_path, name, number, lasting, half):
    """Each call that takes room fails in its turn; once there is room again the same write works."""
    writer = WRITERS[name]
    old = start(writer, tmp_path / "start")
    for fault in faults(number, half, lasting):
        folder = shutil.copytree(old, tmp_path / str(fault.at))
        with Disk(folder, fault, GROWING) as disk:
            try:
                writer.write(folder, NEW)
                assert not disk.struck, f"the failure of call {fault.at} was not noticed: {disk.calls[-1]}"
                break
            except StorageError as e:
                assert e.exit_code == 7 and os.strerror(number) in str(e) and str(e) == one_line(str(e))
        assert temporaries(folder) == [], f"call {fault.at}"
        assert writer.read(folder) in (OLD if writer.over else 0, NEW), f"call {fault.at}"
        if writer.over or writer.read(folder) == 0:
            writer.write(folder, NEW)
        assert writer.read(folder) == NEW and temporaries(folder) == [], f"call {fault.at}"
    assert fault.at >= 4 and writer.read(folder) == NEW


@pytest.mark.parametrize("lasting", [False, True], ids=["transient", "persistent"])
@pytest.mark.parametrize("name", WRITERS)
def test_A4_nothing_can_be_removed_either(tmp_path, name, lasting):
    """A disk that has become read-only: the old version loads, and the error is apr's own; leftovers may stay."""
    writer = WRITERS[name]
    old, wrong = start(writer, tmp_path / "start"), []
    for fault in faults(errno.EROFS, lasting=lasting):
        folder = shutil.copytree(old, tmp_path / str(fault.at))
        with Disk(folder, fault, WRITING) as disk:
            try:
                writer.write(folder, NEW)
            except AprError as e:
                assert e.exit_code == 7
            except OSError as e:
                wrong.append(f"call {fault.at} ended in a bare {e!r}")
        assert writer.read(folder) in (OLD if writer.over else 0, NEW)
        if not disk.struck:
            break
    assert fault.at >= 4 and wrong == []


@pytest.mark.parametrize("lasting", [False, True], ids=["one", "all"])
@pytest.mark.parametrize("name", WRITERS)
def test_A4_short_writes_are_gone_on_with(tmp_path, name, lasting):
    """The disk takes half of what it is given: the rest is given again."""
    writer = WRITERS[name]
    for fault in faults(0, half=True, lasting=lasting):
        folder = start(writer, tmp_path / str(fault.at))
        with Disk(folder, fault, frozenset({"write"})) as disk:
            writer.write(folder, NEW)
        assert writer.read(folder) == NEW
        if lasting or not disk.struck:
            break
    assert disk.count > 1 if lasting else fault.at > 0


@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize("name", WRITERS)
def test_A4_a_limit_on_file_size(tmp_path, name):
    """The kernel's own: the write that goes beyond fails half-way. No stand-in is between."""
    writer, ends = WRITERS[name], set()
    for limit in (0, 1, 30, 64, 100, 1000, 4000, 10_000, 1 << 20):
        folder = start(writer, tmp_path / str(limit))

        def write(folder=folder, limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            writer.write(folder, NEW)

        ends.add(end := end_of(write))
        assert writer.read(folder) == (NEW if end == 0 else OLD if writer.over else 0)
        assert temporaries(folder) == []
    assert ends == {0, 7}


def test_A4_dev_full(tmp_path):
    """A device that is always full: under the log, and under a plain durable write."""
    log = RunLog(tmp_path, [])
    log.file.close()
    log.file = open("/dev/full", "ab")  # noqa: SIM115 - closed by __exit__; the log itself follows no link
    with pytest.raises(StorageError, match="No space left"):
        log({"event": "note"})
    with pytest.raises(StorageError, match="No space left"):
        log.__exit__()
    with pytest.raises(StorageError, match="/dev/full: expected room to write"):
        write_durable(Path("/dev/full"), b"x")
