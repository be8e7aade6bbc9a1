"""An op has one stem everywhere: reference, contract, test; with GPU ops also op, kernel, GPU test and benchmark."""

import re
from pathlib import Path

import pytest

from apr.contract import OpContract, load_all
from apr.paths import contracts_dir

ROOT = Path(__file__).parents[2]
# The exceptions, by name: stems that have a reference, a contract and a test, but no kernel of their own.
COMPOSITIONS = {"block", "model", "kv_cache"}
# The residual addition is part of the norm that follows it: its kernel and op are that op's. (It has a GPU test and a
# benchmark of its own.)
FUSED = {"residual": "rmsnorm"}
# Decoding fuses these: their truth is these references, one after the other.
DECODING = {"decode_linear": ("linear", "rmsnorm", "residual", "swiglu"),
            "decode_attention": ("attention", "rope", "rmsnorm")}
# Contracts of parts that are no ops, and those of the documents of the Rust system, under their own names.
PARTS = {"ptx_cache", "buffers", "trainer", "eval", "guards", "data", "checkpoint", "apr_file", "safetensors", "gguf",
         "gate", "live_gate", "bisect", "parity", "qa", "recovery"}
DOCUMENTS = {"apr-pretrain-cuda-forward-parity", "apr-pretrain-cuda-rmsnorm-eps-parity",
             "apr-pretrain-cuda-rope-theta-cache-key", "apr-pretrain-init-finetune", "apr-pretrain-arch-polymorphic",
             "apr-pretrain-from-init", "gpu-training-backend", "training-loop-pretrain", "apr-cpu-vs-gpu-output-parity",
             "apr-vs-gguf-forward-parity", "apr-cli-trace-save-tensor"}


def stems(pattern: str) -> set[str]:
    """What the `*` of a pattern stands for in each file of the repository that matches it."""
    before, _, after = Path(pattern).name.partition("*")
    return {p.name.removeprefix(before).removesuffix(after) for p in ROOT.glob(pattern)} - {"__init__"}


REFERENCE = stems("apr/reference/*.py")
OPS = REFERENCE - COMPOSITIONS
CONTRACTS = REFERENCE | DECODING.keys() | PARTS | DOCUMENTS


def test_there_are_ops():
    assert {"embedding", "rmsnorm", "linear", "rope", "attention", "swiglu", "residual", "cross_entropy", "adamw",
            "global_norm"} <= OPS
    assert COMPOSITIONS <= REFERENCE


def test_the_contracts_are_those_of_ops_and_of_documents_and_no_others():
    contracts = {c.name: c for c in load_all(contracts_dir())}
    assert {n for n, c in contracts.items() if isinstance(c, OpContract)} == REFERENCE | DECODING.keys()
    assert {n for n, c in contracts.items() if c.document} == DOCUMENTS


def test_every_reference_has_its_contract_and_every_contract_its_reference():
    assert {p.name for p in (ROOT / "contracts").iterdir()} == {f"{stem}-v1.yaml" for stem in CONTRACTS}


def test_every_reference_has_its_test_and_every_test_its_reference():
    assert stems("tests/cpu/test_reference_*.py") == REFERENCE


# From the first GPU op on, every op has all its GPU siblings.
GPU_SIBLINGS = ["apr/ops/*.py", "kernels/*.cu", "tests/gpu/test_*.py", "benchmarks/bench_*.py"]


@pytest.mark.parametrize("pattern", GPU_SIBLINGS if (ROOT / "apr" / "ops").is_dir() else ["apr/reference/*.py"])
def test_every_op_has_its_sibling(pattern):
    needed = OPS - FUSED.keys() if pattern in ("apr/ops/*.py", "kernels/*.cu") else OPS
    needed = needed | DECODING.keys()
    assert stems(pattern) >= needed, "missing: " + ", ".join(sorted(needed - stems(pattern)))
    if pattern == "apr/ops/*.py":
        assert stems(pattern) == needed, "an op without a reference"


def test_what_is_fused_is_part_of_the_kernel_that_it_is_said_to_be_in():
    for op, host in FUSED.items():
        assert f"apr/reference/{op}.py" in (ROOT / "kernels" / f"{host}.cu").read_text()


@pytest.mark.parametrize("op", DECODING)
def test_what_decoding_fuses_is_named_by_its_kernel_and_used_by_its_test(op):
    assert op not in REFERENCE and set(DECODING[op]) <= OPS
    header = (ROOT / "kernels" / f"{op}.cu").read_text().partition("#include")[0]
    named = re.search(r"REFERENCE +apr/reference/(.*)", header)[1]
    assert named.split(", ") == [f"{reference}.py" for reference in DECODING[op]]
    test = (ROOT / "tests" / "gpu" / f"test_{op}.py").read_text()
    imported = set(re.findall(r"from apr\.reference\.(\w+) import", test))
    assert imported == set(DECODING[op]) - FUSED.keys()  # a residual addition is a `+`
