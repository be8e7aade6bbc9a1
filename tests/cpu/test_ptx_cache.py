"""Keys: everything that makes a kernel is in its key, nothing else is; and what the key cannot see is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
from small_kernels import BAKED, HEADER, SOURCE, SPEC, small_cache, use_fake_compiler, write_kernels

from apr import paths, ptx_cache
from apr.config import RopeScaling
from apr.errors import KernelCacheFrozen, KernelCompileError, KernelParamError
from apr.kernel import ARGUMENT, DEVICE_DTYPES, FAST_PATHS, KernelSpec, spell
from apr.ops import attention, cross_entropy
from apr.ops.linear import SPECS as LINEAR
from apr.ops.rmsnorm import FORWARD, rmsnorm_baked
from apr.presets import PRESETS, llama3_2_1b, qwen2_0_5b, qwen3_0_6b
from apr.ptx_cache import PtxCache, arch_of, baked_names, expand
from apr.registry import KERNELS, variants

DECODING = {"decode_linear.cu", "decode_attention.cu", "sampling.cu"}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A new cache over the same folder, with a compiler that needs no NVRTC."""
    use_fake_compiler(monkeypatch)
    return lambda arch="sm_90a", folder="cache": small_cache(tmp_path / folder, tmp_path / "kernels", arch)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """No test touches the user's cache."""
    monkeypatch.setenv("APR_CACHE_DIR", str(tmp_path / "user"))


def key(cache, baked=BAKED, spec=SPEC) -> str:
    return cache.recipe(spec, baked).key


def test_the_readable_part_and_the_hash():
    cache = PtxCache("sm_90a", None)
    found = key(cache, rmsnorm_baked(896, 1e-6, "bf16"), FORWARD)
    assert re.fullmatch(r"rmsnorm-BLOCK=128-C=896-EPS=f358637bd-FLOATX=bf16-sm_90a-[0-9a-f]{64}", found)


@pytest.mark.parametrize("change", [
    {"EPS": 1e-5}, {"EPS": float(np.nextafter(np.float32(1e-6), np.float32(1)))}, {"EPS": 0.0}, {"EPS": -1e-6},
    {"FLOATX": "bf16"}, {"N": 8}, {"N": -7}, {"N": 7.0}], ids=str)
def test_every_baked_value_is_in_the_key(make, change):
    assert key(make()) != key(make(), BAKED | change)
    assert make().recipe(SPEC, BAKED).label != make().recipe(SPEC, BAKED | change).label
    assert key(make()) == key(make(), dict(reversed(BAKED.items())))


def test_every_baked_value_of_a_real_kernel_is_in_its_key():
    """eps, theta, sizes, scaling: each changed alone, for every kernel of three models in both storage types."""
    cache, seen = PtxCache("sm_90a", None), 0
    for config in (qwen2_0_5b, qwen3_0_6b, llama3_2_1b):
        for storage in ("f32", "bf16"):
            for spec, baked in variants(config, storage):
                before = key(cache, baked, spec)
                for name, value in baked.items():
                    other = value * 2 + 1 if not isinstance(value, str) else "f32" if value == "bf16" else "bf16"
                    assert key(cache, baked | {name: other}, spec) != before, f"{spec.source}: {name}"
                    seen += 1
                assert key(cache, baked, spec) == before
    assert seen > 300


def test_zero_and_minus_zero_differ_and_equal_floats_do_not(make):
    assert key(make(), BAKED | {"EPS": 0.0}) != key(make(), BAKED | {"EPS": -0.0})
    assert key(make(), BAKED | {"EPS": float(np.float32(1e-6))}) == key(make())
    assert key(make(), BAKED | {"EPS": 1e-6 * (1 + 1e-12)}) == key(make())  # the same 32 bits: the same code


def test_arch_options_compiler_and_cupy_are_in_the_key(make, monkeypatch):
    before = key(make())
    assert len({before, key(make("sm_90")), key(make("sm_80"))}) == 3
    options = ptx_cache.OPTIONS
    for i, option in enumerate(options):
        for changed in ((*options[:i], *options[i + 1:]), (*options[:i], option + "x", *options[i + 1:])):
            monkeypatch.setattr(ptx_cache, "OPTIONS", changed)
            assert key(make()) != before, option
    monkeypatch.setattr(ptx_cache, "OPTIONS", options)
    for other in (("NVRTC 12.9.87 CL-1", "14.2.0"), ("NVRTC 12.9.86 CL-2", "14.2.0"), ("NVRTC 12.9.86 CL-1", "14.2.1")):
        monkeypatch.setattr(ptx_cache, "toolchain", lambda other=other: other)
        assert key(make()) != before, other
    monkeypatch.setattr(ptx_cache, "toolchain", lambda: ("NVRTC 12.9.86 CL-1", "14.2.0"))
    monkeypatch.setattr(ptx_cache, "SCHEMA", 2)
    assert key(make()) != before
    monkeypatch.undo()


