"""The kernel cache with a GPU: models in turn get their own constants, bit for bit those of a process of their own.

The bugs that began the project: an eps or theta of one model served to another by a key that left it out.
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models import FAMILIES, train_config

from apr import driver
from apr.device import Device
from apr.ops.rmsnorm import FORWARD, rmsnorm_baked
from apr.ptx_cache import OPTIONS, PtxCache, compile_text
from apr.ptx_store import Entry, decode, file_name
from apr.registry import variants
from apr.train.cuda_trainer import CudaTransformerTrainer

ROOT = Path(__file__).parents[2]
# The same shapes, so that nothing but the constants (and the bias) tells the two models' kernels apart.
SHAPE = {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000, "num_attention_heads": 4,
         "num_key_value_heads": 2}
MODELS = {"A": replace(FAMILIES["qwen2"], rms_norm_eps=1e-6, rope_theta=1e6, **SHAPE),
          "B": replace(FAMILIES["llama"], rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None, **SHAPE)}
IDS = np.arange(2 * 32, dtype=np.int32).reshape(2, 32) * 7 % 1000
ALONE = """
import sys
sys.path[:0] = ["tests", "tests/gpu"]
from pathlib import Path
from test_cache import Device, logits_hash
dev = Device(0, Path(sys.argv[2]))
found = logits_hash(dev, sys.argv[1], sys.argv[3])
c = dev.cache.counts
print(found, c.compiled, c.hits, c.rejected)
"""


def trainer(dev: Device, model: str, precision: str) -> CudaTransformerTrainer:
    """A trainer with small weights: where the rows are small, eps is in every number."""
    config = train_config(precision=precision, batch_size=2, max_seq_len=32)
    made = CudaTransformerTrainer.new(MODELS[model], config, dev)
    made.load_params({name: value * np.float32(0.05) if "embed" in name else value
                      for name, value in made.params.items()})
    return made


def logits_hash(dev: Device, model: str, precision: str) -> str:
    """The bits of a model's logits."""
    logits = trainer(dev, model, precision).forward_logits(IDS)
    assert np.isfinite(logits).all()
    return hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()


