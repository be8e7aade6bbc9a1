"""A5, A6, A8, A11, A12, A13: files that cannot be read, are damaged, change while in use or lie about their age."""

import errno
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from broken_disk import READING, Disk, end_of, faults
from models import SMALL, random_params
from saves import TINY, newest, save, state_of, temporaries
from small_kernels import BAKED, SPEC, small_cache, use_fake_compiler

from apr.data.shards import open_shards, write_shards
from apr.errors import AprError, IntegrityError, StorageError, one_line
from apr.formats.apr_file import open_apr
from apr.formats.model_file import load_model, save_model
from apr.formats.safetensors import open_safetensors, write_safetensors
from apr.formats.tensors import TensorFile
from apr.train import checkpoint

TOKENIZER = SimpleNamespace(vocab_size=100, sha256="a" * 64, json='{"stand": "in"}', eos_id=0, require_eos=lambda: 0)
PAST, FUTURE = 0, 4_102_444_800  # 1970, 2100


class Kind(NamedTuple):
    """`write(folder, version)` gives the path; `read(open(path))` gives the contents.

    `main`: the file that is changed. `place`: what an error says of the place within it, once it is open.
    """

    write: Callable[[Path, int], Path]
    open: Callable[[Path], Any]
    read: Callable[[Any], dict[str, np.ndarray]]
    main: str
    place: str = ""


def write_model(folder: Path, version: int) -> Path:  # larger than the buffer of a file
    save_model(folder / "m.apr", SMALL, random_params(SMALL, version), "m", "{}", 0)
    return folder / "m.apr"


def write_tensors(folder: Path, version: int) -> Path:
    write_safetensors(folder / "t.safetensors", random_params(SMALL, version), {})
    return folder / "t.safetensors"


def write_tokens(folder: Path, version: int) -> Path:
    write_shards(folder / "out", iter([[version + (i % 90) for i in range(5000)]]), TOKENIZER, 1 << 20)
    return folder / "out"


def read_tensors(opened: TensorFile) -> dict[str, np.ndarray]:
    with opened:
        return opened.read_all()


KINDS = {
    "checkpoint": Kind(save, checkpoint.read_checkpoint, lambda c: {**c.params, **c.optimizer}, "model.safetensors"),
    "model": Kind(write_model, load_model, lambda found: found[1], "m.apr"),
    "apr": Kind(write_model, open_apr, read_tensors, "m.apr", r"tensor '\S+'"),
    "safetensors": Kind(write_tensors, open_safetensors, read_tensors, "t.safetensors", r"tensor '\S+'"),
    "shards": Kind(write_tokens, lambda path: open_shards(path, TOKENIZER, 100),
                   lambda source: {"tokens": source.read(0, source.tokens)}, "shard-0000.bin", r"(offset|token) \d+"),
}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", KINDS)
def test_A5_each_read_fails(tmp_path, name):
    """EIO at each read in its turn: exit 7, one line that names the file and, where the reader knows it, the place."""
    kind, wrong = KINDS[name], []
    path = kind.write(tmp_path, 1)
    for fault in faults(errno.EIO):
        opened = None
        with Disk(tmp_path, fault, READING) as disk:
            try:
                kind.read(opened := kind.open(path))
                break
            except StorageError as e:
                text = str(e)
                assert e.exit_code == 7 and "Input/output error" in text and text == one_line(text)
                if not any(p.name in text for p in [path, *path.rglob("*")] if p.is_file()):
                    wrong.append(f"read {fault.at} names no file: {text}")
                if opened is not None and not re.search(kind.place, text):
                    wrong.append(f"read {fault.at} names no place: {text}")
    assert not disk.struck and fault.at >= 3
    assert wrong == []


