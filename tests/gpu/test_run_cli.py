"""`apr run` on a GPU, through the command: the same text as the CPU's, behind the gate, which is remembered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import apr

MODEL = Path(__file__).parents[1] / "golden" / "hf" / "qwen2"


def run(cache, *arguments, code=0, **environment):
    """Exit code, the objects on stdout, the lines on stderr."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "APR_CACHE_DIR": str(cache),
           **environment}
    done = subprocess.run([sys.executable, "-m", "apr", "run", str(MODEL), *arguments, "--json"], capture_output=True,
                          text=True, timeout=120, env=env, check=False)
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture
def cache(tmp_path, dev):
    """A kernel cache for these processes; `dev` so that the test is skipped without a GPU."""
    return tmp_path / "cache"


DRAWN = ("--temperature", "0.8", "--top-p", "0.9", "--seed", "3")


@pytest.mark.parametrize("settings", [(), DRAWN], ids=["greedy", "drawn"])
def test_the_gpu_writes_what_the_cpu_writes(cache, tmp_path, settings):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\nanother one\na third, which is longer\n")
    shared = ("--prompts", str(prompts), "--max-tokens", "40", *settings)
    gpu, _ = run(cache, *shared, "--device", "cuda", "--precision", "fp32")
    cpu, _ = run(cache, *shared, "--no-gpu")
    assert {c["index"]: (c["tokens"], c["text"], c["finish_reason"]) for c in gpu} \
        == {c["index"]: (c["tokens"], c["text"], c["finish_reason"]) for c in cpu}
    assert {(c["device"], c["precision"], c["gate"]["status"]) for c in gpu} == {("cuda:0", "fp32", "passed")}
    again, _ = run(cache, *shared, "--device", "cuda", "--precision", "fp32")
    assert [c["gate"]["status"] for c in again] == ["remembered"] * 3
    assert [c["tokens"] for c in again] == [c["tokens"] for c in gpu]


def test_a_gate_that_is_skipped_is_announced(cache):
    (found,), err = run(cache, "hello", "--max-tokens", "3", "--device", "cuda", "--precision", "fp32",
                        SKIP_PARITY_GATE="1")
    assert found["gate"] == {"status": "skipped", "reason": "SKIP_PARITY_GATE=1"} and "SKIP_PARITY_GATE=1" in err


def test_heads_that_bf16_attention_lacks_are_exit_9(cache):
    found, err = run(cache, "hello", "--device", "cuda", code=9)
    assert found == [] and "--precision fp32" in err and len(err.splitlines()) == 1


def test_apr_load_in_python(dev):
    gpu, cpu = apr.load(MODEL, "cuda", precision="fp32"), apr.load(MODEL, "cpu")
    assert gpu.engine.gate["status"] in ("passed", "remembered")
    assert gpu.generate("hello", max_tokens=20).tokens == cpu.generate("hello", max_tokens=20).tokens
