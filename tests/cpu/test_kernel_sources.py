"""What every kernel source must be: its header block whole, no float atomics, and no architecture that NVRTC lacks."""

import re
from pathlib import Path

import pytest

from apr.errors import UnavailableError
from apr.ptx_cache import OPTIONS, compile_text
from apr.registry import KERNELS

KERNEL_FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.cu"))
LINES = ("MATH", "SHAPES", "WRITES", "BAKED", "LAUNCH", "MEMORY", "FLOPS", "NUMERICS", "CONTRACT")


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda p: p.stem)
def test_the_header_says_everything(path):
    header = re.match(r"(//[^\n]*\n)+", path.read_text())[0]
    assert header.startswith(f"// {path.name} - ")
    assert [line for line in LINES if not re.search(rf"^// {line} +\S", header, re.M)] == []
    entries = {spec.entry for spec in KERNELS if spec.source == path.name}
    launches = header[header.index("// LAUNCH"):header.index("// MEMORY")]
    short = {e.removeprefix(f"{path.stem.removesuffix('_f32')}_").removeprefix("backward_") for e in entries}
    assert [e for e in short if e not in launches and "both" not in launches] == []


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda p: p.stem)
def test_sums_have_a_fixed_order(path):
    """A float added by an atomic is added in the order in which threads happen to come."""
    code = re.sub(r"//[^\n]*", "", path.read_text())
    assert not re.search(r"\batomic|\bred\.|\batom\.", code)


def test_an_architecture_that_nvrtc_does_not_know_is_exit_9():
    with pytest.raises(UnavailableError, match="sm_999") as caught:
        compile_text("", "nothing", "sm_999", OPTIONS)
    assert caught.value.exit_code == 9 and "NVRTC" in str(caught.value)
