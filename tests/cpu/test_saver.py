"""Saving beside the training: what is written is the state at the call, and nothing that fails is lost sight of."""

import os
import signal
import threading
import time

import pytest
from test_run import arguments, end_state, stop_at, without_stop

import apr.train.real_run
import apr.train.saver
from apr.cli.pretrain import build_config
from apr.errors import ConfigError, DeviceFault, Stopped, StorageError
from apr.train import checkpoint
from apr.train.run import DirectoryLock, pretrain, read_run, resume
from apr.train.saver import Saver
from apr.train.snapshot import Snapshot
from apr.train.trainer import TransformerTrainer


@pytest.fixture
def beside(monkeypatch):
    """The NumPy trainer gives copies, as a GPU's does, so that it is saved beside its steps."""
    def snapshot(trainer):
        return Snapshot(trainer.step, {k: v.copy() for k, v in trainer.params.items()},
                        {k: v.copy() for k, v in trainer.optimizer_state().items()})

    monkeypatch.setattr(TransformerTrainer, "copies", True)
    monkeypatch.setattr(TransformerTrainer, "snapshot", snapshot)


@pytest.fixture
def slow(monkeypatch):
    """Saves beside the steps wait, before they look at anything, until `slow` is set; `slow.waiting`: one does."""
    go = threading.Event()
    go.waiting = threading.Event()

    def require_room(*_):
        if threading.current_thread() is not threading.main_thread():
            go.waiting.set()
            assert go.wait(30)

    monkeypatch.setattr(apr.train.real_run, "require_room", require_room)
    return go


def test_A13_what_is_saved_is_the_state_at_the_call_while_steps_go_on(folder, tmp_path, beside, slow):
    """The save of step 8 is written when step 15 is done, and is what an undisturbed run saves at step 8."""
    config = build_config(arguments(folder))

    def release(event):
        if event["event"] == "step" and event["step"] == 14:
            assert slow.waiting.is_set() and not (tmp_path / "run/ckpt/step-00000008").exists()
            slow.set()
        if event["event"] == "checkpoint" and event["step"] == 16:
            assert (tmp_path / "run/ckpt/step-00000008").exists()
            os.rename(tmp_path / "run/ckpt/step-00000008", tmp_path / "eight")

    pretrain(config, tmp_path / "run", "cpu", [release])
    with pytest.raises(Stopped):
        pretrain(config, tmp_path / "short", "cpu", [stop_at(8, signal.SIGTERM)])
    late, plain = checkpoint.read_checkpoint(tmp_path / "eight"), checkpoint.latest(tmp_path / "short/ckpt", print)
    assert plain.state["step"] == 8
    for key in ("step", "optimizer_step", "parameters_sha256", "optimizer_sha256", "data"):
        assert late.state[key] == plain.state[key], key
    assert [late.state["loop"][k] for k in ("step", "epoch", "losses")] == [plain.state["loop"][k] for k in
                                                                           ("step", "epoch", "losses")]


def test_A13_a_run_is_the_same_whether_it_saves_beside_its_steps(folder, tmp_path, monkeypatch, request):
    pretrain(build_config(arguments(folder)), tmp_path / "plain", "cpu", [])
    request.getfixturevalue("beside")
    pretrain(build_config(arguments(folder)), tmp_path / "beside", "cpu", [])
    assert end_state(tmp_path / "plain") == end_state(tmp_path / "beside")
    name = "ckpt/epoch-001.apr"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes()


def test_A13_what_could_not_be_saved_ends_the_run_at_the_next_save_and_costs_no_bit(folder, tmp_path, beside,
                                                                                    monkeypatch):
    real = checkpoint.write_checkpoint

    def write(ckpt_dir, step, *rest, **more):
        if step == 8:
            raise StorageError(str(ckpt_dir), "room", "none", "free space")
        return real(ckpt_dir, step, *rest, **more)

    monkeypatch.setattr(checkpoint, "write_checkpoint", write)
    monkeypatch.setattr(apr.train.saver, "RETRY_SECONDS", (0.0,))
    seen = []
    with pytest.raises(StorageError, match="room"):
        pretrain(build_config(arguments(folder)), tmp_path / "run", "cpu", [seen.append])
    assert [e["step"] for e in seen if e["event"] == "checkpoint"] == [0, 8]
    assert any("not saved" in e["text"] for e in seen if e["event"] == "note") and seen[-1]["status"] == "ABORTED"
    monkeypatch.undo()
    resume(read_run(tmp_path / "run"), tmp_path / "run", "cpu", [], print)
    pretrain(build_config(arguments(folder)), tmp_path / "whole", "cpu", [])
    assert without_stop(end_state(tmp_path / "run")) == end_state(tmp_path / "whole")


def test_E1_a_stop_waits_until_its_checkpoint_is_on_the_disk(folder, tmp_path, beside, slow):
    def later(event):
        if event["event"] == "checkpoint" and event["step"]:
            threading.Timer(0.3, slow.set).start()

    with pytest.raises(Stopped):
        pretrain(build_config(arguments(folder)), tmp_path / "run", "cpu", [stop_at(5, signal.SIGTERM), later])
    assert checkpoint.latest(tmp_path / "run/ckpt", print).state["step"] == 5


def test_A10_the_directory_is_held_until_its_writing_is_over(folder, tmp_path, beside, slow, monkeypatch):
    """A run that ends with an error while a save is under way."""
    held = []

    def fail(event):
        if event["event"] == "step" and event["step"] == 9:
            threading.Timer(0.3, lambda: (held.append(taken(tmp_path / "run")), slow.set())).start()
            raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError):
        pretrain(build_config(arguments(folder)), tmp_path / "run", "cpu", [fail])
    assert held == [True] and not taken(tmp_path / "run")
    assert checkpoint.latest(tmp_path / "run/ckpt", print).state["step"] == 8


def taken(run_dir):
    """Whether another could not have the directory: a lock is its file's, not its process's."""
    try:
        with DirectoryLock(run_dir):
            return False
    except ConfigError:
        return True


def test_a_lost_device_is_not_waited_for(slow):
    saver, began = Saver(print), time.monotonic()
    with pytest.raises(DeviceFault), saver:
        saver.save(lambda: slow.wait(20), beside=True)
        raise DeviceFault("the GPU", "no fault", "one", "stop")
    assert time.monotonic() - began < 5
    slow.set()


@pytest.mark.parametrize("beside_steps", [False, True])
def test_a_save_that_fails_is_made_again_and_said(beside_steps, monkeypatch):
    monkeypatch.setattr(apr.train.saver, "RETRY_SECONDS", (0.0, 0.0))
    left, said = [3], []

    def write():
        left[0] -= 1
        if left[0]:
            raise StorageError("a folder", "room", f"{left[0]}", "wait")

    with Saver(said.append) as saver:
        saver.save(write, beside_steps)
        saver.finish()
        assert left == [0] and len(said) == 2 and all(t.endswith("; again in 0 s") for t in said)
        left[0], said[:] = 9, []
        with pytest.raises(StorageError, match="found 6"):
            saver.save(write, beside_steps)
            saver.finish()
        saver.finish()  # it has been said
        with pytest.raises(StorageError, match="found 5"):
            saver.save(write, beside_steps, again=False)
            saver.finish()
