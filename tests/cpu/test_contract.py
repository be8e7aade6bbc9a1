"""Contracts: ours are valid and name every argument of the code; malformed ones are refused with a reason."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from apr.contract import OpContract, load_all, load_contract, read_folder
from apr.errors import FormatError
from apr.paths import contracts_dir
from apr.strict import parse_yaml
from apr.tools.contracts import validate

ROOT = Path(__file__).parents[2]
CONTRACTS = load_all(contracts_dir())
FUSED = [c for c in CONTRACTS if c.name.startswith("decode_")]  # several references, one kernel
OPS = [c for c in CONTRACTS if isinstance(c, OpContract) and c not in FUSED
       and c.name not in ("block", "model", "kv_cache")]
SCRATCH = {"partial", "ticket"}  # arrays of a kernel that nobody gets to see
SIZES = {"S", "T"}  # arguments that are axes
HELPERS = {"sigmoid", "silu", "inverse_frequencies"}  # functions inside an op, which promise nothing of their own
NOT_ARGUMENTS = {"head_size", "dtype"}  # an axis (HS) and the storage type

VALID = """
name: scale
version: 1
source: a test
symbols: {apr.scale.scale: "(inp, factor)"}
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
    mutant: {file: apr/scale.py, replace: " * factor", with: ""}
    test: tests/cpu/test_scale.py::test_scale[1]
"""
MALFORMED = {
    "unknown key": ("baked:", "bakd:",
                    "bakd: expected a key of OpContract, found an unknown key; did you mean 'baked'?"),
    "key of a falsifier": ("claim:", "clam:", "clam: expected a key of Falsifier, found an unknown key; did you mean"),
    "key of a mutant": ("with:", "wiht:", "wiht: expected a key of Mutant, found an unknown key; did you mean 'with'?"),
    "status by hand": ("version: 1", "version: 1\nstatus: proven", "status: expected a key of OpContract, found an un"),
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
    "id of digits": ("id: SCALE-001", "id: 1SCALE-001", "Expected `str` matching regex"),
    "file outside": ("file: apr/scale.py", "file: ../scale.py", "Expected `str` matching regex"),
    "file from the root": ("file: apr/scale.py", "file: /etc/passwd", "Expected `str` matching regex"),
    "test without a function": ("test_scale.py::test_scale[1]", "test_scale.py", "Expected `str` matching regex"),
    "test elsewhere": ("test: tests/cpu/test_scale.py", "test: apr/test_scale.py", "Expected `str` matching regex"),
    "no symbols": ('symbols: {apr.scale.scale: "(inp, factor)"}', "symbols: {}", "Expected `object` of length >= 1"),
    "symbol of another": ("{apr.scale.scale:", "{numpy.scale.scale:", "Expected `str` matching regex"),
    "no claim": ("claim: the factor is used", 'claim: ""', "Expected `str` of length >= 1"),
    "neither": ("    test: tests/cpu/test_scale.py::test_scale[1]\n", "", "SCALE-001 needs either 'test' or"),
    "both": ("    seed: true", "    rests_on: [SHIFT-001]", "SCALE-001 needs either 'test' or 'rests_on'"),
    "mutant of others": ("    test: tests/cpu/test_scale.py::test_scale[1]", "    rests_on: [SHIFT-001]",
                         "SCALE-001 has a mutant, which needs a test"),
    "equivalent": ('mutant: {file: apr/scale.py, replace: " * factor", with: ""}', "equivalent: it is so",
                   "SCALE-001 is called equivalent and has no mutant"),
    "document": ("source: a test", "source: a test\ndocument: {version: \"1\"}", "missing required field `corrected`"),
    "document's key": ("source: a test", "source: a test\ndocument: {verson: \"1\"}", "did you mean 'version'"),
    "no YAML": ("equations: {", "equations: [{", "expected plain YAML"),
    "text only": (VALID, "just words", "Expected `object`, got `str`"),
}


def write(folder, text=VALID, name="scale"):
    path = folder / f"{name}-v1.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_our_contracts_fit_our_code():
    """Files, tests and functions exist, parameters are the code's, the text to replace occurs exactly once."""
    contracts, faults = validate(ROOT)
    assert [str(fault) for fault in faults] == []
    assert [c.name for c in contracts] == [c.name for c in CONTRACTS]


@pytest.mark.parametrize("contract", [c for c in CONTRACTS if isinstance(c, OpContract)], ids=lambda c: c.name)
def test_contract_of_an_op(contract):
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


