"""Device faults (table G): a sticky error ends the process with exit 10 and one line, and loses no checkpoint."""

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from models import FAMILIES, YAML, random_batch, train_config

from apr.cli.main import build
from apr.cli.pretrain import build_config
from apr.errors import DeviceFault, GateError, OutOfMemoryError
from apr.train import checkpoint
from apr.train.cuda_trainer import CudaTransformerTrainer
from apr.train.recovery import first_not_finite
from apr.train.run import pretrain

ROOT = Path(__file__).parents[2]
MAIN = "import sys; from apr.cli.main import main; sys.exit(main(sys.argv[1:]))"
# A run whose fifth step launches a kernel that is no good: BODY is what it does.
BAD = """
import sys, time, numpy as np
from pathlib import Path
from apr.kernel import KernelSpec
from apr.ptx_cache import PtxCache
from apr.train.cuda_trainer import CudaTransformerTrainer

home = Path(sys.argv[1])
(home / "kernels").mkdir()
(home / "kernels" / "common.cuh").write_text(
    "using f32 = float; struct bf16 { short bits; }; using floatX = K_FLOATX;")
(home / "kernels" / "fault.cu").write_text(
    '#include "common.cuh"\\nextern "C" __global__ void no_good(int n) { BODY }')
SPEC = KernelSpec("fault.cu", "no_good", ("FLOATX",), ("n:i32",))
steps, original = [], CudaTransformerTrainer._step

def faulty(self, *args):
    steps.append(1)
    if len(steps) == 5:
        cache = PtxCache(self.dev.cache.arch, home / "cache", home / "kernels")
        kernel = cache.get(SPEC, {"FLOATX": "f32"})
        kernel.launch(self.dev.stream.ptr, (1,), (1,), (np.int32(1),))
        (home / "when").write_text(str(time.monotonic()))
        self.dev.launched(kernel.key)
    return original(self, *args)

CudaTransformerTrainer._step = faulty
from apr.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
WRITES = BAD.replace("BODY", "*(volatile floatX*)0x10 = floatX{};")
ASSERTS = BAD.replace("BODY", 'asm volatile("trap;");')
SPINS = BAD.replace("BODY", "while (n) __nanosleep(1000);")


def python(tmp_path, code, *arguments, **environment):
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                         check=False, timeout=120,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment})
    return run, time.monotonic()


def bad_run(folder, tmp_path, code, *more, **environment):
    """The last line of stderr of a run that a kernel ends with exit 10, and the seconds from its launch to the end."""
    (tmp_path / "run.yaml").write_text(YAML.replace("steps_per_epoch: 8", "steps_per_epoch: 3"))
    run, ended = python(tmp_path, code, tmp_path, "pretrain", "--config", tmp_path / "run.yaml", "--dataset",
                        folder / "texts", "--run-dir", tmp_path / "run", "--device", "cuda", "--precision", "fp32",
                        *more, **environment)
    assert run.returncode == 10, run.stderr
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("apr: ") and "no_good" in line and "resume" in line and "Traceback" not in run.stderr
    return line, ended - float((tmp_path / "when").read_text())


@pytest.mark.parametrize("sync", ["0", "1"])
@pytest.mark.parametrize(("code", "name"), [(WRITES, "ILLEGALADDRESS"), (ASSERTS, "LAUNCHFAILURE|ILLEGALINSTRUCTION")],
                         ids=["G4", "G5"])
def test_a_sticky_error_ends_the_run_within_seconds_and_keeps_the_checkpoint(dev, folder, tmp_path, sync, code, name):
    line, seconds = bad_run(folder, tmp_path, code, APR_SYNC=sync)
    assert re.search(name, line.upper().replace("_", "")), line
    if sync == "1":
        assert line.count(" of ") == 1 or "one of: no_good" in line  # it names its own kernel alone
    assert seconds < 5
    assert checkpoint.latest(tmp_path / "run" / "ckpt", print).state["step"] == 3
    events = [json.loads(text) for text in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "end" and events[-1]["status"] == "ABORTED" and events[-2]["step"] == 3


def test_E5_a_kernel_that_does_not_end_ends_the_run_and_the_gpu_is_free_again(dev, folder, tmp_path):
    """The watchdog's process leaves without a word to CUDA, and the driver takes the kernel away."""
    free = dev.free_bytes()[0]
    line, seconds = bad_run(folder, tmp_path, SPINS, "--step-timeout", "4")
    assert "expected its end within 4 s" in line and 4 <= seconds < 15
    assert checkpoint.latest(tmp_path / "run" / "ckpt", print).state["step"] == 3
    assert dev.free_bytes()[0] > free - (64 << 20)
    t = CudaTransformerTrainer.new(FAMILIES["llama"], train_config(), dev)
    assert t.train_batch(random_batch(0)) > 0


def test_G3_too_large_a_plan_exits_11_before_it_allocates(dev, folder, tmp_path):
    large = YAML.replace("hidden_size: 32", "hidden_size: 32768").replace("intermediate_size: 48",
                                                                           "intermediate_size: 131072")
    (tmp_path / "run.yaml").write_text(large)
    run, _ = python(tmp_path, MAIN, "pretrain", "--config", tmp_path / "run.yaml", "--dataset", folder / "texts",
                    "--run-dir", tmp_path / "run", "--device", "cuda", "--precision", "fp32")
    assert run.returncode == 11, run.stderr
    line = run.stderr.strip().splitlines()[-1]
    assert "GiB free" in line and "lower --batch-size" in line and not (tmp_path / "run").exists()


