"""Contracts: ours are valid and name every argument of the code; malformed ones are refused with a reason."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from apr.contract import check_repository, load_all, load_contract
from apr.errors import FormatError, NotFoundError
from apr.paths import contracts_dir
from apr.strict import parse_yaml

ROOT = Path(__file__).parents[2]
CONTRACTS = load_all(contracts_dir())
FUSED = [c for c in CONTRACTS if c.name.startswith("decode_")]  # several references, one kernel
OPS = [c for c in CONTRACTS if c not in FUSED and c.name not in ("block", "model", "kv_cache", "ptx_cache", "buffers")]
SCRATCH = {"partial", "ticket"}  # arrays of a kernel that nobody gets to see
SIZES = {"S", "T"}  # arguments that are axes
HELPERS = {"sigmoid", "silu", "inverse_frequencies"}  # functions inside an op, which promise nothing of their own
NOT_ARGUMENTS = {"head_size", "dtype"}  # an axis (HS) and the storage type

VALID = """
name: scale
version: 1
source: a test
axes: {N: var, C: const}
inputs: {inp: [N, C, floatX, read], factor: [f32, read]}
outputs: {out: [N, C, floatX, set]}
backward: {dout: [N, C, floatX, read], dinp: [N, C, floatX, set]}
baked: [C]
equations: {out: "inp * factor"}
tolerance: {rule: relative_l2, value: 1e-6, why: one rounding}
inputs_must_include: [a factor that is not 1]
falsifiers:
  - id: SCALE-001
    claim: the factor is used
    seed: true
    mutant: {file: scale.py, replace: " * factor", with: ""}
    test: test_scale.py::test_scale[1]
"""
MALFORMED = {
    "unknown key": ("baked:", "bakd:", "bakd: expected a key of Contract, found an unknown key; did you mean 'baked'?"),
    "key of a falsifier": ("claim:", "clam:", "clam: expected a key of Falsifier, found an unknown key; did you mean"),
    "key of a mutant": ("with:", "wiht:", "wiht: expected a key of Mutant, found an unknown key; did you mean 'with'?"),
    "missing key": ("source: a test\n", "", "missing required field `source`"),
    "duplicate key": ("version: 1", "version: 1\nversion: 1", "key 'version' twice"),
    "other name": ("name: scale", "name: scales", "expected 'scale-v1' without -v1, found 'scales'"),
    "other version": ("version: 1", "version: 2", "version"),
    "version as text": ("version: 1", 'version: "1"', "version"),
    "unknown axis": ("{N: var, C: const}", "{N: var, K: const}", "Invalid enum value 'K'"),
    "axis kind": ("C: const", "C: constant", "Invalid enum value 'constant'"),
    "undeclared axis": ("outputs: {out: [N, C,", "outputs: {out: [N, T,", "axis 'T' of out is not declared; known: C"),
    "dtype": ("factor: [f32, read]", "factor: [f16, read]", "Invalid enum value 'f16' - at `$.inputs"),
    "role": ("factor: [f32, read]", "factor: [f32, write]", "Invalid enum value 'write' - at `$.inputs"),
    "argument without role": ("factor: [f32, read]", "factor: [f32]", "factor: expected [axes..., dtype, role]"),
    "argument twice": ("dinp: [", "inp: [", "argument 'inp' twice"),
    "tolerance rule": ("rule: relative_l2", "rule: cosine", "Invalid enum value 'cosine'"),
    "tolerance number": ("value: 1e-6", "floor: 1e-6", "rule 'relative_l2' needs 'value' and no other number"),
    "tolerance of all": ("value: 1e-6", "value: 1.0", "Expected `float` < 1.0"),
    "tolerance without why": (", why: one rounding", "", "missing required field `why`"),
    "empty mutant": ('with: ""', 'with: " * factor"', "a mutant must change something"),
    "mutant text as number": ('with: ""', "with: 1e-5", "Expected `str`, got `float`"),
    "id": ("id: SCALE-001", "id: scale-1", "Expected `str` matching regex"),
    "no YAML": ("equations: {", "equations: [{", "expected plain YAML"),
    "text only": (VALID, "just words", "Expected `object`, got `str`"),
}


def write(folder, text=VALID, name="scale"):
    path = folder / f"{name}-v1.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: c.name)
def test_contract_fits_the_repository(contract):
    """Files and tests exist, the text to replace occurs exactly once, and there is something to falsify."""
    check_repository(contract, ROOT)
    assert contract.falsifiers
    assert contract.inputs_must_include
    assert all(f.id.startswith(contract.name.upper() + "-") for f in contract.falsifiers)
    used = "*".join(axis for a in (contract.inputs | contract.outputs | contract.backward).values() for axis in a.shape)
    assert set(contract.axes) <= set(used.replace("/", "*").split("*")), "an axis is declared that nothing has"


@pytest.mark.parametrize("contract", OPS, ids=lambda c: c.name)
def test_contract_names_every_argument_of_the_reference(contract):
    """FlashInfer's contract of RMSNorm leaves eps out; ours cannot."""
    module = import_module(f"apr.reference.{contract.name}")
    functions = [f for name, f in inspect.getmembers(module, inspect.isfunction)
                 if f.__module__ == module.__name__ and name not in HELPERS and not name.startswith("_")]
    arguments = {name for f in functions for name in inspect.signature(f).parameters} - NOT_ARGUMENTS
    assert set(contract.inputs) <= arguments <= set(contract.inputs | contract.outputs | contract.backward)