def test_the_compiler_says_its_own_build():
    compiler, cupy = ptx_cache.toolchain()
    assert re.fullmatch(r"NVRTC \d+\.\d+\.\d+ CL-\d+", compiler) and re.match(r"\d+\.\d+", cupy)


def test_a_byte_of_the_source_or_of_a_header_is_in_the_key(make, tmp_path):
    before = key(make())
    for source, header in ((SOURCE.replace("+=", "-="), HEADER), (SOURCE, HEADER.replace("short", "int ")),
                           (SOURCE + " ", HEADER), (SOURCE, HEADER + " ")):
        write_kernels(tmp_path / "kernels", source, header)
        assert key(make()) != before
    write_kernels(tmp_path / "kernels")
    assert key(make()) == before


def test_headers_are_expanded_once_each_and_only_from_the_folder(tmp_path):
    write_kernels(tmp_path, '#include "a.cuh"\n#include "common.cuh"\n', "common\n")
    (tmp_path / "a.cuh").write_text('# include "common.cuh" // again\na\n')
    assert expand("small.cu", tmp_path).split() == ["common", "a"]
    for name in ("missing.cuh", "../small.cu", "/etc/passwd"):
        write_kernels(tmp_path, f'#include "{name}"\n')
        with pytest.raises(KernelCompileError, match="nothing there"):
            expand("small.cu", tmp_path)


@pytest.mark.parametrize("line", [
    "#include <cuda_fp16.h>", " # include <math.h>", "#include HEADER", '#inc\\\nlude "x.cuh"', "%:include <x>",
    '#/**/include "x.cuh"', '#embed "x"', "#if __has_include(<x.h>)", 'auto s = __DATE__;', "#define K_EPS 1e-5f",
    "#undef K_EPS"])
def test_what_the_key_would_not_see_is_refused(make, tmp_path, line):
    write_kernels(tmp_path / "kernels", SOURCE + line + "\n")
    with pytest.raises(KernelCompileError, match=r"kernels/small\.cu: expected our own headers") as caught:
        key(make())
    assert "\n" not in str(caught.value)


def test_comments_may_speak_of_anything():
    assert baked_names("a.cu", "// #include <x>\n/* K_A __DATE__ */ int x = K_B; // K_C") == {"B"}


@pytest.mark.parametrize(("baked", "declared", "words"), [
    ({"EPS": 1e-6, "N": 7}, SPEC.baked, "missing ['FLOATX']"), (BAKED | {"Q": 1}, SPEC.baked, "extra ['Q']"),
    ({"FLOATX": "f32", "N": 7}, ("FLOATX", "N"), "undeclared ['EPS']"),
    (BAKED | {"UNUSED": 1}, (*SPEC.baked, "UNUSED"), "unused ['UNUSED']")])
def test_names_that_are_not_exact_are_refused(make, baked, declared, words):
    cache = make()
    key(cache)  # that another spec of the source was right helps nobody
    for call in (cache.recipe, cache.build, cache.get):
        with pytest.raises(KernelParamError) as caught:
            call(replace(SPEC, baked=declared), baked)
        assert words in str(caught.value)
    assert cache.counts.compiled == 0


@pytest.mark.parametrize("value", [
    float("nan"), float("inf"), -float("inf"), 1e39, 2**31, -2**31 - 1, True, False, None, "f16", "1", "1; x", b"f32",
    np.float32(1), np.int32(1), [1], 1j], ids=repr)
def test_values_that_cannot_be_baked_are_refused(make, value):
    with pytest.raises(KernelParamError, match="EPS"):
        make().recipe(SPEC, BAKED | {"EPS": value})


def test_spelling_is_exact():
    assert spell("", 1) == ("1", "1") and spell("", 1.0) == ("f3f800000", "0x1.0000000000000p+0f")
    assert spell("", -(2**31))[1] == "-2147483648" and spell("", "bf16") == ("bf16", "bf16")
    for value in (1e-6, 1e-5, 5e5, 1e6, 1e-45, 3.4028234e38, -0.0, 0.1):
        name, text = spell("", value)
        bits = int(np.float32(value).view(np.uint32))
        assert name == f"f{bits:08x}" and np.float32(float.fromhex(text[:-1])).view(np.uint32) == bits


def test_a_source_is_a_cu_file():
    with pytest.raises(KernelParamError, match=r"a \.cu file"):
        KernelSpec("small.cuh", "small", (), ())


def test_architectures():
    assert [arch_of(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 1))] == ["sm_80", "sm_89", "sm_90a", "sm_100",
                                                                              "sm_121"]


