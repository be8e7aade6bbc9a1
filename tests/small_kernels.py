"""A kernels folder of one small kernel, and a cache over it whose compiler is a hash: quick, and it counts."""

import hashlib
import json
from pathlib import Path

from apr import ptx_cache
from apr.errors import KernelCompileError
from apr.kernel import KernelSpec
from apr.ptx_cache import PtxCache

HEADER = """#ifndef H
#define H
using f32 = float;
struct bf16 { unsigned short bits; };
using floatX = K_FLOATX;
#endif
"""
SOURCE = """// K_UNUSED is only named here
#include "common.cuh"
constexpr float EPS = K_EPS;
extern "C" __global__ void small(floatX* out, f32* rstd, int n) { if (n < K_N) rstd[n] += EPS * K_N; }
extern "C" __global__ void other(f32* rstd) { rstd[0] = EPS; }
"""
SPEC = KernelSpec("small.cu", "small", ("EPS", "FLOATX", "N"), ("out:floatX*", "rstd:f32*", "n:i32"))
BAKED = {"EPS": 1e-6, "FLOATX": "f32", "N": 7}


def write_kernels(folder: Path, source: str = SOURCE, header: str = HEADER) -> Path:
    """A folder with small.cu and common.cuh."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.cu").write_text(source)
    (folder / "common.cuh").write_text(header)
    return folder


def fake_compile(text: str, where: str, arch: str, options: tuple[str, ...]) -> tuple[bytes, dict]:
    """A 'cubin' that depends on everything that a real one does."""
    if "syntax error" in text:
        raise KernelCompileError(where, "a source that compiles", "a syntax error", "correct it")
    image = hashlib.sha256(json.dumps([text, arch, options]).encode()).digest() * 8
    return image, {"small": {"registers": 8, "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 0}}


def fake_toolchain() -> tuple[str, str]:
    """Versions of no compiler."""
    return "NVRTC 12.9.86 CL-1", "14.2.0"


def use_fake_compiler(monkeypatch) -> None:
    """Let apr.ptx_cache compile without NVRTC."""
    monkeypatch.setattr(ptx_cache, "compile_text", fake_compile)
    monkeypatch.setattr(ptx_cache, "toolchain", fake_toolchain)


def small_cache(folder: Path, kernels: Path, arch: str = "sm_90a", warn=None) -> PtxCache:
    """A cache of the small kernel, at folder."""
    if not (kernels / "small.cu").exists():
        write_kernels(kernels)
    return PtxCache(arch, folder, kernels, warn)
