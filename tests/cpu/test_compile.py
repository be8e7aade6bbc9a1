"""Every kernel of three models, compiled for three architectures without a GPU: clean, lean, with their constants.

The models: biases and small heads; head norms and heads of 128; Llama 3's scaling and a width of 2048. What is compiled
is what the cache would compile, for training, and for generating one sequence and eight; equal variants are compiled
once. Where a matrix of decoding fills the registers, every batch of more models is compiled.
"""

import re
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
from small_kernels import BAKED, SOURCE, SPEC, small_cache, write_kernels

from apr.errors import KernelCompileError, UnavailableError
from apr.infer.cuda_engine import BATCHES
from apr.kernel import Baked, KernelSpec, fast_paths
from apr.ops import attention
from apr.presets import llama3_2_1b, llama_370m, qwen2_0_5b, qwen2_7b, qwen3_0_6b
from apr.ptx_cache import OPTIONS, PtxCache, Recipe, compile_text
from apr.ptx_store import Entry
from apr.registry import inference_variants, variants
from apr.tools.kernel_cache import baked_values, missing_constants, traces

CONFIGS = (qwen2_0_5b, qwen3_0_6b, llama3_2_1b)
ARCHS = ("sm_80", "sm_90", "sm_90a")
# Bytes of stack that a kernel may use per thread, spills included; every other kernel none.
STACK = {
    "rope_table": 40,  # sincos in double reduces large angles in a slow path of its own
    "attention_forward": 32,  # held to 128 registers, so that two blocks are on an SM
    "attention_backward_dkv": 16,  # HS = 128 needs all 255 registers
    "attention_backward_dq": 40,
    "rmsnorm_backward": 16,  # two vectors of a row in 48 registers
    # f32, eight inputs of Llama 3.2's width: the compiler holds itself to 64 registers; fewer rows would cost more
    "decode_qkv": 8, "decode_gate_up": 8, "decode_head": 8,
    "sample": 8,  # a block of 1024 threads has 64 registers each, and the compiler stops at 32
}
LAUNCHED: dict[str, set[str]] = {}  # entries of each key that are launched: decoding compiles four and runs one
SPILLED = 64  # bytes stored, and twice that loaded, where there is a stack at all


@cache
def recipes() -> dict[str, Recipe]:
    """Every module that the models need, by key; `sm_90` is of training alone, for it is the code of sm_90a."""
    found = {}
    for arch in ARCHS:
        kernels = PtxCache(arch)
        for config in CONFIGS:
            for storage in ("f32", "bf16"):
                needed = variants(config, storage, fast_paths(arch))
                if arch != "sm_90":
                    needed += [v for b in (1, 8) for v in inference_variants(config, storage, b, fast_paths(arch))]
                for spec, baked in needed:
                    r = kernels.recipe(spec, baked)
                    found[r.key] = r
                    LAUNCHED.setdefault(r.key, set()).add(spec.entry)
    return found


