"""What every kernel source must be: its header block whole, no float atomics, and no architecture that NVRTC lacks.

An atomic on integers is allowed, by functions whose order does not show, on what the file itself declares as integers.
"""

import re
from pathlib import Path

import pytest

from apr.errors import UnavailableError
from apr.ptx_cache import OPTIONS, compile_text
from apr.registry import KERNELS

KERNEL_FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.cu"))
LINES = ("MATH", "SHAPES", "WRITES", "BAKED", "LAUNCH", "MEMORY", "FLOPS", "NUMERICS", "CONTRACT")
ATOMIC = re.compile(r"\batomic\w*|\bred\.|\batom\.|\b__nv_atomic\w*")
ALLOWED = re.compile(r"atomic(?:Add|Inc)\((?:&|\((?:u32|i32|u64)\*\))?\s*(\w+)")
INTEGERS = {"u32", "i32", "u64"}


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda p: p.stem)
def test_the_header_says_everything(path):
    header = re.match(r"(//[^\n]*\n)+", path.read_text())[0]
    assert header.startswith(f"// {path.name} - ")
    assert [line for line in LINES if not re.search(rf"^// {line} +\S", header, re.M)] == []
    entries = {spec.entry for spec in KERNELS if spec.source == path.name}
    launches = header[header.index("// LAUNCH"):header.index("// MEMORY")]
    stem = re.sub("_(f32|sm90)(?=_|$)", "", path.stem)
    short = {e.removeprefix(f"{stem}_").removeprefix("backward_") for e in entries}
    assert [e for e in short if e not in launches and "both" not in launches] == []


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda p: p.stem)
def test_sums_have_a_fixed_order(path):
    """A float added by an atomic is added in the order in which threads happen to come."""
    assert atomic_faults(path.read_text()) == []


@pytest.mark.parametrize(("code", "fault"), [
    ("__shared__ f32 sum[4]; atomicAdd(&sum[0], x);", "sum is f32"),
    ("void f(f32* out) { atomicAdd(out + i, x); }", "out is f32"),
    ("void f(f32* __restrict__ out) { atomicInc((u32*)out + i, 3); }", "out is f32"),
    ("void f(float (&sums)[2]) { atomicAdd(&sums[0], x); }", "sums is float"),
    ("i32 n; void f(f64 *n) { atomicAdd(n, 1.0); }", "n is f64"),
    ("struct P { float x; }; atomicAdd(&p.x, 1);", "p is not declared"),
    ("u32 n; atomicExch(&n, 1);", "atomicExch"), ("u32 n; auto add = atomicAdd;", "atomicAdd"),
    ('asm("red.global.add.f32 [%0], %1;");', "red."), ('asm("atom.add.f32 %0, [%1], %2;");', "atom."),
    ("u32 n; atomicAdd_block(&n, 1);", "atomicAdd_block"),
    ("void f(u32 (&bins)[3][8], u64* sums, i32* ticket) { atomicAdd(&bins[0][b], 1); atomicAdd(sums + i, w);"
     " atomicInc((u32*)ticket + place, 3); }", None), ("// atomicAdd(float)", None)])
def test_planted_atomics_are_found(code, fault):
    assert atomic_faults(code) == ([fault] if fault else [])


def atomic_faults(text: str) -> list[str]:
    """Every atomic but atomicAdd and atomicInc on what is declared here as u32, i32 or u64, and as nothing else."""
    code, faults = re.sub(r"//[^\n]*", "", text), []
    for found in ATOMIC.finditer(code):
        call = ALLOWED.match(code, found.start())
        if call is None:
            faults.append(found[0])
            continue
        name = call[1]
        declared = rf"\b(?!return\b)(\w+)(?:\s*\*\s*(?:__restrict__\s+)?{name}\b|\s*\(&\s*{name}\s*\)|\s+{name}\b)"
        types = set(re.findall(declared, code))
        if not types or not types <= INTEGERS:
            faults.append(f"{name} is {' and '.join(sorted(types - INTEGERS)) or 'not declared'}")
    return faults


def test_an_architecture_that_nvrtc_does_not_know_is_exit_9():
    with pytest.raises(UnavailableError, match="sm_999") as caught:
        compile_text("", "nothing", "sm_999", OPTIONS)
    assert caught.value.exit_code == 9 and "NVRTC" in str(caught.value)
