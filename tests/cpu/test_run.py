"""Whole runs on text: what they leave behind, and that stopping and resuming anywhere changes no bit of it."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import pytest
from models import YAML

import apr.train.saver
import apr.train.trainer
from apr.cli.main import build
from apr.cli.pretrain import build_config
from apr.errors import ConfigError, GateError, NotFoundError, Stopped, StorageError
from apr.formats.model_file import load_model
from apr.train import checkpoint
from apr.train.run import pretrain, read_run, resume

TIMES = ("tokens_per_sec", "wall_ms", "wall_seconds")


def arguments(folder, *more) -> Namespace:
    return build("pretrain").parse_args(["--config", str(folder / "run.yaml"), "--dataset", str(folder / "texts"),
                                         "--run-dir", "unused", *more])


@pytest.fixture(scope="module")
def whole(folder):
    """The undisturbed run: (run directory, its end state)."""
    run_dir = folder / "whole"
    pretrain(build_config(arguments(folder)), run_dir, "cpu", [])
    return run_dir


def end_state(run_dir):
    """What must be equal bit for bit: the final hashes and the log without times."""
    state = checkpoint.latest(run_dir / "ckpt", lambda _: None).state
    events = [json.loads(line) for line in (run_dir / "train.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in e.items() if k not in TIMES} for e in events if e["event"] not in ("resume", "start")]
    return state["step"], state["parameters_sha256"], state["optimizer_sha256"], log


def without_stop(state):
    """The log of a stopped and resumed run has one checkpoint more: that of the stop."""
    step, params, optimizer, log = state
    kept = [e for e in log if not (e["event"] == "checkpoint" and "epoch" not in e and e["step"] > 0)]
    return step, params, optimizer, kept


def stop_at(step, number):
    def sink(event):
        if event["event"] == "step" and event["step"] == step - 1:
            os.kill(os.getpid(), number)
    return sink


def test_what_a_run_leaves(whole):
    assert {p.name for p in whole.iterdir()} == {"run.json", "train.jsonl", "tokenizer.json", "ckpt", "lock"}
    assert {p.name for p in (whole / "ckpt").iterdir()} == {"step-00000016", "step-00000024"} | {
        f"epoch-00{i}.{kind}" for i in range(3) for kind in ("apr", "metadata.json")}
    meta = json.loads((whole / "ckpt" / "epoch-002.metadata.json").read_text())
    assert set(meta) == {"epoch", "train_loss", "val_loss", "train_ppl", "val_ppl", "optimizer_state_sha",
                         "wall_seconds", "tokens_seen", "grad_norm_max"}
    state = checkpoint.latest(whole / "ckpt", print)
    assert meta["optimizer_state_sha"] == state.state["optimizer_sha256"] and meta["tokens_seen"] == 24 * 4 * 2 * 16
    _, params, metadata = load_model(whole / "ckpt" / "epoch-002.apr")
    assert all((params[k] == v).all() for k, v in state.params.items()) and "tokenizer.json" in metadata
    events = [json.loads(line) for line in (whole / "train.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "start" and events[-1]["event"] == "end"
    assert events[-1]["status"] == "OK" and events[-1]["final_val_loss"] < events[-1]["initial_val_loss"]
    losses = [e["train_loss"] for e in events if e["event"] == "step"]
    assert len(losses) == 24 and losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("k", [1, 2, 5, 7, 8, 9, 12, 15, 16, 23])
def test_stop_at_k_and_resume(folder, whole, tmp_path, k):
    """N steps = k + (N - k): parameters, m, v and log, after a real signal at step k."""
    run_dir, number = tmp_path / "run", (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[k % 3]
    config = build_config(arguments(folder))
    with pytest.raises(Stopped) as stopped:
        pretrain(config, run_dir, "cpu", [stop_at(k, number)])
    assert stopped.value.exit_code == 75 and checkpoint.latest(run_dir / "ckpt", print).state["step"] == k
    resume(read_run(run_dir), run_dir, "cpu", [], print)
    assert without_stop(end_state(run_dir)) == end_state(whole)


def test_stop_in_mid_accumulation(folder, whole, tmp_path, monkeypatch):
    """A signal between two micro-batches: the step is finished first."""
    real, calls = apr.train.trainer.loss_and_gradients, iter(range(10**6))

    def interrupted(*args):
        if next(calls) == 2 * 10 + 1:  # second micro-batch of step 10
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(apr.train.trainer, "loss_and_gradients", interrupted)
    with pytest.raises(Stopped):
        pretrain(build_config(arguments(folder)), tmp_path / "run", "cpu", [])
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path / "run" / "ckpt", print).state["step"] == 11
    resume(read_run(tmp_path / "run"), tmp_path / "run", "cpu", [], print)
    assert without_stop(end_state(tmp_path / "run")) == end_state(whole)


def command(folder, run_dir, *more):
    return [sys.executable, "-m", "apr", "pretrain", "--config", str(folder / "run.yaml"),
            "--dataset", str(folder / "texts"), "--run-dir", str(run_dir), *more]


def wait_for_step(run_dir, step):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (run_dir / "train.jsonl").exists() and f'"step", "step": {step},' in (run_dir / "train.jsonl").read_text():
            return
        time.sleep(0.005)
    raise AssertionError("the run did not get there")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_process_stopped_or_killed_and_resumed(folder, whole, tmp_path, number, code):
    run_dir = tmp_path / "run"
    child = subprocess.Popen(command(folder, run_dir), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    wait_for_step(run_dir, 10)
    child.send_signal(number)
    stderr = child.communicate(timeout=60)[1].decode()
    assert child.returncode == code, stderr
    assert "Traceback" not in stderr
    done = subprocess.run(command(folder, run_dir, "--resume"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert without_stop(end_state(run_dir)) == end_state(whole)


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(folder, whole, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(Stopped):
        pretrain(build_config(arguments(folder)), run_dir, "cpu", [stop_at(12, signal.SIGTERM)])
    newest = run_dir / "ckpt" / "step-00000012" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    warnings = []
    resume(read_run(run_dir), run_dir, "cpu", [], warnings.append)
    assert len(warnings) == 1 and "step-00000012" in warnings[0]
    assert end_state(run_dir) == end_state(whole)


def test_resuming_refuses_other_flags_other_data_and_no_run(folder, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(Stopped):
        pretrain(build_config(arguments(folder)), run_dir, "cpu", [stop_at(3, signal.SIGTERM)])
    other = subprocess.run(command(folder, run_dir, "--resume", "--lr", "0.1"), capture_output=True, text=True)
    assert other.returncode == 2 and "train.lr" in other.stderr and "0.1" in other.stderr
    again = subprocess.run(command(folder, run_dir), capture_output=True, text=True)
    assert again.returncode == 2 and "another run" in again.stderr
    with pytest.raises(NotFoundError):
        read_run(tmp_path / "nothing")
    config = read_run(run_dir)
    (folder / "texts" / "zzz.txt").write_text("one more text that was not there before")
    try:
        with pytest.raises(ConfigError, match="tokens that the run began with"):
            resume(config, run_dir, "cpu", [], print)
    finally:
        (folder / "texts" / "zzz.txt").unlink()


def test_two_writers_of_one_directory(folder, tmp_path):
    run_dir = tmp_path / "run"
    child = subprocess.Popen(command(folder, run_dir, "--num-steps", "100000"), stderr=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL)
    try:
        wait_for_step(run_dir, 2)
        with pytest.raises(ConfigError, match="pid"):
            resume(read_run(run_dir), run_dir, "cpu", [], print)
    finally:
        child.kill()
        child.wait()


def test_a_second_signal_ends_at_once(folder, tmp_path):
    run_dir = tmp_path / "run"
    slow = command(folder, run_dir, "--num-steps", "100000", "--batch-size", "16", "--grad-accum", "64")
    child = subprocess.Popen(slow, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for_step(run_dir, 0)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=10) in (-15, 75)  # 75 if the step ended between the two
    assert checkpoint.latest(run_dir / "ckpt", print).state["step"] in (0, 1, 2)


def test_a_failed_save_is_exit_7_and_keeps_the_checkpoint_before(folder, tmp_path, monkeypatch):
    run_dir, real = tmp_path / "run", checkpoint.write_durable

    def fail_later(path, *parts):
        if "step-00000016" in str(path) and path.name == "model.safetensors":
            raise OSError(28, "No space left on device")
        return real(path, *parts)

    monkeypatch.setattr(checkpoint, "write_durable", fail_later)
    monkeypatch.setattr(apr.train.saver, "RETRY_SECONDS", (0.01,))
    with pytest.raises(StorageError, match="No space left"):
        pretrain(build_config(arguments(folder)), run_dir, "cpu", [])
    monkeypatch.undo()
    assert checkpoint.latest(run_dir / "ckpt", print).state["step"] == 8
    assert resume(read_run(run_dir), run_dir, "cpu", [], print)["status"] == "OK"


def test_data_that_end_end_the_run(folder, tmp_path):
    (tmp_path / "run.yaml").write_text(YAML.replace("allow_shard_cycle: true", "allow_shard_cycle: false"))
    args = build("pretrain").parse_args(["--config", str(tmp_path / "run.yaml"), "--dataset", str(folder / "texts"),
                                         "--run-dir", "unused", "--num-steps", "5000", "--steps-per-epoch", "1000"])
    end = pretrain(build_config(args), tmp_path / "run", "cpu", [])
    config = build_config(args)
    assert end["status"] == "EXHAUSTED" and 5 < end["steps_recorded"] < 5000 and end["final_val_loss"] is not None
    assert end["tokens_seen"] == end["steps_recorded"] * config.train.tokens_per_step


def test_a_gate_ends_the_run_with_5(folder, tmp_path):
    tokens = np.full(5000, 17, "<u4")  # upstream's corpus that was nearly all <unk>
    tokens[::1000] = 5
    (tmp_path / "flat.bin").write_bytes(tokens.tobytes())
    done = subprocess.run([*command(folder, tmp_path / "run"), "--dataset", str(tmp_path / "flat.bin")],
                          capture_output=True, text=True)
    assert done.returncode == 5 and "GATE-CORPUS-ENTROPY" in done.stderr and not (tmp_path / "run").exists()
    with pytest.raises(GateError, match="INV-TRAIN-00"):
        args = arguments(folder, "--lr", "3e4")
        pretrain(build_config(args), tmp_path / "diverges", "cpu", [])
    assert json.loads((tmp_path / "diverges" / "train.jsonl").read_text().splitlines()[-1])["status"] == "ABORTED"