@pytest.mark.parametrize("name", KINDS)
def test_A5_short_reads(tmp_path, name):
    """Reads that bring half of what was asked for, one or all of them: the right values, or an error."""
    kind = KINDS[name]
    path = kind.write(tmp_path, 1)
    right = kind.read(kind.open(path))
    for lasting in (False, True):
        for fault in faults(0, half=True, lasting=lasting):
            with Disk(tmp_path, fault, READING) as disk:
                try:
                    assert same(kind.read(kind.open(path)), right), f"read {fault.at}: wrong values"
                except AprError as e:
                    assert e.exit_code in (4, 6, 7) and kind.main in str(e) and name == "shards", f"{fault}: {e}"
            if not disk.struck:
                break
    assert fault.at >= 3


def leave(ckpt_dir: Path, what: str) -> None:
    """What a crash at step 3, or of another program in that folder, may have left."""
    final, temporary = ckpt_dir / "step-00000003", ckpt_dir / "step-00000003.tmp-1-abc"
    if what == "a temporary folder":
        shutil.copytree(save(ckpt_dir / "other", 3), temporary)
        shutil.rmtree(ckpt_dir / "other")
    elif what == "a folder that was replaced":
        (ckpt_dir / "step-00000003.tmp-replaced-abc" / "deep").mkdir(parents=True)
    elif what == "an empty folder":
        final.mkdir()
    elif what == "no manifest":
        (save(ckpt_dir, 3) / "manifest.json").unlink()
    elif what == "only a manifest":
        final.mkdir()
        (final / "manifest.json").write_bytes((ckpt_dir / "step-00000002" / "manifest.json").read_bytes())
    elif what == "half a manifest":
        (save(ckpt_dir, 3) / "manifest.json").write_text('{"format": "apr-ch')
    elif what == "a file in its place":
        final.write_bytes(b"x")
    elif what == "a temporary model":
        (ckpt_dir / ".epoch-001.apr.tmp-1-abc").write_bytes(b"half")
    elif what == "a temporary folder of an export":
        (ckpt_dir / ".hf.tmp-1-abc").mkdir()


LEFT = ["a temporary folder", "a folder that was replaced", "an empty folder", "no manifest", "only a manifest",
        "half a manifest", "a file in its place", "a temporary model", "a temporary folder of an export"]


@pytest.mark.parametrize("what", LEFT)
def test_A6_leftovers_of_a_crash_at_the_same_step(tmp_path, what):
    """Nothing of it is taken for a checkpoint, the save works, and nothing of it stays."""
    for step in (1, 2):
        save(tmp_path, step)
    leave(tmp_path, what)
    assert newest(tmp_path) == 2
    save(tmp_path, 3)
    assert newest(tmp_path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["checkpoint", "optimizer", "model", "shards"])
def test_A8_a_flipped_bit(tmp_path, name):
    """One bit of each tensor: exit 6, naming the file. No format of these has a checksum of a tensor to name it by."""
    kind, rng = KINDS["checkpoint" if name == "optimizer" else name], random.Random(8)
    path = kind.write(tmp_path, 1)
    main = "optimizer.safetensors" if name == "optimizer" else kind.main
    file = path if path.is_file() else path / main
    data = file.read_bytes()
    if name == "shards":
        spans = [(f"token {i // 2}", i, 1) for i in range(0, len(data), 1000)]  # to another id that there might be
    else:
        with (open_apr if name == "model" else open_safetensors)(file) as opened:
            spans = [(e.name, e.start, e.nbytes) for e in opened.entries.values()]
    assert len(spans) >= 10
    for tensor, start, size in spans:
        spoilt = bytearray(data)
        spoilt[start + rng.randrange(size)] ^= 1 << rng.randrange(8) if name != "shards" else 1
        file.write_bytes(spoilt)
        with pytest.raises(IntegrityError, match=re.escape(str(file))):
            pytest.fail(f"{tensor}: {len(kind.read(kind.open(path)))} read")
    file.write_bytes(data)
    assert kind.read(kind.open(path))