def compiled(r: Recipe) -> Entry:
    image, usage = compile_text(r.text, r.key, r.arch, r.options)
    return Entry(r.key, {"label": r.label, "entries": usage}, image)


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    """All of them, compiled; a warning would have raised."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, recipes().values()))


@pytest.fixture(autouse=True, scope="module")
def own_folder(tmp_path_factory):
    """The caches made here keep nothing in the user's folder."""
    with pytest.MonkeyPatch.context() as m:
        m.setenv("APR_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


def test_every_kernel_compiles_and_every_entry_is_reported(entries):
    assert len(entries) == len(recipes()) > 100
    assert {e.key.rpartition("-")[0].rpartition("-")[2] for e in entries} == set(ARCHS)
    for entry in entries:
        in_source = re.findall(r'extern "C" __global__[^;{]*?(\w+)\s*\(\s*(?:const )?\w+\*', recipes()[entry.key].text)
        assert set(entry.meta["entries"]) == set(in_source)
        assert entry.image.startswith(b"\x7fELF") and all(u["registers"] > 0 for u in entry.meta["entries"].values())


def test_no_kernel_spills_or_has_a_stack_beyond_its_budget(entries):
    over = [f"{e.key}: {name} {u}" for e in entries for name, u in e.meta["entries"].items()
            if name in LAUNCHED[e.key]
            and (u["stack"] > STACK.get(name, 0) or u["spill_stores"] > SPILLED or u["spill_loads"] > 2 * SPILLED
                 or u["registers"] > 255)]
    assert over == []


def large_matrices() -> list[tuple[KernelSpec, Baked]]:
    """What decoding launches where a row is long or the inputs are many: gate_up and down, every batch."""
    made = {}
    for config, storage in ((qwen2_0_5b, "bf16"), (qwen2_7b, "bf16"), (qwen2_7b, "f32"), (llama_370m, "f32")):
        for b in BATCHES:
            for spec, baked in inference_variants(config, storage, b):
                if spec.entry == "decode_gate_up" or (spec.entry == "decode_add" and baked["I"] == config.F):
                    made[spec.entry, repr(baked)] = spec, baked
    return list(made.values())


def test_no_matrix_of_decoding_spills_in_any_batch():
    kernels, needed = PtxCache("sm_90a"), large_matrices()
    assert len(needed) == 4 * len(BATCHES) * 2
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda v: compiled(kernels.recipe(*v)), needed))
    usage = {e.key: e.meta["entries"][spec.entry] for e, (spec, _) in zip(made, needed, strict=True)}
    assert {key: u for key, u in usage.items() if u["stack"] or u["spill_stores"] or u["spill_loads"]} == {}


def test_shared_memory_fits_without_asking(entries):
    assert max(u["shared"] for e in entries for u in e.meta["entries"].values()) <= 48 << 10
    assert any(u["shared"] for e in entries for u in e.meta["entries"].values())


@pytest.mark.parametrize("config", [qwen2_0_5b, qwen3_0_6b], ids=lambda c: f"HS={c.HS}")
def test_attention_asks_for_the_shared_memory_of_its_layouts(config):
    layouts = {"Forward": attention.SM90_FORWARD, "Dkv": attention.SM90_DKV, "Dq": attention.SM90_DQ}
    for (layout, spec), asked in zip(layouts.items(), attention.sm90_shared(config.HS), strict=True):
        text = PtxCache("sm_90a").recipe(spec, attention.attention_baked(config, "bf16")).text
        for size, fits in ((asked, True), (asked + 16, False)):
            check = f'\nstatic_assert(sizeof({layout}) + 1024 == {size}, "size");\n'
            with nullcontext() if fits else pytest.raises(KernelCompileError, match="size"):
                compile_text(text + check, layout, "sm_90a", OPTIONS)
        assert asked <= 227 << 10