@pytest.mark.parametrize("key", sorted(parse_yaml(VALID.encode(), "a valid contract").keys() - {"backward"}))
def test_contract_without_a_key_is_refused(tmp_path, key):
    values = parse_yaml(VALID.encode(), "a valid contract")
    del values[key]
    with pytest.raises(FormatError, match=f"missing required field `{key}`"):
        load_contract(write(tmp_path, yaml.safe_dump(values, sort_keys=False)))


def test_falsifier_ids_are_unique_within_and_across_contracts(tmp_path):
    write(tmp_path)
    assert [c.name for c in load_all(tmp_path)] == ["scale"]
    write(tmp_path, VALID.replace("name: scale", "name: shift"), "shift")
    with pytest.raises(FormatError, match="shift: SCALE-001: expected each falsifier id once, found it in scale too"):
        load_all(tmp_path)


PLAIN = """
name: plan
version: 1
source: a test
symbols: {apr.plan.plan: "(config)"}
equations: {sum: the parts}
document: {version: "1.5.0", corrected: [log2 for ln]}
falsifiers:
  - {id: PLAN-A_B-001, claim: it holds, test: "tests/cpu/test_plan.py::test_plan"}
  - {id: PLAN-002, claim: it scales, rests_on: [SCALE-001]}
  - id: PLAN-003
    claim: nobody sees it
    mutant: {file: apr/plan.py, replace: "1", with: "2"}
    test: "tests/gpu/test_plan.py::test_plan"
    equivalent: the number is never read
"""


def test_contract_of_a_part_and_of_a_document(tmp_path):
    write(tmp_path)
    write(tmp_path, PLAIN, "plan")
    plan, scale = load_all(tmp_path)
    assert isinstance(scale, OpContract) and not isinstance(plan, OpContract)
    assert plan.document.version == "1.5.0" and plan.document.corrected == ("log2 for ln",) and not scale.document
    assert plan.symbols == {"apr.plan.plan": "(config)"}
    assert [f.suite for f in plan.falsifiers] == ["cpu", "", "gpu"]
    assert [f.mutant is None for f in plan.falsifiers] == [True, True, False]
    assert plan.falsifiers[1].rests_on == ("SCALE-001",) and plan.falsifiers[2].equivalent == "the number is never read"


@pytest.mark.parametrize(("others", "found"), [
    ("[SCALE-002]", "expected a falsifier's id, found 'SCALE-002'; did you mean 'SCALE-001'?"),
    ("[PLAN-002]", "a falsifier that is run and can fail, found PLAN-002, which rests on others"),
    ("[PLAN-003]", "a falsifier that is run and can fail, found PLAN-003, which cannot"),
    ("[PLAN-A_B-001]", "expected a falsifier of another contract, found PLAN-A_B-001, of this one"),
    ("[SCALE-001, SCALE-001]", "expected each falsifier once, found SCALE-001 twice"),
    ("[]", "PLAN-002 needs either 'test' or 'rests_on'"), ("SCALE-001", "Expected `array`, got `str`")])
def test_what_a_falsifier_cannot_rest_on(tmp_path, others, found):
    write(tmp_path)
    write(tmp_path, PLAIN.replace("[SCALE-001]", others), "plan")
    with pytest.raises(FormatError) as error:
        load_all(tmp_path)
    assert found in str(error.value)


def test_the_example_of_the_documentation_is_a_contract(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "contracts.md").read_text(), re.S)
    contract = load_contract(write(tmp_path, text, "rmsnorm"))
    ours = next(c for c in CONTRACTS if c.name == "rmsnorm")
    assert contract.falsifiers[0] in ours.falsifiers and contract.symbols.items() <= ours.symbols.items()
    assert (contract.tolerance, contract.axes, contract.source) == (ours.tolerance, ours.axes, ours.source)


def test_every_file_of_the_folder_is_a_contract_and_every_fault_is_found(tmp_path):
    write(tmp_path, VALID.replace("version: 1", "version: 3"))
    write(tmp_path, PLAIN.replace("[SCALE-001]", "[SCALE-009]"), "plan")
    (tmp_path / "notes.txt").write_text(VALID)
    contracts, faults = read_folder(tmp_path)
    assert [c.name for c in contracts] == ["plan"]
    assert "expected contracts and nothing else in their folder" in str(faults[0])
    assert [str(fault).split(": ")[0].rpartition("/")[2] for fault in faults] == ["notes.txt", "scale-v1.yaml", "plan"]