def other(path: Path, kind: Kind, folder: Path) -> Path:
    """The same file of another version, of the same size."""
    folder.mkdir()
    made = kind.write(folder, 2)
    file = made if made.is_file() else made / kind.main
    assert file.stat().st_size == path.stat().st_size and file.read_bytes() != path.read_bytes()
    return file


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "cut to nothing": lambda file, new: os.truncate(file, 0),
    "cut": lambda file, new: os.truncate(file, file.stat().st_size // 2),
    "cut by a byte": lambda file, new: os.truncate(file, file.stat().st_size - 1),
    "replaced": lambda file, new: os.replace(new, file),
    "removed": lambda file, new: file.unlink(),
    "written over": lambda file, new: file.write_bytes(new.read_bytes()),
}


@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [name for name in KINDS if name != "model"])
def test_A11_changed_while_in_use(tmp_path, monkeypatch, name, change):
    """Between opening, or checking, and reading: what was there, or an error; in a child, which a SIGBUS would end."""
    kind = KINDS[name]
    (tmp_path / "used").mkdir()
    path = kind.write(tmp_path / "used", 1)
    file = path if path.is_file() else path / kind.main
    new = other(file, kind, tmp_path / "other")
    os.utime(file, (PAST, PAST))  # so that writing changes it, however coarse the clock
    right = kind.read(kind.open(path))

    def hashed(of, real=checkpoint.sha256_file):
        found = real(of)
        if of == file:
            CHANGES[change](file, new)
        return found

    def use():
        if name == "checkpoint":  # it is opened and read in one call: the change comes after the check of this file
            monkeypatch.setattr(checkpoint, "sha256_file", hashed)
        opened = kind.open(path)
        if name != "checkpoint":
            CHANGES[change](file, new)
        assert same(kind.read(opened), right), "silently other values"

    assert end_of(use) in (0, 3, 4, 6, 7)


def age(folder: Path, seconds: int) -> None:
    """Give everything in a folder, and the folder, this time of change."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (seconds, seconds), follow_symlinks=False)


@pytest.mark.parametrize("seconds", [PAST, FUTURE], ids=["1970", "2100"])
def test_A12_clocks_decide_nothing(tmp_path, monkeypatch, seconds):
    """The same checkpoint, the same swept leftovers, the same hits in the kernel cache."""
    use_fake_compiler(monkeypatch)
    for step in (8, 9):
        save(tmp_path / "ckpt", step)
    age(tmp_path / "ckpt" / "step-00000009", PAST + FUTURE - seconds)  # the newer one at the other end of time
    age(tmp_path / "ckpt" / "step-00000008", seconds)
    assert newest(tmp_path / "ckpt") == 9
    (tmp_path / "ckpt" / "step-00000009.tmp-1-a").mkdir()
    (tmp_path / "ckpt" / ".epoch-000.apr.tmp-1-a").write_bytes(b"half")
    built = small_cache(tmp_path / "cache", tmp_path / "kernels").build(SPEC, BAKED)
    age(tmp_path, seconds)
    cache = small_cache(tmp_path / "cache", tmp_path / "kernels")
    assert cache.build(SPEC, BAKED) == built
    assert (cache.counts.hits, cache.counts.compiled, cache.counts.rejected) == (1, 0, 0)
    checkpoint.sweep(tmp_path / "ckpt")
    assert temporaries(tmp_path) == [] and newest(tmp_path / "ckpt") == 9
    save(tmp_path / "ckpt", 10)
    assert [p.name for p in checkpoint.steps(tmp_path / "ckpt")] == ["step-00000010", "step-00000009"]


def test_A13_numbers_that_change_after_a_save(tmp_path):
    """A save that has returned has read everything: what is done to the arrays then does not reach the file."""
    params, optimizer = state_of(5)
    checkpoint.write_checkpoint(tmp_path, 5, TINY, params, optimizer, {"step": 5}, None)
    for array in (*params.values(), *optimizer.values()):
        array[...] = 1e9
    assert newest(tmp_path) == 5
