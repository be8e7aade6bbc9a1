"""`apr contracts falsify` on a small checkout: every outcome, what is not run, what counts as a kill."""

import json
import os
import re

import pytest
from fake_checkout import CRASHES, SKIPPED, SURVIVES, WRONG, edit, plant
from fake_driver import H200, found

from apr.cli import contracts as command
from apr.cli.main import main
from apr.contract import Falsifier, Mutant, load_all
from apr.driver import DriverInfo
from apr.errors import MeasureError
from apr.tools import falsify as tool
from apr.tools.falsify import GOOD, OUTCOMES, Copies, Outcome, Suite, judge, resting
from apr.tools.pytest_runs import Run, merged

SUITE = Suite(2, ("-p", "no:cacheprovider"))
RED = "E       AssertionError: no\n"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Whatever this machine has."""
    monkeypatch.setattr(command, "probe", lambda: DriverInfo(False, "no NVIDIA driver", "", ()))


@pytest.fixture
def with_gpu(monkeypatch):
    """One that nothing is asked of: the tests of the small checkout need none."""
    monkeypatch.setattr(command, "probe", lambda: found(H200))
    monkeypatch.setattr(command, "cuda_problems", lambda info: [])


def apr(capsys, *arguments):
    """Exit code, rows of stdout, the text of stderr."""
    code = main(["contracts", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_every_outcome(tmp_path, capsys):
    plant(tmp_path, SURVIVES, CRASHES, WRONG, SKIPPED)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, rows, err = apr(capsys, "falsify", "--root", tmp_path, "--workers", 2)
    assert {row["id"]: row["outcome"] for row in rows[:-1]} == {
        "SCALE-001": "killed", "SCALE-002": "equivalent", "SCALE-003": "held", "SCALE-004": "survived",
        "SCALE-005": "not by assertion", "SCALE-006": "not equivalent", "SCALE-007": "broken", "SCALE-101": "not run",
        "PLAN-001": "held", "PLAN-002": "not run"}
    by_id = {row.get("id"): row for row in rows}
    assert by_id["SCALE-001"]["test"] == "tests/cpu/test_scale.py::test_scale[2]" and by_id["SCALE-001"]["seconds"] > 0
    assert by_id["SCALE-006"]["test"] == "tests/cpu/test_scale.py::test_scale[1]"  # of both, the one that was red
    assert by_id["SCALE-002"]["detail"] == "nobody reads it"
    assert rows[-1].pop("seconds") > 0
    assert rows[-1] == {"mutants": 5, "killed": 1, "survived": 1, "equivalent": 1, "not equivalent": 1,
                        "not by assertion": 1, "held": 1, "broken": 1, "not run": 1}
    assert code == 5 and err.count("\n") == 1 and "4 not: SCALE-004 survived, SCALE-005 not by assertion" in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_lines_for_people(tmp_path, capsys):
    plant(tmp_path)
    assert main(["contracts", "falsify", "--cpu", "--root", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and re.fullmatch(r"SCALE-001  killed in \d+\.\d s by tests/cpu/test_scale\.py::test_scale\[2\]",
                                      lines[0])
    assert lines[1:5] == ["SCALE-002  equivalent: nobody reads it [tests/cpu/test_scale.py::test_scale]",
                          "SCALE-003  held [tests/cpu/test_scale.py::test_scale]",
                          "PLAN-001  held: SCALE-001, SCALE-003", "PLAN-002  not run: SCALE-101"]
    assert re.fullmatch(r"killed 1 of 2 mutants \(50\.0 %\), survived 0, equivalent 1, not equivalent 0, not by "
                        r"assertion 0, held 1, broken 0, not run 1, \d+ s", lines[5])


def test_a_contract_or_an_id_and_what_it_rests_on(tmp_path, capsys):
    plant(tmp_path, SURVIVES)
    assert [r.get("id") for r in apr(capsys, "falsify", "SCALE-001", "--root", tmp_path)[1]] == ["SCALE-001", None]
    code, rows, _ = apr(capsys, "falsify", "PLAN-001", "SCALE-001", "--root", tmp_path)
    assert code == 0 and [(r.get("id"), r.get("outcome")) for r in rows[:-1]] == [
        ("SCALE-001", "killed"), ("SCALE-003", "held"), ("PLAN-001", "held")]
    assert apr(capsys, "falsify", "--root", tmp_path, "scale")[0] == 5  # names may come after flags too


def test_nothing_is_measured_where_the_code_is_red_already(tmp_path, capsys):
    plant(tmp_path)
    edit(tmp_path, "apr/scale.py", ("SPARE = 2, 1", "SPARE = 3, 1"))
    edit(tmp_path, "contracts/scale-v1.yaml", lambda text: text.replace("SPARE = 2,", "SPARE = 3,"))
    code, rows, err = apr(capsys, "falsify", "--cpu", "--root", tmp_path, "--receipt", tmp_path / "r.json")
    assert (code, rows, err.count("\n")) == (12, [], 1) and not (tmp_path / "r.json").exists()
    assert "SCALE-001: tests/cpu/test_scale.py::test_scale[2]: expected a test that passes on the code as it is" in err


def test_a_mutant_that_does_not_apply_is_refused_before_anything_runs(tmp_path, capsys, monkeypatch):
    plant(tmp_path)
    monkeypatch.setattr(command, "falsify", lambda *a: pytest.fail("it ran"))
    edit(tmp_path, "contracts/scale-v1.yaml", ('" * factor"', '" ** factor"'))
    code, rows, err = apr(capsys, "falsify", "--cpu", "--root", tmp_path)
    assert (code, rows, err.count("\n")) == (4, [], 1) and "' ** factor' exactly once, found 0 times" in err


def test_the_gpu_s_are_run_where_there_is_one(tmp_path, capsys, with_gpu):
    plant(tmp_path)
    code, rows, _ = apr(capsys, "falsify", "--gpu", "--root", tmp_path)
    assert code == 0 and {r["id"]: r["outcome"] for r in rows[:-1]} == {
        "SCALE-101": "killed", "PLAN-001": "not run", "PLAN-002": "killed", "SCALE-001": "not run",
        "SCALE-002": "not run", "SCALE-003": "not run"}
    code, rows, _ = apr(capsys, "falsify", "--root", tmp_path)
    assert code == 0 and rows[-1]["not run"] == 0 and rows[-1]["killed"] == 2


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["--gpu"], 9, "--gpu: expected a GPU that can be used, found no NVIDIA driver"),
    (["SCALE-101"], 12, "expected something to run, found 1 falsifiers, none for cpu; nothing was measured"),
    (["PLAN-002", "--cpu"], 12, "nothing was measured")], ids=str)
def test_what_cannot_be_run_is_no_pass(tmp_path, capsys, arguments, code, words):
    found, rows, err = apr(capsys, "falsify", *arguments, "--root", plant(tmp_path))
    assert (found, rows, err.count("\n")) == (code, [], 1) and words in err


def test_a_copy_without_its_own_apr_measures_nothing(tmp_path):
    plant(tmp_path)
    (tmp_path / "apr" / "__init__.py").write_text("__file__ = '/elsewhere/apr/__init__.py'\n")
    with Copies(tmp_path, SUITE) as copies, pytest.raises(MeasureError, match="expected apr of the copy"):
        copies.unmutated(["tests/cpu/test_scale.py::test_scale"])


def test_the_copies_are_clean_after_every_mutant_and_gone_at_the_end(tmp_path):
    plant(tmp_path, SURVIVES, CRASHES, WRONG)
    falsifiers = [f for c in load_all(tmp_path / "contracts") for f in c.falsifiers if f.suite == "cpu" and f.mutant]
    with Copies(tmp_path, SUITE, 1) as copies:
        futures = [copies.start(f) for f in falsifiers]
        assert copies.start(falsifiers[0]) is futures[0]
        assert [f.result().outcome for f in futures] == ["killed", "equivalent", "survived", "not by assertion",
                                                         "not equivalent"]
        source = (copies.copies[0] / "apr" / "scale.py").read_bytes()
        assert source == (tmp_path / "apr" / "scale.py").read_bytes()
    assert not os.path.exists(copies.folder.name)


def test_runs_without_a_mutant_go_on_beside_those_with_one_and_see_none(tmp_path):
    plant(tmp_path)
    killed = next(f for c in load_all(tmp_path / "contracts") for f in c.falsifiers if f.id == "SCALE-001")
    with Copies(tmp_path, SUITE) as copies:
        started = copies.start_unmutated([killed.test])
        mutated = copies.start(killed)
        assert copies.start_unmutated([killed.test]) is started
        assert copies.unmutated([killed.test]).code == 0 and mutated.result().outcome == "killed"


def test_a_mutant_that_hangs_is_ended_and_counts_as_a_fault(tmp_path):
    plant(tmp_path)
    hangs = Falsifier(id="SCALE-009", claim="it ends", test="tests/cpu/test_scale.py::test_scale",
                      mutant=Mutant("apr/scale.py", "return inp", "while True: pass\n    return inp"))
    with Copies(tmp_path, Suite(1, SUITE.options, seconds=2.0)) as copies:
        outcome = copies.start(hangs).result()
    assert outcome.outcome == "not by assertion" and "no end in 2 s" in outcome.detail


@pytest.mark.parametrize("variable", ["CI", "BUILD_NUMBER"])
def test_a_mutant_of_large_arrays_is_killed_in_ci_too(tmp_path, monkeypatch, variable):
    """There pytest would print the whole diff of what is unequal: minutes."""
    monkeypatch.setenv(variable, "1")
    plant(tmp_path)
    edit(tmp_path, "tests/cpu/test_scale.py", lambda text: text + """
