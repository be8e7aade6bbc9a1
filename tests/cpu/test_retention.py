"""Which checkpoints are kept, and room for them before anything is begun."""

import os
from contextlib import suppress
from types import SimpleNamespace

import pytest
from test_checkpoint import save, trained
from test_run import arguments, end_state, stop_at, without_stop

import apr.files
import apr.train.saver
from apr.cli.main import main
from apr.cli.pretrain import build_config
from apr.errors import Stopped, StorageError
from apr.files import require_room
from apr.formats.safetensors import encode_header
from apr.train import checkpoint
from apr.train.run import pretrain, read_run, resume


def kept(folder, **policy):
    trainer = trained()
    for step in range(0, 60, 10):
        checkpoint.write_checkpoint(folder, step, trainer.model, trainer.params, trainer.optimizer_state(),
                                    {"step": step}, None, **policy)
    return [checkpoint.step_of(p) for p in checkpoint.steps(folder)]


@pytest.mark.parametrize(("policy", "steps"), [
    ({}, [50, 40]), ({"keep": 1}, [50]), ({"keep": 4}, [50, 40, 30, 20]), ({"keep": 9}, [50, 40, 30, 20, 10, 0]),
    ({"milestone_every": 20}, [50, 40, 20, 0]), ({"keep": 1, "milestone_every": 30}, [50, 30, 0])])
def test_the_newest_and_the_milestones_are_kept(tmp_path, policy, steps):
    assert kept(tmp_path, **policy) == steps


def test_what_is_no_checkpoint_does_not_count_as_one_that_is_kept(tmp_path):
    """A newer folder without its manifest must not take the place of the one to fall back on."""
    save(tmp_path, trained(), 1)
    (tmp_path / "step-00000099").mkdir()
    save(tmp_path, trained(), 2)
    assert [checkpoint.step_of(p) for p in checkpoint.steps(tmp_path)] == [99, 2, 1]


def test_a_run_keeps_what_it_was_asked_to_and_may_be_asked_otherwise_on_resuming(folder, tmp_path):
    config, run_dir = build_config(arguments(folder, "--keep", "1", "--milestone-every", "8")), tmp_path / "run"
    with pytest.raises(Stopped):
        pretrain(config, run_dir, "cpu", [stop_at(19, 15)])
    assert [checkpoint.step_of(p) for p in checkpoint.steps(run_dir / "ckpt")] == [19, 16, 8, 0]
    assert main(["pretrain", "--resume", "--run-dir", str(run_dir), "--keep", "3", "--device", "cpu"]) == 0
    assert [checkpoint.step_of(p) for p in checkpoint.steps(run_dir / "ckpt")] == [24, 19, 16, 8, 0]
    assert read_run(run_dir).keep == 1


def room_of(monkeypatch, free):
    """A file system with free() bytes left."""
    monkeypatch.setattr(apr.files.os, "statvfs", lambda _path: SimpleNamespace(f_bavail=free(), f_frsize=1))


def test_A4_a_disk_without_room_for_a_runs_checkpoints_is_refused_before_anything_is_written(folder, tmp_path,
                                                                                             monkeypatch):
    config = build_config(arguments(folder))
    size = sum(p.size for p in trained().params.values())
    assert size > 1000
    room_of(monkeypatch, lambda: checkpoint.SLACK)
    with pytest.raises(StorageError, match=r"run: expected \d.* GiB free for this run's checkpoints") as caught:
        pretrain(config, tmp_path / "run", "cpu", [])
    assert caught.value.exit_code == 7 and not (tmp_path / "run").exists()


def test_A4_a_checkpoint_takes_what_is_asked_for(tmp_path):
    trainer = trained()
    path = save(tmp_path, trainer, 1)
    size = sum(p.size for p in trainer.params.values())
    taken = sum(p.stat().st_size for p in path.iterdir())
    assert 12 * size < taken < checkpoint.bytes_needed(size)
    assert len(encode_header(trainer.params, {})) < checkpoint.SLACK // 4