def alone(model: str, folder: Path, precision: str) -> tuple[str, int, int, int]:
    """The hash in a process of its own over a cache folder; compiled, found, rejected."""
    run = subprocess.run([sys.executable, "-c", ALONE, model, str(folder), precision], cwd=ROOT, env={**os.environ},
                         capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found, *counts = run.stdout.split()
    return found, *map(int, counts)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def truth(request, tmp_path_factory) -> tuple[str, dict[str, str], Path]:
    """Precision; each model's hash from a fresh process with a cold cache of its own; a folder warmed by both."""
    shared = tmp_path_factory.mktemp("warm") / "cache"
    hashes = {}
    for model in MODELS:
        hashes[model], compiled, found, rejected = alone(model, tmp_path_factory.mktemp(model) / "cold", request.param)
        assert compiled > 5 and (found, rejected) == (0, 0)
        assert alone(model, shared, request.param)[0] == hashes[model]
    assert hashes["A"] != hashes["B"]
    return request.param, hashes, shared


def device(folder: Path) -> Device:
    return Device(0, folder)


def test_models_in_turn_on_one_device(truth, tmp_path):
    precision, hashes, _ = truth
    dev = device(tmp_path / "cache")
    assert {m: logits_hash(dev, m, precision) for m in "AB"} == hashes
    compiled = dev.cache.counts.compiled
    assert [logits_hash(dev, m, precision) for m in "ABA"] == [hashes[m] for m in "ABA"]
    assert (dev.cache.counts.compiled, dev.cache.counts.rejected) == (compiled, 0)


def test_two_trainers_at_once_on_one_device(truth, tmp_path):
    precision, hashes, _ = truth
    dev = device(tmp_path / "cache")
    both = {m: trainer(dev, m, precision) for m in MODELS}
    for m in "ABABBA":
        logits = both[m].forward_logits(IDS)
        assert hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest() == hashes[m]


def test_two_devices_over_one_folder(truth, tmp_path):
    precision, hashes, _ = truth
    devices = {m: device(tmp_path / "cache") for m in MODELS}
    for m in "ABAB":
        assert logits_hash(devices[m], m, precision) == hashes[m]
    assert all(dev.cache.counts.rejected == 0 for dev in devices.values())


def test_other_processes_compile_nothing_and_get_the_same_bits(truth):
    precision, hashes, warm = truth
    for m in "ABA":
        found, compiled, hits, rejected = alone(m, warm, precision)
        assert found == hashes[m] and compiled == 0 and hits > 5 and rejected == 0


def test_a_warmed_folder_makes_a_run_compile_nothing(truth, tmp_path):
    """Warmed without loading anything, as `apr cache warm` does."""
    precision, hashes, _ = truth
    folder, gpu = tmp_path / "cache", device(tmp_path / "other")
    storage = {"fp32": "f32", "bf16": "bf16"}[precision]
    PtxCache(gpu.cache.arch, folder).warm(variants(MODELS["A"], storage, gpu.fast))
    assert alone("A", folder, precision)[:2] == (hashes["A"], 0)
    dev = device(folder)
    net = trainer(dev, "A", precision)
    assert dev.cache.frozen and dev.cache.counts.compiled == 0
    net.forward_logits(IDS)
    assert dev.cache.frozen and dev.cache.counts.compiled == 0


def norms(dev: Device, precision: str) -> list[Path]:
    """The files of the two models' rmsnorm."""
    storage = {"fp32": "f32", "bf16": "bf16"}[precision]
    keys = [dev.cache.recipe(FORWARD, rmsnorm_baked(256, m.rms_norm_eps, storage)).key for m in MODELS.values()]
    return [dev.cache.store.path / file_name(key) for key in keys]


def test_two_entries_swapped_on_disk_are_rejected_and_built_again(truth, tmp_path):
    precision, hashes, _ = truth
    first = device(tmp_path / "cache")
    for m in MODELS:
        logits_hash(first, m, precision)
    a, b = norms(first, precision)
    contents = a.read_bytes(), b.read_bytes()
    a.write_bytes(contents[1])
    b.write_bytes(contents[0])
    dev = device(tmp_path / "cache")
    assert [logits_hash(dev, m, precision) for m in "AB"] == [hashes["A"], hashes["B"]]
    assert (dev.cache.counts.rejected, dev.cache.counts.compiled) == (2, 2)
    assert (decode(a.read_bytes()).image, decode(b.read_bytes()).image) == tuple(decode(c).image for c in contents)


@pytest.mark.parametrize("garbage", [b"\x7fELF" + bytes(500), b"not code", None], ids=["ELF", "text", "other arch"])
def test_garbage_with_the_right_key_and_checksum_is_built_again(truth, tmp_path, garbage):
    precision, hashes, _ = truth
    first = device(tmp_path / "cache")
    logits_hash(first, "A", precision)
    path, _ = norms(first, precision)
    sound = decode(path.read_bytes())
    if garbage is None:
        other = PtxCache("sm_80" if first.cache.arch != "sm_80" else "sm_90a", tmp_path / "other")
        garbage = other.build(FORWARD, rmsnorm_baked(256, 1e-6, {"fp32": "f32", "bf16": "bf16"}[precision])).image
    path.write_bytes(Entry(sound.key, sound.meta, garbage).encode())
    dev = device(tmp_path / "cache")
    assert logits_hash(dev, "A", precision) == hashes["A"]
    assert (dev.cache.counts.rejected, dev.cache.counts.compiled) == (1, 1)
    assert "does not load" in dev.cache.counts.warnings[0] and decode(path.read_bytes()).image == sound.image


def test_why_images_are_named_by_their_contents(dev, tmp_path):
    """CuPy remembers modules by path: the second one's code is the first one's. Ours is not."""
    source = 'extern "C" __global__ void mark(float* x) { x[0] = %s; }'
    images = [compile_text(source % value, value, dev.cache.arch, OPTIONS)[0] for value in ("1.0f", "2.0f")]
    x = dev.empty((1,), "f32")

    def value(module) -> float:
        code = driver.launch(module.get_function("mark").kernel.ptr, (1, 1, 1), (1, 1, 1), 0, dev.stream.ptr,
                             [int(x.data.ptr).to_bytes(8, "little")])
        assert code == 0
        return float(dev.download(x)[0])

    path, theirs = tmp_path / "same.cubin", []
    for image in images:
        path.write_bytes(image)
        module = dev.cupy.RawModule(path=str(path))
        module.compile()
        theirs.append(value(module))
    assert theirs == [1.0, 1.0], "CuPy no longer remembers modules by path: apr need not name images by contents"
    assert [value(dev.cache._raw_module(image)) for image in images] == [1.0, 2.0]
