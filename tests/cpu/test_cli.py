"""The command line as a person or a script meets it: streams, exit codes, JSON, devices, and what is refused."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from apr.cli.main import COMMANDS


def apr(*arguments, env=None, **options):
    """Run the command where no GPU can be seen; returns (exit code, stdout, stderr)."""
    env = {**(os.environ if env is None else env), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "apr", *map(str, arguments)], capture_output=True, text=True,
                          timeout=120, env=env, **options)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def pretrain(folder, *more, **options):
    return apr("pretrain", "--config", folder / "run.yaml", "--dataset", folder / "texts", *more, **options)


def test_help_and_version():
    code, out, _ = apr("--help")
    assert code == 0 and all(name in out for name in COMMANDS)
    assert apr("--version")[:2] == (0, "apr 0.1.0\n")
    for name in COMMANDS:
        code, out, _ = apr(name, "--help")
        assert code == 0 and out.startswith("usage: apr " + name)


def test_every_upstream_flag_is_there():
    flags = ["dataset", "tokenizer", "run-dir", "mode", "lr", "num-steps", "warmup-steps", "batch-size", "seq-length",
             "steps-per-epoch", "seed", "target-val-loss", "vocab-size", "synthetic", "device", "init",
             "force-under-provisioned", "val-shard", "json", "allow-shard-cycle", "preset", "config", "precision",
             "grad-accum", "resume", "demo", "force-init-loss", "weights"]
    listed = re.findall(r"^  --([\w-]+)", apr("pretrain", "--help")[1], re.M)  # not in the text about other flags
    assert [f for f in flags if f not in listed] == []


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["nonsense"], 2, "nonsense"), (["pretrain"], 2, "--run-dir"), (["pretrain", "--run-dir", "x"], 2, "INV-TRAIN-010"),
    (["pretrain", "--run-dir", "x", "--dataset", "nowhere"], 3, "nowhere"),
    (["pretrain", "--run-dir", "x", "--lr", "fast", "--demo"], 2, "--lr"),
    (["pretrain", "--run-dir", "x", "--demo", "--lr", "nan"], 2, "lr"),
    (["pretrain", "--run-dir", "x", "--demo", "--num-steps", "0"], 2, "max_steps"),
    (["pretrain", "--run-dir", "x", "--demo", "--preset", "qwen2_05b"], 2, "qwen2_0_5b"),
    (["pretrain", "--run-dir", "x", "--demo", "--seq-length", "999"], 2, "max_position"),
    (["pretrain", "--run-dir", "x", "--demo", "--precision", "bf16"], 9, "fp32"),
    (["pretrain", "--run-dir", "x", "--init", "no.apr", "--demo"], 2, "--init"),
    (["pretrain", "--run-dir", "x", "--init", "no.apr", "--dataset", "y"], 3, "no.apr"),
    (["inspect", "nowhere"], 3, "nowhere"), (["tokenize", "nowhere", "--output", "o"], 2, "--tokenizer"),
    (["tokenize", "nowhere", "--output", "o", "--vocab-size", "300"], 3, "nowhere"),
    (["pretrain", "--resume", "--run-dir", "x"], 3, "run.json")])
def test_refusals_are_one_line_with_the_right_code(tmp_path, arguments, code, says):
    found, out, err = apr(*arguments, cwd=tmp_path)
    assert (found, out) == (code, "") and says in err
    lines = [line for line in err.splitlines() if not line.startswith("device: ")]
    assert len(lines) == 1 and lines[0].startswith("apr: ") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:15"])
def test_cuda_is_refused_at_once_and_never_replaced(folder, tmp_path, device):
    start = time.perf_counter()
    assert pretrain(folder)[0] == 2  # no --run-dir: what it takes to refuse anything on this machine
    usage = time.perf_counter() - start
    code, out, err = pretrain(folder, "--run-dir", tmp_path / "run", "--device", device)
    seconds = time.perf_counter() - start - usage
    assert code == 9 and "GATE-GPUTRAIN-002" in err and out == "" and seconds < max(2, 2 * usage)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["cuda:16", "cuda:01", "CUDA", "gpu", "", "cuda:", "cpu:0", "cuda:1x"])
def test_device_grammar(tmp_path, device):
    code, _, err = apr("pretrain", "--demo", "--run-dir", tmp_path / "run", "--device", device)
    assert code == 2 and "--device" in err


def test_environment(tmp_path):
    base = {"PATH": "/usr/bin:/bin"}
    assert apr("pretrain", "--demo", "--run-dir", tmp_path / "run", env={**base, "APR_DEVICE": "cuda"})[0] == 9
    code, _, err = apr("inspect", "x", env={**base, "APR_TRACEBCK": "1"})
    assert code == 2 and "APR_TRACEBACK" in err


def test_a_run_in_json_and_for_people(folder, tmp_path):
    code, out, err = pretrain(folder, "--run-dir", tmp_path / "a", "--json", "--device", "cpu")
    assert code == 0 and "\x1b" not in out + err
    events = [json.loads(line) for line in out.splitlines()]
    assert events == [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "end" and events[-1]["status"] == "OK"
    assert {"status", "initial_val_loss", "final_val_loss"} <= events[-1].keys()
    code, out, err = pretrain(folder, "--run-dir", tmp_path / "b")
    assert code == 0 and "device: cpu (reason:" in err and "training loss" in out
    assert out.rstrip().endswith(str(tmp_path / "b")) and "\x1b" not in out + err
    again = [json.loads(line) for line in (tmp_path / "b" / "train.jsonl").read_text().splitlines()]

    def losses(run):
        return [e["train_loss"] for e in run if e["event"] == "step"]
    assert losses(again) == losses(events)  # INV-TRAIN-006


def test_tokenize_then_train_then_inspect_then_go_on_from_the_result(folder, tmp_path):
    code, out, _ = apr("tokenize", folder / "texts", "--output", tmp_path / "shards", "--vocab-size", "320",
                       "--shard-tokens", "3000", "--json")
    made = json.loads(out)
    assert code == 0 and made["shards"] > 1 and made["documents"] == 40
    code, out, _ = apr("inspect", tmp_path / "shards", "--json")
    assert code == 0 and json.loads(out)["tokens"] == made["tokens"]
    code, _, err = apr("pretrain", "--config", folder / "run.yaml", "--dataset", tmp_path / "shards",
                       "--run-dir", tmp_path / "run")
    assert code == 0, err
    for path in ("run", "run/ckpt/step-00000024", "run/ckpt/epoch-002.apr", "run/ckpt/step-00000024/model.safetensors",
                 "run/tokenizer.json"):
        code, out, err = apr("inspect", tmp_path / path, "--json")
        assert code == 0, err
        assert json.loads(out)["kind"] in ("run", "checkpoint", "apr", "safetensors", "tokenizer")
        assert apr("inspect", tmp_path / path)[0] == 0
    start = ["pretrain", "--init", tmp_path / "run/ckpt/epoch-002.apr", "--dataset", tmp_path / "shards",
             "--num-steps", "3", "--batch-size", "2", "--seq-length", "16", "--run-dir", tmp_path / "more"]
    code, _, err = apr(*start)
    assert code == 2 and "CHINCHILLA-001" in err and not (tmp_path / "more").exists()
    code, _, err = apr(*start, "--force-under-provisioned")
    assert code == 0, err

    def read(name):
        return [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
    before, after = read("run")[-1]["final_val_loss"], read("more")
    assert after[0]["mode"] == "finetune"
    assert abs(after[-1]["initial_val_loss"] - before) < 0.2  # the weights did arrive


def test_synthetic_runs_say_so_and_make_no_checkpoint(tmp_path):
    def lines(name):
        code, out, _ = apr("pretrain", "--synthetic", "--num-steps", "20", "--steps-per-epoch", "5",
                           "--run-dir", tmp_path / name, "--json")
        assert code == 0 and not (tmp_path / name / "ckpt").exists()
        return [{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_sec", "wall_ms", "wall_seconds")}
                for line in out.splitlines()]
    first, second, third = lines("a"), lines("b"), lines("c")
    assert first[0]["synthetic"] is True and first[-1]["status"] == "OK"
    assert first == second == third  # INV-GPUTRAIN-004
