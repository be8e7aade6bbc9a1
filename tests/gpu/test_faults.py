"""Device faults (table G): a sticky error ends the process with exit 10 and one line, and loses no checkpoint."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import FAMILIES, YAML, random_batch, train_config

from apr.train import checkpoint
from apr.train.cuda_trainer import CudaTransformerTrainer

ROOT = Path(__file__).parents[2]
MAIN = "import sys; from apr.cli.main import main; sys.exit(main(sys.argv[1:]))"
BAD = """
import sys, numpy as np
from pathlib import Path
from apr.kernel import KernelSpec
from apr.ptx_cache import PtxCache
from apr.train.cuda_trainer import CudaTransformerTrainer

folder = Path(sys.argv[1]) / "kernels"
folder.mkdir()
(folder / "common.cuh").write_text("using f32 = float; struct bf16 { short bits; }; using floatX = K_FLOATX;")
(folder / "fault.cu").write_text('#include "common.cuh"\\nextern "C" __global__ void write_at_0x10(int n) '
                                 '{ *(volatile floatX*)0x10 = floatX{}; }')
SPEC = KernelSpec("fault.cu", "write_at_0x10", ("FLOATX",), ("n:i32",))
steps, original = [], CudaTransformerTrainer._step

def faulty(self, *args):
    steps.append(1)
    if len(steps) == 5:
        cache = PtxCache(self.dev.cache.arch, folder / "cache", folder)
        kernel = cache.get(SPEC, {"FLOATX": "f32"})
        kernel.launch(self.dev.stream.ptr, (1,), (1,), (np.int32(1),))
        self.dev.launched(kernel.key)
    return original(self, *args)

CudaTransformerTrainer._step = faulty
from apr.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def python(tmp_path, code, *arguments, **environment):
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                         check=False, timeout=120,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment})
    return run, time.monotonic() - start


@pytest.mark.parametrize("sync", ["0", "1"])
def test_g4_illegal_address_ends_the_run_and_keeps_the_checkpoint(dev, folder, tmp_path, sync):
    (tmp_path / "run.yaml").write_text(YAML.replace("steps_per_epoch: 8", "steps_per_epoch: 3"))
    run, seconds = python(tmp_path, BAD, tmp_path, "pretrain", "--config", tmp_path / "run.yaml", "--dataset",
                          folder / "texts", "--run-dir", tmp_path / "run", "--device", "cuda", "--precision", "fp32",
                          APR_SYNC=sync)
    assert run.returncode == 10, run.stderr
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("apr: ") and "write_at_0x10" in line and "resume" in line and "Traceback" not in run.stderr
    assert "ILLEGAL_ADDRESS" in line.upper().replace("ILLEGALADDRESS", "ILLEGAL_ADDRESS")
    if sync == "1":
        assert line.count(" of ") == 1 or "one of: write_at_0x10" in line  # it names its own kernel alone
    assert seconds < 60
    assert checkpoint.latest(tmp_path / "run" / "ckpt", print).state["step"] == 3
    events = [json.loads(text) for text in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "end" and events[-1]["status"] == "ABORTED" and events[-2]["step"] == 3


def test_g3_too_large_a_plan_exits_11_before_it_allocates(dev, folder, tmp_path):
    large = YAML.replace("hidden_size: 32", "hidden_size: 32768").replace("intermediate_size: 48",
                                                                           "intermediate_size: 131072")
    (tmp_path / "run.yaml").write_text(large)
    run, _ = python(tmp_path, MAIN, "pretrain", "--config", tmp_path / "run.yaml", "--dataset", folder / "texts",
                    "--run-dir", tmp_path / "run", "--device", "cuda", "--precision", "fp32")
    assert run.returncode == 11, run.stderr
    line = run.stderr.strip().splitlines()[-1]
    assert "GiB free" in line and "lower --batch-size" in line and not (tmp_path / "run").exists()


def test_g1_no_visible_gpu_exits_9_although_the_cache_is_warm(dev, folder, tmp_path):
    run, seconds = python(tmp_path, MAIN, "pretrain", "--demo", "--run-dir", tmp_path / "run", "--device", "cuda",
                          CUDA_VISIBLE_DEVICES="", APR_CACHE_DIR=str(dev.cache.store.path))
    assert run.returncode == 9 and "GATE-GPUTRAIN-002" in run.stderr and not (tmp_path / "run").exists()
    assert len(run.stderr.strip().splitlines()) == 1 and seconds < 10


@pytest.mark.alone
def test_g8_training_goes_on_when_another_takes_the_rest_of_the_memory(dev, folder):
    """A step needs no memory that it does not have: state is as after the last step, whatever others do."""
    t = CudaTransformerTrainer.new(FAMILIES["llama"], train_config(), dev)
    for step in range(3):
        t.train_batch(random_batch(step))
    ballast = []
    for size in (1 << 34, 1 << 30, 1 << 26, 1 << 22):
        while dev.free_bytes()[0] > size + (8 << 20):
            ballast.append(dev.empty((size,), "u8"))
    loss = t.train_batch(random_batch(3))
    assert t.last_stats.applied and loss > 0 and dev.free_bytes()[0] < 64 << 20
    ballast.clear()