def test_G1_no_visible_gpu_exits_9_although_the_cache_is_warm(dev, folder, tmp_path):
    start = time.monotonic()
    run, ended = python(tmp_path, MAIN, "pretrain", "--demo", "--run-dir", tmp_path / "run", "--device", "cuda",
                        CUDA_VISIBLE_DEVICES="", APR_CACHE_DIR=str(dev.cache.store.path))
    seconds = ended - start
    assert run.returncode == 9 and "GATE-GPUTRAIN-002" in run.stderr and not (tmp_path / "run").exists()
    assert len(run.stderr.strip().splitlines()) == 1 and seconds < 10


@pytest.mark.alone
def test_G8_training_goes_on_when_another_takes_the_rest_of_the_memory(dev, folder):
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


def allocations_fail(dev, monkeypatch, nth, lasting):
    """From now on the nth allocation of device or pinned memory fails, and with `lasting` every later one."""
    cuda, count = dev.cupy.cuda, [0]

    def failing(real):
        def allocate(size, *more):
            count[0] += 1
            if count[0] == nth or (lasting and count[0] > nth):
                raise cuda.memory.OutOfMemoryError(size, 0)
            return real(size, *more)
        return allocate

    monkeypatch.setattr(cuda, "Memory", failing(cuda.Memory))
    monkeypatch.setattr(cuda, "alloc_pinned_memory", failing(cuda.alloc_pinned_memory))
    return count


@pytest.mark.parametrize("lasting", [False, True])
def test_G3_whichever_allocation_fails_the_error_is_typed_and_the_memory_comes_back(dev, monkeypatch, lasting):
    model, config = FAMILIES["qwen2"], train_config()
    CudaTransformerTrainer.new(model, config, dev).train_batch(random_batch(0))
    gc.collect()
    free, nth, failed = dev.free_bytes()[0], 0, 0
    while True:
        nth += 1
        with monkeypatch.context() as patch:
            count = allocations_fail(dev, patch, nth, lasting)
            try:
                trainer = CudaTransformerTrainer.new(model, config, dev)
            except OutOfMemoryError as e:
                assert e.exit_code == 11 and "lower --batch-size or --seq-length" in str(e)
                failed += 1
                continue
        break
    assert failed == nth - 1 == count[0] > 20
    assert trainer.train_batch(random_batch(0)) > 0
    del trainer
    gc.collect()
    assert dev.free_bytes()[0] >= free - (4 << 20)


class Injector:
    """Changes what a trainer has before its update: `spoil(trainer)`, at the tenth batch, always or only `once`."""

    def __init__(self, monkeypatch, spoil, once):
        batches, done, real = {}, [], CudaTransformerTrainer._run

        def run(trainer, key, work):
            if key[0] == "train":
                ids = trainer.dev.download(trainer.arena["ids"]).tobytes()
                self.number = batches.setdefault(ids, len(batches))
            real(trainer, key, work)
            if key[0] == "train" and self.number == 10 and not (once and done):
                done.append(1)
                spoil(trainer)

        monkeypatch.setattr(CudaTransformerTrainer, "_run", run)


def nan_gradient(trainer):
    trainer.dev.fill(trainer.arena["grads"].reshape(-1)[1234:1235], 0xFF)


def flipped_bit(trainer):
    """The highest bit of the exponent of a master weight: 1e-2 becomes 1e36."""
    part = trainer.arena["master"].reshape(-1)[1000:1001]
    trainer.dev.upload(part, (trainer.dev.download(part).view(np.uint32) ^ np.uint32(1 << 30)).view(np.float32))


def injected(folder, tmp_path, precision, *more):
    (tmp_path / "run.yaml").write_text(YAML.replace("head_dim: 8", "head_dim: 32").replace(
        "accumulation_steps: 2", "accumulation_steps: 1"))
    config = build_config(build("pretrain").parse_args(
        ["--config", str(tmp_path / "run.yaml"), "--dataset", str(folder / "texts"), "--run-dir", "unused",
         "--precision", precision, *more]))
    return pretrain(config, tmp_path / "run", "cuda:0", [])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_D1_a_gradient_that_is_not_finite_changes_nothing_and_is_found_again(dev, folder, tmp_path, monkeypatch,
                                                                            precision):
    Injector(monkeypatch, nan_gradient, once=False)
    with pytest.raises(GateError, match=r"INV-TRAIN-007 at step 10 \(batch 10\).*again when made again from step 8"):
        injected(folder, tmp_path, precision)
    assert checkpoint.latest(tmp_path / "run" / "ckpt", print).state["step"] == 8
    (tmp_path / "again").mkdir()
    assert injected(folder, tmp_path / "again", precision, "--max-skips", "1")["status"] == "OK"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spoil", [nan_gradient, flipped_bit], ids=["D3", "D6"])
def test_what_does_not_come_again_is_a_fault_of_the_device(dev, folder, tmp_path, monkeypatch, precision, spoil):
    Injector(monkeypatch, spoil, once=True)
    with pytest.raises(DeviceFault, match=r"step 1[01], made again from step 8: expected the numbers of the first"):
        injected(folder, tmp_path, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_D1_the_first_bad_stage_is_named_on_the_device_too(dev, precision):
    model = dataclasses.replace(FAMILIES["qwen2"], head_dim=32)
    trainer = CudaTransformerTrainer.new(model, train_config(precision=precision), dev)
    weights = trainer.params
    weights["model.layers.1.mlp.up_proj.weight"][:] *= np.float32(1e30)
    weights["model.layers.1.mlp.gate_proj.weight"][:] *= np.float32(1e30)
    trainer.load_params(weights)
    assert "layer 1, ffn_swiglu" in first_not_finite(trainer, [random_batch(0)])
