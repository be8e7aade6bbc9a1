"""Damaged checkpoints: a full disk, flipped bits, cut files; the newest whole one always loads."""

import errno
import json
import os

import numpy as np
import pytest
from models import SMALL, random_batch, train_config

import apr.files
from apr.errors import FormatError, IntegrityError, NotFoundError, StorageError
from apr.files import sha256_file
from apr.train import checkpoint
from apr.train.trainer import TransformerTrainer


def trained(steps=2):
    trainer = TransformerTrainer.new(SMALL, train_config())
    for i in range(steps):
        trainer.train_batch(random_batch(i))
    return trainer


def save(folder, trainer, step):
    return checkpoint.write_checkpoint(folder, step, trainer.model, trainer.params, trainer.optimizer_state(),
                                       {"step": step}, "{}")


def test_what_is_read_is_what_was_written(tmp_path):
    trainer = trained()
    found = checkpoint.read_checkpoint(save(tmp_path, trainer, 2))
    assert found.config == SMALL and found.state == {"step": 2}
    assert all(np.array_equal(found.params[k], v) for k, v in trainer.params.items())
    assert all(np.array_equal(found.optimizer[k], v) for k, v in trainer.optimizer_state().items())
    assert {p.name for p in (tmp_path / "step-00000002").iterdir()} == {
        "config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "manifest.json"}


def test_only_the_newest_two_are_kept(tmp_path):
    trainer = trained()
    for step in range(5):
        save(tmp_path, trainer, step)
    assert ([p.name for p in checkpoint.steps(tmp_path)] == ["step-00000004", "step-00000003"]
            and len(list(tmp_path.iterdir())) == 2)


def test_a_full_disk_keeps_the_previous_one(tmp_path, monkeypatch):
    """The Nth fsync fails, for every N until a save goes through: each failure is a StorageError and loses nothing."""
    trainer, real = trained(), os.fsync
    save(tmp_path, trainer, 1)
    for nth in range(100):
        calls = iter(range(10**6))

        def fail(fd, calls=calls, nth=nth):
            if next(calls) == nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd)

        monkeypatch.setattr(apr.files.os, "fsync", fail)
        try:
            save(tmp_path, trainer, 2)
            break
        except StorageError as e:
            assert e.exit_code == 7 and "No space left" in str(e)
        whole = checkpoint.latest(tmp_path, lambda _: None)
        assert (whole.path.name in ("step-00000001", "step-00000002")
                and not any(".tmp-" in p.name for p in tmp_path.iterdir()))
    assert nth >= 8, "every file and both folders are fsynced"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove", "grow"])
def test_damage_is_named_and_the_older_one_is_taken(tmp_path, name, damage):
    trainer = trained()
    save(tmp_path, trainer, 1)
    path = save(tmp_path, trainer, 2) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    new = {"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b"", "grow": bytes(data) + b"\0"}.get(damage)
    if new is None:
        path.unlink()
    else:
        path.write_bytes(new)
    with pytest.raises(IntegrityError, match=name):
        checkpoint.read_checkpoint(path.parent)
    warnings = []
    assert checkpoint.latest(tmp_path, warnings.append).path.name == "step-00000001"
    assert len(warnings) == 1 and name in warnings[0]


def test_leftovers_of_a_crash_do_not_stop_the_next_save(tmp_path):
    (tmp_path / "step-00000003.tmp-1-abc").mkdir()
    (tmp_path / "step-00000003").mkdir()  # no manifest: an old crash
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.read_checkpoint(save(tmp_path, trained(), 3)).state["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_names_decide_and_not_clocks(tmp_path):
    trainer = trained()
    older, newer = save(tmp_path, trainer, 8), save(tmp_path, trainer, 9)
    os.utime(newer, (0, 0))
    os.utime(older, (2**31, 2**31))
    assert checkpoint.latest(tmp_path, print).path == newer


def test_refusals(tmp_path):
    with pytest.raises(NotFoundError, match="a complete checkpoint"):
        checkpoint.latest(tmp_path, print)
    path = save(tmp_path, trained(), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    for change in ({"format": "other"}, {"version": 2}, {"files": {}}, {"files": []}):
        (path / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(FormatError, match=r"manifest\.json"):
            checkpoint.read_checkpoint(path)
    (path / "run.py").write_text("a file more")
    entry = {"size": 11, "sha256": sha256_file(path / "run.py")}
    (path / "manifest.json").write_text(json.dumps({**manifest, "files": {**manifest["files"], "run.py": entry}}))
    with pytest.raises(FormatError, match=r"manifest\.json"):
        checkpoint.read_checkpoint(path)


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    """Sound bytes of another model's moments, half of the moments, another step's state."""
    trainer = trained()
    norm = "v.model.norm.weight"
    for n, change in enumerate((lambda o: o.update({norm: o[norm][:-1]}), lambda o: o.pop(norm),
                                lambda o: o.update({norm: o[norm][None]}))):
        moments = dict(trainer.optimizer_state())
        change(moments)
        path = checkpoint.write_checkpoint(tmp_path / str(n), 3, SMALL, trainer.params, moments, {"step": 3}, None)
        with pytest.raises(FormatError, match=r"optimizer\.safetensors: expected m and v of every parameter"):
            checkpoint.read_checkpoint(path)
    path = checkpoint.write_checkpoint(tmp_path / "s", 3, SMALL, trainer.params, trainer.optimizer_state(), {"step": 2},
                                       None)
    with pytest.raises(FormatError, match=r"state\.json: expected the manifest's step"):
        checkpoint.read_checkpoint(path)