def test_after_freeze_nothing_is_compiled(make, monkeypatch):
    cache = make()
    cache.warm([(SPEC, BAKED)])
    cache.freeze()
    assert cache.counts.compiled == 1
    new = BAKED | {"EPS": 1e-5}
    for call in (cache.build, cache.get):
        with pytest.raises(KernelCacheFrozen) as caught:
            call(SPEC, new)
        assert key(cache, new) in str(caught.value)
    assert cache.counts.compiled == 1
    cache.warm([(SPEC, new)])  # a second model's warm-up
    assert cache.counts.compiled == 2


# The registered kernels, against their sources.
MAP = "const __grid_constant__ TensorMap"


def signatures(source: str) -> dict[str, list[tuple[str, str]]]:
    """Entry to its parameters: (type in the grammar of KernelSpec.args, without `?`; name)."""
    text = ptx_cache.COMMENT.sub(" ", expand(source, paths.kernels_dir()))
    found = {}
    for match in re.finditer(r'extern "C" __global__ void\s+(?:__\w+__\((?:[^()]|\([^()]*\))*\)\s*)*(\w+)'
                             r"\(([^)]*)\)", text):
        parameters = [" ".join(p.replace("__restrict__", " ").replace("*", " * ").split()) for p in match[2].split(",")]
        found[match[1]] = [re.fullmatch(r"([\w ]+?) ?(\*?) (\w+)", p).groups() for p in parameters]
    return {entry: [(kind + star, name.rstrip("_")) for kind, star, name in p] for entry, p in found.items()}


@pytest.mark.parametrize("spec", KERNELS, ids=lambda s: f"{s.source}:{s.entry}")
def test_a_spec_is_what_its_source_says(spec):
    text = expand(spec.source, paths.kernels_dir())
    assert set(spec.baked) == baked_names(spec.source, text) and list(spec.baked) == sorted(spec.baked)
    declared = [ARGUMENT.fullmatch(a).groups() for a in spec.args]
    types = [MAP if kind is None else (const or "") + kind + (star or "").rstrip("?")
             for _, const, kind, star in declared]
    assert list(zip(types, (name for name, *_ in declared), strict=True)) == signatures(spec.source)[spec.entry]
    assert {kind for _, _, kind, _ in declared} <= {*DEVICE_DTYPES, "floatX", None}
    assert len({name for name, *_ in declared}) == len(declared)
    body = text.split(f"{spec.entry}(", 1)[1].partition('extern "C"')[0]
    maybe_null = set(re.findall(r"(\w+) [!=]= nullptr", body))
    assert maybe_null & {n for n, *_ in declared} <= {n for n, _, _, star in declared if star == "*?"}


def test_every_entry_of_every_source_has_a_spec():
    sources = {p.name for p in paths.kernels_dir().glob("*.cu")}
    assert {s.source for s in KERNELS} == sources
    for source in sources:
        assert {s.entry for s in KERNELS if s.source == source} == set(signatures(source))
        assert all(signatures(source).values())
    assert len({(s.source, s.entry) for s in KERNELS}) == len(KERNELS) > 20


@pytest.mark.parametrize("fast", [(), ("cross_entropy",), ("attention",), tuple(FAST_PATHS)], ids=" ".join)
@pytest.mark.parametrize("storage", ["f32", "bf16"])
def test_the_registry_has_every_kernel_of_a_model(storage, fast):
    """And each variant's names are exact; and eps, theta and scaling are the model's."""
    cache = PtxCache("sm_90a", None)
    other = set(cross_entropy.SPECS) - set(cross_entropy.FAST if "cross_entropy" in fast else cross_entropy.GENERAL)
    scaled = replace(qwen2_0_5b, rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                                          original_max_position_embeddings=8192))
    for config in (*PRESETS.values(), scaled):
        found = variants(config, storage, frozenset(fast))
        generation = {spec for spec in KERNELS if spec.source in DECODING}
        attends = set(attention.FAMILIES[storage].specs)
        if storage == "bf16" and "attention" in fast and config.HS in (64, 128):
            attends = set(attention.SM90)
        absent = generation | other | (set(attention.SPECS) - attends) | (set() if config.use_bias else set(LINEAR))
        expected = set(KERNELS) - absent
        assert {spec for spec, _ in found} == expected and len(found) == len(expected)
        for spec, baked in found:
            cache.recipe(spec, baked)
            assert baked["FLOATX"] == storage
            assert baked.get("EPS", config.rms_norm_eps) == config.rms_norm_eps
            assert baked.get("THETA", config.rope_theta) == config.rope_theta
            if "FACTOR" in baked:
                assert baked["FACTOR"] == (config.rope_scaling.factor if config.rope_scaling else 1.0)