def test_large():
    assert bytes(scale(i) % 251 for i in range(50000)) == bytes(2 * i % 251 for i in range(50000))
""")
    shifted = Falsifier(id="SCALE-009", claim="every byte", test="tests/cpu/test_scale.py::test_large",
                        mutant=Mutant("apr/scale.py", "inp * factor", "inp * 97 + 31"))
    with Copies(tmp_path, Suite(1, SUITE.options, seconds=10.0)) as copies:
        assert copies.start(shifted).result().outcome == "killed"


@pytest.mark.parametrize(("code", "output", "equivalent", "word"), [
    (0, "", None, "survived"), (0, "", "so", "equivalent"), (1, RED, None, "killed"), (1, RED, "so", "not equivalent"),
    (1, "E   assert 1 == 2\n", None, "killed"), (1, "E   Failed: DID NOT RAISE ValueError\n", None, "killed"),
    (1, "E   ImportError: no\n", None, "not by assertion"), (1, "E   ImportError: no\n", "so", "not by assertion"),
    (2, RED, None, "not by assertion"), (5, "", None, "not by assertion"), (-11, RED, None, "not by assertion")])
def test_what_counts_as_a_kill(code, output, equivalent, word):
    falsifier = Falsifier(id="A-001", claim="c", test="tests/cpu/a.py::a", mutant=Mutant("a", "b", "c"),
                          equivalent=equivalent)
    assert judge(falsifier, Run(code, output)).outcome == word


def test_runs_beside_each_other_count_as_one():
    runs = [Run(1, "a is red", {"a": "failure"}, 3.0), Run(0, "fine", {"b": "passed"}, 5.0)]
    whole = merged(runs)
    assert (whole.code, whole.red, whole.passed("b"), whole.passed("a"), whole.seconds) == (1, "a", True, False, 5.0)
    assert whole.last_words.endswith("a is red") and merged(runs[1:]).code == 0


def test_the_worst_of_what_a_falsifier_rests_on_is_its_outcome():
    both = Falsifier(id="A-001", claim="c", rests_on=("B-001", "B-002"))
    assert resting(both, {"B-001": "killed"}) == "not run"
    for a in OUTCOMES:
        assert resting(both, {"B-001": a, "B-002": "killed"}) == a == resting(both, {"B-001": "killed", "B-002": a})
    assert resting(both, {"B-001": "survived", "B-002": "not run"}) == "survived"
    assert [o for o in OUTCOMES if o not in GOOD][-1] == tool.NOT_RUN


@pytest.mark.parametrize(("results", "passed"), [
    ({"t.py::a[1]": "passed", "t.py::a[2]": "passed"}, True),
    ({"t.py::a[1]": "passed", "t.py::a[2]": "skipped"}, False),
    ({"t.py::a[1]": "passed", "t.py::a[2]": "error"}, False), ({"t.py::ab": "passed"}, False), ({}, False)])
def test_a_test_passes_with_all_its_parameters_and_not_by_being_skipped(results, passed):
    assert Run(0, "", results).passed("t.py::a") == passed
    assert Outcome("A-001", "held").seconds == 0.0