@pytest.mark.parametrize("contract", FUSED, ids=lambda c: c.name)
def test_contract_of_a_fused_op_names_every_argument_of_its_kernels(contract):
    module = import_module(f"apr.ops.{contract.name}")
    arguments = {arg.partition(":")[0].removesuffix("_of") for spec in module.SPECS for arg in spec.args}
    assert set(contract.inputs | contract.outputs) == arguments - SCRATCH - SIZES
    assert list(contract.baked) == list(module.BAKED)


def test_valid_contract_is_read(tmp_path):
    contract = load_contract(write(tmp_path))
    assert contract.inputs["inp"].shape == ("N", "C")
    assert contract.inputs["factor"].shape == ()
    assert contract.tolerance.value == 1e-6
    assert contract.falsifiers[0].seed
    assert contract.falsifiers[0].mutant.apply("out = inp * factor") == "out = inp"


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_contract_is_refused(tmp_path, case):
    old, new, reason = MALFORMED[case]
    assert VALID.count(old) == 1
    path = write(tmp_path, VALID.replace(old, new))
    with pytest.raises(FormatError) as error:
        load_contract(path)
    assert reason in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", parse_yaml(VALID.encode(), "a valid contract").keys() - {"backward"})
def test_contract_without_a_key_is_refused(tmp_path, key):
    values = parse_yaml(VALID.encode(), "a valid contract")
    del values[key]
    with pytest.raises(FormatError, match=f"missing required field `{key}`"):
        load_contract(write(tmp_path, yaml.safe_dump(values, sort_keys=False)))


def test_falsifier_ids_are_unique_within_and_across_contracts(tmp_path):
    write(tmp_path)
    assert [c.name for c in load_all(tmp_path)] == ["scale"]
    write(tmp_path, VALID.replace("name: scale", "name: shift"), "shift")
    with pytest.raises(FormatError, match="each falsifier id once, found SCALE-001"):
        load_all(tmp_path)


@pytest.mark.parametrize(("source", "test", "error", "reason"), [
    ("out = inp", "def test_scale(", FormatError, "exactly once, found 0 times"),
    ("out = inp * factor * factor", "def test_scale(", FormatError, "exactly once, found 2 times"),
    ("out = inp * factor", "def test_other(", FormatError, "SCALE-001: expected test test_scale.* in test_scale.py"),
    ("out = inp * factor", None, NotFoundError, "test_scale.py"),
    (None, "def test_scale(", NotFoundError, "scale.py"),
])
def test_contract_that_does_not_fit_the_repository_is_refused(tmp_path, source, test, error, reason):
    for name, text in (("scale.py", source), ("test_scale.py", test)):
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(error, match=reason):
        check_repository(load_contract(write(tmp_path)), tmp_path)
