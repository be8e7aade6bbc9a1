"""A3: the power goes at any call of a writer. What had been promised, by returning, is there; the rest whole or not.

Each test is held against its own subject with one fsync left out, which it must notice.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from broken_disk import Call, Disk
from power_loss import Tree, crashes, plant, tree_of
from saves import newest, save

from apr.data.shards import open_shards, write_shards
from apr.errors import AprError
from apr.files import new_path, write_atomic, write_durable

OLD, NEW = b"the old contents", b"new contents, longer than the old"
TOKENIZER = SimpleNamespace(vocab_size=100, sha256="a" * 64, json='{"stand": "in"}', eos_id=0, require_eos=lambda: 0)


class Subject(NamedTuple):
    """A writer: `prepare(folder)`, durable; `write(folder, promise)`; `lost(folder, promised)`, in a word or ''.

    `promised` is what had been before.
    """

    write: Callable
    lost: Callable[[Path, list[str]], str]
    prepare: Callable[[Path], object] = lambda folder: None
    promised: tuple[str, ...] = ()


def checkpoints_lost(folder: Path, promised: list[str]) -> str:
    """Resuming takes the newest step that had been promised, or a newer one."""
    found, due = newest(folder / "ckpt"), int(promised[-1]) if promised else -1
    return "" if found >= due else f"step {found} where {due} was promised"


def saving(*steps: int) -> Callable:
    """Save these steps one after the other."""
    def write(folder: Path, promise: Callable[[str], None]) -> None:
        for step in steps:
            save(folder / "ckpt", step)
            promise(str(step))
    return write


def atomic(folder: Path, promise: Callable[[str], None]) -> None:
    write_atomic(folder / "a", NEW)
    promise("new")


def atomic_lost(old: bytes | None) -> Callable[[Path, list[str]], str]:
    def lost(folder: Path, promised: list[str]) -> str:
        found = (folder / "a").read_bytes() if (folder / "a").exists() else None
        return "" if found == NEW or (found == old and not promised) else f"{found!r}"
    return lost


def shards(out: str) -> tuple[Callable, Callable]:
    documents = [[5, 6, 7], [8], list(range(11, 30))]
    flat = [t for d in documents for t in (*d, 0)]

    def write(folder: Path, promise: Callable[[str], None]) -> None:
        write_shards(folder / out, iter(documents), TOKENIZER, 16)
        promise(out)

    def lost(folder: Path, promised: list[str]) -> str:
        if not (folder / out).exists():
            return "gone" if promised else ""
        try:
            found = open_shards(folder / out, TOKENIZER, 100)
        except AprError as e:
            return str(e)
        whole = found.read(0, found.tokens).tolist() == flat
        text = folder / out / "tokenizer.json"
        return "" if whole and text.is_file() and text.read_text() == TOKENIZER.json else "not whole"
    return write, lost


def new_folder(folder: Path, promise: Callable[[str], None]) -> None:
    with new_path(folder / "n") as temporary:
        temporary.mkdir()
        for name in ("x", "y"):
            write_durable(temporary / name, NEW)
    promise("n")


def new_file(folder: Path, promise: Callable[[str], None]) -> None:
    with new_path(folder / "n") as temporary:
        write_durable(temporary, NEW)
    promise("n")


def new_lost(whole: Tree) -> Callable[[Path, list[str]], str]:
    def lost(folder: Path, promised: list[str]) -> str:
        found = {path: data for path, data in tree_of(folder).items() if not path.startswith(".")}
        return "" if found == whole or (not found and not promised) else f"{found}"
    return lost


SUBJECTS = {
    "first checkpoint": Subject(saving(1), checkpoints_lost, lambda folder: (folder / "ckpt").mkdir()),
    "first checkpoint, in a new folder": Subject(saving(1), checkpoints_lost),
    "another checkpoint": Subject(saving(3), checkpoints_lost, lambda f: [save(f / "ckpt", n) for n in (1, 2)], ("2",)),
    "a checkpoint again": Subject(saving(3), checkpoints_lost, lambda folder: save(folder / "ckpt", 3), ("3",)),
    "write_atomic, new": Subject(atomic, atomic_lost(None)),
    "write_atomic, over an old one": Subject(atomic, atomic_lost(OLD), lambda f: (f / "a").write_bytes(OLD)),
    "shards": Subject(*shards("out")),
    "shards, in a new folder": Subject(*shards("corpus/out")),
    "new_path, a folder": Subject(new_folder, new_lost({"n": None, "n/x": NEW, "n/y": NEW})),
    "new_path, a file": Subject(new_file, new_lost({"n": NEW})),
}


def recorded(subject: Subject, folder: Path) -> tuple[Tree, list[Call]]:
    """What was there, and the calls of the writer."""
    folder.mkdir()
    subject.prepare(folder)
    before = tree_of(folder)
    with Disk(folder) as disk:
        subject.write(folder, disk.promise)
    return before, disk.calls


def losses(subject: Subject, before: Tree, calls: list[Call], scratch: Path) -> list[str]:
    """What is lost, and at which crash; no more than the first few. The last crashes come first: they show the most."""
    found: list[str] = []
    states = crashes(before, calls)
    assert len(states) > len({n for n, _, _ in states}) >= 3, "a crash leaves more than one state"
    for i, (n, promised, tree) in enumerate(reversed(states)):
        said = subject.lost(plant(tree, scratch / str(i)), [*subject.promised, *promised])
        if said:
            found.append(f"power lost before call {n} of {len(calls)}: {said}; there: {sorted(tree)}")
        if len(found) == 3:
            break
    return found


@pytest.mark.parametrize("name", SUBJECTS)
def test_A3_power_loss(tmp_path, name):
    subject = SUBJECTS[name]
    before, calls = recorded(subject, tmp_path / "disk")
    (tmp_path / "states").mkdir()
    assert losses(subject, before, calls, tmp_path / "states") == []


@pytest.mark.parametrize("name", SUBJECTS)
def test_A3_each_fsync_matters(tmp_path, name):
    """With any fsync left out a promise is broken: none is there for nothing, and the test above would miss none."""
    subject = SUBJECTS[name]
    before, calls = recorded(subject, tmp_path / "disk")
    fsyncs = [i for i, call in enumerate(calls) if call.kind == "fsync"]
    assert len(fsyncs) >= 2
    unseen = []
    for i in fsyncs:
        (tmp_path / f"without-{i}").mkdir()
        if not losses(subject, before, calls[:i] + calls[i + 1:], tmp_path / f"without-{i}"):
            unseen.append(f"fsync of '{calls[i].path}'")
    assert unseen == []


def test_A3_power_loss_over_several_checkpoints(tmp_path):
    """Removals of old ones are never made durable: whatever of them is left is no danger."""
    subject = Subject(saving(1, 2, 3, 4), checkpoints_lost, lambda folder: (folder / "ckpt").mkdir())
    before, calls = recorded(subject, tmp_path / "disk")
    assert {"unlink", "rmdir"} <= {call.kind for call in calls}
    (tmp_path / "states").mkdir()
    assert losses(subject, before, calls, tmp_path / "states") == []