def test_A4_a_disk_that_is_full_for_a_while_costs_only_time(folder, tmp_path, monkeypatch):
    """At step 8 there is no room, and then there is."""
    waits, seen = [], []
    room_of(monkeypatch, lambda: 0 if (tmp_path / "run/ckpt/step-00000000").exists() and not waits else 2**40)
    monkeypatch.setattr(apr.train.saver.time, "sleep", waits.append)
    with suppress(StorageError):
        pretrain(build_config(arguments(folder)), tmp_path / "run", "cpu", [seen.append])
    assert seen[-1]["status"] == "OK"
    note, = [e["text"] for e in seen if e["event"] == "note" and "not saved" in e["text"]]
    assert waits == [1.0] and "GiB free for a checkpoint" in note and "again in 1 s" in note


def test_A4_a_disk_that_stays_full_ends_the_run_and_resuming_loses_no_bit(folder, tmp_path, monkeypatch):
    waits, run_dir, config = [], tmp_path / "run", build_config(arguments(folder))
    monkeypatch.setattr(apr.train.saver.time, "sleep", waits.append)
    room_of(monkeypatch, lambda: 0 if (run_dir / "ckpt/step-00000008").exists() else 2**40)
    with pytest.raises(StorageError, match="for a checkpoint"):
        pretrain(config, run_dir, "cpu", [])
    assert waits == list(apr.train.saver.RETRY_SECONDS)
    assert checkpoint.latest(run_dir / "ckpt", print).state["step"] == 8
    monkeypatch.undo()
    resume(read_run(run_dir), run_dir, "cpu", [], print)
    pretrain(config, tmp_path / "whole", "cpu", [])
    ends = [checkpoint.latest(p / "ckpt", print).state for p in (run_dir, tmp_path / "whole")]
    assert ends[0]["parameters_sha256"] == ends[1]["parameters_sha256"] and ends[0]["step"] == 24


def test_A14_the_first_save_is_not_tried_again(folder, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(apr.train.saver.time, "sleep", waits.append)
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda *_, **__: (_ for _ in ()).throw(
        StorageError("ckpt", "a folder that can be written", "a read-only one", "choose another")))
    with pytest.raises(StorageError, match="read-only"):
        pretrain(build_config(arguments(folder)), tmp_path / "run", "cpu", [])
    assert waits == []


def test_room_is_that_of_the_nearest_folder_that_is_there(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    require_room(tmp_path / "a" / "b", free // 2, "this")
    with pytest.raises(StorageError, match=r"a/b: expected .* GiB free for this"):
        require_room(tmp_path / "a" / "b", 4 * free, "this")


def test_what_a_kill_left_half_removed_goes_with_what_is_old(tmp_path):
    """A kill between the manifest's removal and the folder's: nobody would ever look at it again."""
    for step in (1, 2):
        save(tmp_path, trained(), step)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    save(tmp_path, trained(), 3)
    assert [checkpoint.step_of(p) for p in checkpoint.steps(tmp_path)] == [3, 2]
    elsewhere = tmp_path / "elsewhere"
    os.rename(tmp_path / "step-00000002", elsewhere)
    (tmp_path / "step-00000001").symlink_to(elsewhere)
    save(tmp_path, trained(), 4)
    save(tmp_path, trained(), 5)
    assert [checkpoint.step_of(p) for p in checkpoint.steps(tmp_path)] == [5, 4]
    assert checkpoint.read_checkpoint(elsewhere).state["step"] == 2


def test_A5_a_checkpoint_that_can_be_read_again_is_not_of_the_way_that_the_run_took(folder, tmp_path):
    """16 cannot be read for a while, the run goes on from 8 and is stopped at 11, and then 16 is back."""
    config, run_dir, manifest = build_config(arguments(folder)), tmp_path / "run", "ckpt/step-00000016/manifest.json"
    with pytest.raises(Stopped):
        pretrain(config, run_dir, "cpu", [stop_at(16, 15)])
    sound = (run_dir / manifest).read_bytes()
    (run_dir / manifest).write_bytes(b"")
    with pytest.raises(Stopped):
        resume(config, run_dir, "cpu", [stop_at(11, 15)], print)
    if (run_dir / manifest).exists():
        (run_dir / manifest).write_bytes(sound)
    assert [checkpoint.step_of(p) for p in checkpoint.steps(run_dir / "ckpt")] == [11, 8]
    resume(config, run_dir, "cpu", [], print)
    pretrain(config, tmp_path / "whole", "cpu", [])
    assert without_stop(end_state(run_dir)) == end_state(tmp_path / "whole")
