"""An op has one stem everywhere: reference, contract, test; with GPU ops also op, kernel, GPU test and benchmark."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The exceptions, by name: stems that have a reference, a contract and a test, but no kernel of their own.
COMPOSITIONS = {"block", "model"}
# And contracts of things that are no ops (none yet).
NOT_OPS: set[str] = set()


def stems(pattern: str) -> set[str]:
    """What the `*` of a pattern stands for in each file of the repository that matches it."""
    before, _, after = Path(pattern).name.partition("*")
    return {p.name.removeprefix(before).removesuffix(after) for p in ROOT.glob(pattern)} - {"__init__"}


REFERENCE = stems("apr/reference/*.py")
OPS = REFERENCE - COMPOSITIONS


def test_there_are_ops():
    assert {"embedding", "rmsnorm", "linear", "rope", "attention", "swiglu", "residual", "cross_entropy", "adamw",
            "global_norm"} <= OPS
    assert COMPOSITIONS <= REFERENCE


def test_every_reference_has_its_contract_and_every_contract_its_reference():
    assert stems("contracts/*-v1.yaml") - NOT_OPS == REFERENCE
    assert {p.name for p in (ROOT / "contracts").iterdir()} == {f"{s}-v1.yaml" for s in REFERENCE | NOT_OPS}


def test_every_reference_has_its_test_and_every_test_its_reference():
    assert stems("tests/cpu/test_reference_*.py") == REFERENCE


# From the first GPU op on, every op has all its GPU siblings.
GPU_SIBLINGS = ["apr/ops/*.py", "kernels/*.cu", "tests/gpu/test_*.py", "benchmarks/bench_*.py"]


@pytest.mark.parametrize("pattern", GPU_SIBLINGS if (ROOT / "apr" / "ops").is_dir() else ["apr/reference/*.py"])
def test_every_op_has_its_sibling(pattern):
    assert stems(pattern) >= OPS, "missing: " + ", ".join(sorted(OPS - stems(pattern)))
    if pattern == "apr/ops/*.py":
        assert stems(pattern) == OPS, "an op without a reference"
