"""`apr contracts validate, list, show` and bad input, on a small checkout; that of apr is test_contract.py's."""

import json

import pytest
from fake_checkout import FILES, edit, plant

from apr.cli.main import main
from apr.tools.contracts import same_signature, signature

SCALE = "contracts/scale-v1.yaml"
FAULTS = {
    "unknown key": (SCALE, ("version: 1", "version: 1\nstatus: proven"), "status: expected a key of Contract, found"),
    "duplicate key": (SCALE, ("version: 1", "version: 1\nversion: 1"), "key 'version' twice"),
    "duplicate id": (SCALE, ("id: SCALE-003", "id: SCALE-001"), "scale: SCALE-001: expected each falsifier id once"),
    "duplicate id elsewhere": (SCALE, ("id: SCALE-003", "id: PLAN-001"), "scale: PLAN-001: expected each falsifier id"),
    "no test file": (SCALE, ("gpu/test_kernel.py", "gpu/test_none.py"), "SCALE-101: test: expected tests/gpu/test_no"),
    "no test": (SCALE, ("::test_kernel", "::test_kernels"), "SCALE-101: test: expected test_kernels in tests/gpu/test_k"
                "ernel.py, found no such test; did you mean 'test_kernel'?"),
    "no parameter": (SCALE, ("test_scale[2]", "test_scale[3]"), "SCALE-001: test: expected test_scale[3] in tests/cpu/"
                     "test_scale.py, found no such test; did you mean 'test_scale["),
    "no mutant file": (SCALE, ('apr/scale.py, replace: " * f', 'apr/scales.py, replace: " * f'), "scale: SCALE-001: /"),
    "text absent": (SCALE, ('" * factor"', '" ** factor"'), "scale: SCALE-001: apr/scale.py: expected ' ** factor' exa"
                    "ctly once, found 0 times; correct the mutant"),
    "no module": (SCALE, ("apr.scale.Settings:", "apr.scales.Settings:"), "scale: apr.scales.Settings: expected a fu"),
    "no function": (SCALE, ("apr.scale.scale:", "apr.scale.scales:"), "expected a function or class 'scales', found "),
    "no method": (SCALE, ("Scaler.apply:", "Scaler.aply:"), "apr.scale.Scaler.aply: expected a function or class 'apl"),
    "other signature": (SCALE, ("(inp, factor=FACTOR)", "(inp, factor=2)"), "apr.scale.scale: expected (inp, factor=2)"
                        ", found (inp, factor=FACTOR); correct the one that is wrong"),
    "no signature": (SCALE, ("(inp, factor=FACTOR)", "inp -> float"), "expected inp -> float, found (inp, factor=FACT"),
    "a parameter less": ("apr/scale.py", ("inp: float, factor: float = FACTOR", "inp: float"), "expected (inp, factor"),
    "Python that is none": ("apr/scale.py", ("class Settings:", "class Settings"), "expected Python in /"),
    "a test that cannot be imported": ("tests/gpu/test_kernel.py", ("import scale", "import scales"),
                                       "the tests in tests/gpu: expected tests that pytest can collect"),
    "rests on nothing": ("contracts/plan-v1.yaml", ("SCALE-101", "SCALE-102"), "did you mean 'SCALE-101'"),
    "chain": ("contracts/plan-v1.yaml", ("[SCALE-101]", "[PLAN-001]"), "PLAN-001, which rests on others"),
    "rests on what cannot fail": ("contracts/plan-v1.yaml", ("[SCALE-101]", "[SCALE-002]"), "SCALE-002, which cannot"),
    "broken link": (SCALE, lambda text: "\x00" + text, "scale-v1.yaml: expected plain YAML"),
}


@pytest.fixture
def root(tmp_path):
    return plant(tmp_path)