def test_every_baked_float_is_in_its_cubin(entries):
    assert [(e.key, missing) for e in entries if (missing := missing_constants(e))] == []
    with_eps = [e for e in entries if "EPS" in baked_values(e.key)]
    assert len(with_eps) >= 30
    for e in with_eps:
        eps = np.float32(baked_values(e.key)["EPS"])
        other = {np.float32(1e-6): 1e-5, np.float32(1e-5): 1e-6}[eps]
        assert eps.tobytes() in e.image and struct.pack("<f", other) not in e.image
    for e in [e for e in entries if "THETA" in baked_values(e.key)]:
        theta = baked_values(e.key)["THETA"]
        assert struct.pack("<d", theta)[4:] in e.image and struct.pack("<d", 10000.0)[4:] not in e.image


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.hf_model_type)
def test_eps_and_theta_are_in_the_ptx(config):
    kernels = PtxCache("sm_90a")
    made = {r.label: r for r in (kernels.recipe(s, b) for s, b in variants(config, "bf16")
                                 if s.source in ("rmsnorm.cu", "rope.cu"))}
    assert len(made) == 2
    for label, recipe in made.items():
        ptx = compile_text(recipe.text, label, "compute_80", OPTIONS)[0].decode().upper()
        assert f"0F{struct.pack('>f', config.rms_norm_eps).hex().upper()}" in ptx
        if label.startswith("rope"):
            assert f"0D{struct.pack('>d', config.rope_theta).hex().upper()}" in ptx


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_each_baked_value_of_norms_and_rotations_changes_the_code(arch):
    """Llama 3, where every part of the scaling counts; with head norms, so that eps does too."""
    kernels, seen = PtxCache(arch), set()
    for spec, baked in variants(llama3_2_1b, "bf16"):
        if spec.source not in ("rmsnorm.cu", "rope.cu") or spec.source in seen:
            continue
        seen.add(spec.source)
        baked = baked | ({"QK_NORM": 1} if "QK_NORM" in baked else {})
        image = compiled(kernels.recipe(spec, baked)).image
        for name, value in baked.items():
            if name != "FLOATX":
                other = value * 1.5 if isinstance(value, float) else 1 - value if name == "QK_NORM" else value * 2
                changed = compiled(kernels.recipe(spec, baked | {name: other})).image
                assert changed != image, f"{spec.source}: {name}"
    assert len(seen) == 2


def test_compiling_again_gives_the_same_bytes():
    recipe = next(iter(recipes().values()))
    assert compiled(recipe) == compiled(recipe)


def test_what_a_trace_is():
    assert struct.pack("<f", 1e-6) in traces("EPS", {"EPS": 1e-6})
    assert struct.pack("<d", 3.0)[4:] in traces("HIGH", {"HIGH": 4.0, "LOW": 1.0})
    key = "rmsnorm-C=64-EPS=f358637bd-FLOATX=bf16-sm_90a-" + "0" * 64
    assert baked_values(key) == {"C": 64, "EPS": float(np.float32(1e-6)), "FLOATX": "bf16"}
    assert missing_constants(Entry(key, {}, b"\xbd\x37\x86\x35")) == []
    assert missing_constants(Entry(key, {}, b"\xbd\x37\x86\x36"))[0].startswith("EPS=")


@pytest.mark.parametrize(("line", "words"), [
    ("__device__ int f() { int unused; return 1 }", ["error", "expected a \";\"", "return 1 }"]),
    ("__device__ int f() { int unused = 1; return 2; }", ["warning", "unused", "return 2"]),
    ("__device__ int g(int n) { for (;;) return n / 0; }", ["division by zero"])], ids=["error", "warning", "division"])
def test_errors_and_warnings_are_refused_in_one_line_with_their_line(tmp_path, line, words):
    write_kernels(tmp_path / "k", SOURCE + line + "\n")
    cache_ = small_cache(tmp_path / "cache", tmp_path / "k")
    with pytest.raises(KernelCompileError) as caught:
        cache_.build(SPEC, BAKED)
    text = str(caught.value)
    assert "\n" not in text and "small-EPS=f358637bd" in text and [w for w in words if w not in text] == []
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("arch", ["sm_13", "sm_999", "nonsense"])
def test_an_architecture_that_the_compiler_does_not_know(tmp_path, arch):
    with pytest.raises(UnavailableError, match=f"a compiler that knows {arch}, found one that does not"):
        small_cache(tmp_path / "cache", tmp_path / "k", arch).build(SPEC, BAKED)


def test_the_small_kernel_compiles_and_comes_back_from_disk(tmp_path):
    first = small_cache(tmp_path / "cache", tmp_path / "k")
    made = first.build(SPEC, BAKED)
    again = small_cache(tmp_path / "cache", tmp_path / "k")
    assert again.build(SPEC, BAKED) == made and again.counts.hits == 1
    assert set(made.meta["entries"]) == {"small", "other"}
    assert np.float32(1e-6).tobytes() in made.image and made.meta["milliseconds"] > 0
