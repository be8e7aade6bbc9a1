"""Runs on the GPU: stopping and resuming changes no bit, two cold runs are equal, checkpoints go from CPU to GPU."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from models import YAML

from apr.cli.main import build
from apr.cli.pretrain import build_config
from apr.errors import Stopped
from apr.train import checkpoint
from apr.train.run import pretrain, read_run, resume

ROOT = Path(__file__).parents[2]
TIMES = ("tokens_per_sec", "wall_ms", "wall_seconds")
HUNDRED = """
import sys
sys.path.insert(0, "tests")
from models import FAMILIES, random_batch, train_config
from apr.train.cuda_trainer import CudaTransformerTrainer
import dataclasses
model = dataclasses.replace(FAMILIES[sys.argv[1]], head_dim=64, hidden_size=256, vocab_size=1000, intermediate_size=512)
t = CudaTransformerTrainer.new(model, train_config(precision="bf16", max_seq_len=64, max_steps=100))
for s in range(100):
    t.train_batch([random_batch(s, 4, 64, 1000), random_batch(1000 + s, 3, 50, 1000)])
assert t.dev.cache.counts.compiled > 0, "the cache was not cold"
print(t.parameters_sha256(), t.optimizer_state_sha256(), t.step)
"""


@pytest.fixture(scope="module")
def run_yaml(folder):
    """A run whose head size bf16 covers."""
    path = folder / "gpu.yaml"
    path.write_text(YAML.replace("head_dim: 8", "head_dim: 32"))
    return path


def config_of(folder, run_yaml, precision):
    arguments = build("pretrain").parse_args(["--config", str(run_yaml), "--dataset", str(folder / "texts"),
                                              "--run-dir", "unused", "--precision", precision])
    return build_config(arguments)


def end_state(run_dir):
    """Final hashes, and the log without times and without the stop's own lines."""
    state = checkpoint.latest(run_dir / "ckpt", lambda _: None).state
    events = [json.loads(line) for line in (run_dir / "train.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in e.items() if k not in TIMES} for e in events if e["event"] in ("step", "eval", "end")]
    return state["step"], state["parameters_sha256"], state["optimizer_sha256"], log


def stop_at(step, number=signal.SIGTERM):
    def sink(event):
        if event["event"] == "step" and event["step"] == step - 1:
            os.kill(os.getpid(), number)
    return sink


@pytest.fixture(scope="module")
def whole(dev, folder, run_yaml):
    """The undisturbed bf16 run."""
    pretrain(config_of(folder, run_yaml, "bf16"), folder / "whole-gpu", "cuda:0", [])
    return end_state(folder / "whole-gpu")


@pytest.mark.parametrize("k", [1, 2, 5, 7, 8, 9, 12, 15, 16, 22])
def test_stop_at_k_and_resume_is_the_same_run(dev, folder, run_yaml, whole, tmp_path, k):
    """Asked to stop after k steps, of which the next has been started by then, except at the end of an epoch of 8."""
    run_dir = tmp_path / "run"
    with pytest.raises(Stopped):
        pretrain(config_of(folder, run_yaml, "bf16"), run_dir, "cuda:0", [stop_at(k)])
    assert checkpoint.latest(run_dir / "ckpt", print).state["step"] == (k if k % 8 == 0 else k + 1)
    resume(read_run(run_dir), run_dir, "cuda:0", [], print)
    assert end_state(run_dir) == whole


def test_a_checkpoint_keeps_the_algorithms_of_the_products(dev, folder, whole):
    state = checkpoint.latest(folder / "whole-gpu" / "ckpt", print).state
    record = state["trainer"]["gemm"]
    assert record["gpu"] == dev.name and record["cublaslt"] > 0
    assert record["algorithms"] and all(len(v) == 128 for v in record["algorithms"].values())


def test_a_cpu_run_goes_on_on_the_gpu_and_back(dev, folder, run_yaml, tmp_path):
    config = config_of(folder, run_yaml, "fp32")
    pretrain(config, tmp_path / "cpu", "cpu", [])
    run_dir = tmp_path / "mixed"
    with pytest.raises(Stopped):
        pretrain(config, run_dir, "cpu", [stop_at(7)])
    with pytest.raises(Stopped):
        resume(read_run(run_dir), run_dir, "cuda:0", [stop_at(14)], print)
    resume(read_run(run_dir), run_dir, "cpu", [], print)
    expected, found = end_state(tmp_path / "cpu")[3], end_state(run_dir)[3]
    expected, found = ([e for e in log if e["event"] == "step"] for log in (expected, found))
    assert [e["step"] for e in found] == list(range(24))
    for a, b in zip(expected, found, strict=True):
        assert abs(a["train_loss"] - b["train_loss"]) <= 1e-4 and a["lr"] == b["lr"], f"step {a['step']}"


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_two_cold_runs_of_a_hundred_steps_are_equal(dev, tmp_path, family):
    outputs = []
    for name in ("a", "b"):
        run = subprocess.run([sys.executable, "-c", HUNDRED, family], cwd=ROOT, capture_output=True, text=True,
                             check=False, env={**os.environ, "APR_CACHE_DIR": str(tmp_path / name),
                                               "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])})
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert outputs[0] == outputs[1] and outputs[0].split()[-1] == "100"
    assert hashlib.sha256(b"").hexdigest() not in outputs[0]