def apr(capsys, *arguments):
    """Exit code, lines of stdout, the text of stderr."""
    code = main(["contracts", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_validate_a_sound_checkout(root, capsys):
    assert apr(capsys, "validate", "--root", root) == (0, ["2 contracts, 6 falsifiers, 0 errors"], "")
    code, lines, _ = apr(capsys, "validate", "--root", root, "--json")
    assert (code, json.loads(lines[0])) == (0, {"contracts": 2, "falsifiers": 6, "errors": 0})


@pytest.mark.parametrize("case", FAULTS)
def test_validate_names_the_fault(root, capsys, case):
    name, change, words = FAULTS[case]
    edit(root, name, change)
    code, lines, err = apr(capsys, "validate", "--root", root)
    assert code == 4 and err.count("\n") == 1 and "expected no errors, found" in err
    assert any(words in line for line in lines[:-1]), lines
    assert not lines[-1].endswith(" 0 errors")


def test_validate_lists_every_fault_of_every_file(root, capsys):
    edit(root, SCALE, ("(inp, factor=FACTOR)", "(inp)"))
    edit(root, SCALE, ("test_scale[2]", "test_scale[7]"))
    edit(root, "contracts/plan-v1.yaml", ("SCALE-101", "SCALE-109"))
    (root / "contracts/other-v1.yaml").write_text("just words")
    code, lines, err = apr(capsys, "validate", "--root", root)
    assert code == 4 and len(lines) == 5 and lines[-1] == "2 contracts, 6 falsifiers, 4 errors" and "found 4" in err
    code, lines, _ = apr(capsys, "validate", "--root", root, "--json")
    rows = [json.loads(line) for line in lines]
    assert code == 4 and all(set(row) == {"where", "expected", "found", "fix"} for row in rows[:-1])
    assert rows[-1]["errors"] == 4


def test_a_text_that_occurs_twice(root, capsys):
    edit(root, "apr/scale.py", lambda text: text + "\nX = 1 * factor\n")
    code, lines, _ = apr(capsys, "validate", "--root", root)
    assert code == 4 and "found 2 times" in lines[0]


def test_list_and_show(root, capsys):
    code, lines, _ = apr(capsys, "list", "--root", root)
    assert code == 0 and [line.split() for line in lines] == [
        ["plan", "0", "CPU", "0", "GPU", "2", "resting", "on", "others", "unproven"],
        ["scale", "3", "CPU", "1", "GPU", "0", "resting", "on", "others", "unproven"]]
    rows = [json.loads(line) for line in apr(capsys, "list", "--root", root, "--json")[1]]
    assert rows[1] == {"name": "scale", "cpu": 3, "gpu": 1, "rest": 0, "status": "unproven"}
    code, lines, _ = apr(capsys, "show", "scale", "--root", root)
    text = "\n".join(lines)
    assert code == 0 and lines[0] == "scale, version 1: unproven (none was run)"
    assert "apr.scale.Scaler.apply(self, inp, *, twice=False)" in text and "out = inp * factor" in text
    assert "SCALE-001  not run: the factor is used" in text and "equivalent: nobody reads it" in text
    assert "with apr/scale.py edited, tests/cpu/test_scale.py::test_scale[2]" in text
    lines = apr(capsys, "show", "plan", "--root", root)[1]
    assert "document: version 1.5.0" in lines and "  corrected: log2 for ln" in lines
    assert "    rests on SCALE-001, SCALE-003" in lines
    row = json.loads(apr(capsys, "show", "plan", "--root", root, "--json")[1][0])
    assert row["status"] == "unproven" and row["falsifiers"][1]["rests_on"] == ["SCALE-101"]


def test_show_and_list_of_apr_itself(capsys):
    assert apr(capsys, "list")[0] == 0
    code, lines, _ = apr(capsys, "show", "rmsnorm")
    assert code == 0 and "  inputs: inp [N, C, floatX, read]" in lines and "  baked: C, EPS, FLOATX" in lines
    assert any(line.startswith("  tolerance: relative_l2 1e-06: ") for line in lines)


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["show"], 2, "one name after 'show'"), (["show", "a", "b"], 2, "2 after 'show'"), (["list", "a"], 2, "1 after 'l"),
    (["show", "scal"], 3, "did you mean 'scale'?"), (["falsify", "scal"], 3, "did you mean 'scale'?"),
    (["falsify", "SCALE-009"], 3, "did you mean 'SCALE-00"), (["validat"], 2, "invalid choice"),
    (["validate", "--cpu"], 2, "--cpu with 'falsify' alone, found 'validate'"),
    (["list", "--receipt", "x"], 2, "--receipt with 'falsify' alone"), (["list", "--workers", "2"], 2, "--workers wit"),
    (["falsify", "--workers", "0"], 2, "not a number from 1 to 256"), (["falsify", "--cpu", "--gpu"], 2, "not allowed"),
    (["falsify", "--require", "proven"], 2, "--require with 'status' alone"),
    (["status", "--require", "great"], 2, "invalid choice")], ids=str)
def test_mistakes(root, capsys, arguments, code, words):
    found, lines, err = apr(capsys, *arguments, "--root", root)
    assert (found, lines, err.count("\n")) == (code, [], 1) and words in err


@pytest.mark.parametrize("action", ["validate", "list", "falsify", "status"])
def test_a_folder_that_is_no_checkout(tmp_path, capsys, action):
    code, lines, err = apr(capsys, action, "--root", tmp_path)
    assert (code, lines, err.count("\n")) == (9, [], 1) and "a checkout, with apr/, contracts/ and tests/" in err


def test_an_installed_package_lists_its_contracts_and_proves_nothing(root, tmp_path, monkeypatch, capsys):
    (tmp_path / "wheel").mkdir()
    (root / "contracts").rename(tmp_path / "wheel" / "contracts")
    monkeypatch.setattr("apr.cli.contracts.contracts_dir", lambda: tmp_path / "wheel" / "contracts")
    assert [line.split()[-1] for line in apr(capsys, "list")[1]] == ["unproven", "unproven"]
    code, _, err = apr(capsys, "falsify", "--cpu")
    assert code == 9 and "a checkout" in err


@pytest.mark.parametrize(("a", "b", "same"), [
    ("(a, b=1)", "(a,b = 1)", True), ("(a='x')", '(a="x")', True), ("(a, b)", "(b, a)", False),
    ("(a, *, b)", "(a, b)", False), ("(a, b=1)", "(a, b=2)", False), ("(a: int)", "(a)", False), ("(a", "(a", False)])
def test_signatures_are_compared_as_code(a, b, same):
    assert same_signature(a, b) == same


def test_nothing_of_the_checkout_is_imported(tmp_path):
    plant(tmp_path)
    edit(tmp_path, "apr/scale.py", lambda text: "raise SystemExit\n" + text)
    assert signature(tmp_path, "apr.scale.scale") == "(inp, factor=FACTOR)"
    assert set(FILES) >= {"apr/scale.py"}
