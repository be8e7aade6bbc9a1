"""Receipts of falsified contracts: written and read whole, and the standing of each contract that follows from them."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_checkout import SURVIVES, edit, plant
from fake_driver import H200, found

from apr.cli import contracts as command
from apr.cli.main import main
from apr.contract import load_all
from apr.driver import DriverInfo
from apr.tools import receipts
from apr.tools.falsify import Outcome
from apr.tools.receipts import (
    GPU_SOURCES,
    GPU_TESTS,
    RECEIPTS,
    SOURCES,
    STANDINGS,
    digest,
    machine,
    read_receipt,
    standings,
    write_receipt,
)

ROOT = Path(__file__).parents[2]
CPU, GPU = RECEIPTS
GOOD = {"SCALE-001": "killed", "SCALE-002": "equivalent", "SCALE-003": "held"}
HELD_ON_GPU = '''  - {id: SCALE-201, claim: it holds there, test: "tests/gpu/test_kernel.py::test_kernel"}
'''


@pytest.fixture
def root(tmp_path):
    plant(tmp_path)
    (tmp_path / "docs/evidence").mkdir(parents=True)
    return tmp_path


def record(root, name, outcomes):
    """A receipt of these outcomes, on the sources as they are."""
    write_receipt(root / name, machine(None), digest(root), 1.23, {"killed": 1},
                  [Outcome(id, word, "tests/cpu/test_scale.py::test_scale", 0.5) for id, word in outcomes.items()])


def status(root):
    return {name: standing.status for name, standing in standings(root, load_all(root / "contracts")).items()}


def test_standings_follow_from_the_receipts(root):
    assert status(root) == {"plan": "unproven", "scale": "unproven"}
    record(root, CPU, GOOD)
    assert status(root) == {"plan": "partial", "scale": "partial"}
    record(root, GPU, {"SCALE-101": "killed"})
    assert status(root) == {"plan": "proven", "scale": "proven"}
    edit(root, "apr/scale.py", lambda text: text + "\nMORE = 1\n")
    assert status(root) == {"plan": "stale", "scale": "stale"}
    record(root, CPU, GOOD)
    assert status(root) == {"plan": "stale", "scale": "stale"}  # the GPU's is of other sources
    record(root, GPU, {"SCALE-101": "killed"})
    assert status(root) == {"plan": "proven", "scale": "proven"}


@pytest.mark.parametrize("word", ["survived", "broken", "not equivalent", "not by assertion"])
def test_one_bad_falsifier_makes_red_what_has_it_or_rests_on_it(root, word):
    record(root, GPU, {"SCALE-101": "killed"})
    record(root, CPU, GOOD | {"SCALE-001": word})
    assert status(root) == {"plan": "red", "scale": "red"}
    record(root, CPU, GOOD | {"SCALE-002": word})  # on which nothing rests
    assert status(root) == {"plan": "proven", "scale": "red"}


def test_the_run_of_all_gpu_tests_shows_what_holds_without_a_mutant(root):
    edit(root, "contracts/scale-v1.yaml", lambda text: text + HELD_ON_GPU)
    record(root, CPU, GOOD)
    record(root, GPU, {"SCALE-101": "killed"})
    assert status(root)["scale"] == "partial"
    run = {"passed": 7, "failed": 0, "skipped": 0, "digest": digest(root, GPU_SOURCES)}
    (root / GPU_TESTS).write_text(json.dumps(run))
    assert status(root) == {"plan": "proven", "scale": "proven"}
    (root / GPU_TESTS).write_text(json.dumps(run | {"digest": "0"}))
    assert status(root)["scale"] == "stale"
    record(root, GPU, {"SCALE-101": "killed", "SCALE-201": "held"})
    assert status(root)["scale"] == "proven"
    record(root, GPU, {"SCALE-101": "killed", "SCALE-201": "broken"})
    (root / GPU_TESTS).write_text(json.dumps(run))
    assert status(root)["scale"] == "red"


def test_the_newer_of_two_runs_that_show_the_same_counts(root):
    head, _, _ = (root / "contracts/scale-v1.yaml").read_text().partition("falsifiers:")
    (root / "contracts/scale-v1.yaml").write_text(f"{head}falsifiers:\n{HELD_ON_GPU}")
    (root / "contracts/plan-v1.yaml").unlink()
    record(root, GPU, {"SCALE-201": "held"})
    (root / "tests/cpu/test_more.py").touch()
    assert status(root) == {"scale": "stale"}
    run = {"passed": 7, "failed": 0, "skipped": 0, "digest": digest(root, GPU_SOURCES)}
    (root / GPU_TESTS).write_text(json.dumps(run))
    assert status(root) == {"scale": "proven"}


def test_the_digest_of_the_gpu_tests_is_that_of_their_own_receipt():
    spec = importlib.util.spec_from_file_location("receipt", ROOT / "tests/gpu/receipt.py")
    receipt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(receipt)
    assert digest(ROOT, GPU_SOURCES) == receipt.digest(ROOT) and str(receipt.RECEIPT) == GPU_TESTS


@pytest.mark.parametrize("name", ["apr/scale.py", "apr/ops/new.py", "apr/gemm_tables/t.json", "kernels/scale.cu",
                                  "contracts/plan-v1.yaml", "tests/gpu/test_kernel.py", "tests/new.py"])
def test_a_change_of_any_source_changes_the_digest(root, name):
    before = digest(root)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with (root / name).open("a") as f:
        f.write("#")
    assert digest(root) != before and len(SOURCES) == 5


def test_other_files_do_not_change_it(root):
    before = digest(root)
    record(root, CPU, GOOD)
    (root / "apr/__pycache__").mkdir()
    (root / "apr/__pycache__/scale.pyc").touch()
    assert digest(root) == before


def test_what_a_receipt_says_of_the_machine(monkeypatch):
    assert set(machine(None)) == {"python", "numpy", "platform"} and machine(None)["numpy"] == np.__version__
    nvrtc = SimpleNamespace(getVersion=lambda: (13, 0))
    monkeypatch.setattr(receipts, "import_cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(nvrtc=nvrtc)))
    monkeypatch.setattr(receipts, "cupy_distributions", lambda: {"cupy-cuda13x": "14.2.0"})
    assert machine(found(H200)).items() >= {"device": "NVIDIA H200", "driver": "13.0", "cuda": "13.0",
                                            "cupy": "14.2.0"}.items()


DAMAGED = {"nothing": "", "cut": '{"machine": ', "a list": "[]", "a key less": ("date", None),
           "a key more": ("more", 1),
           "another digest": ("digest", 3), "a count in words": ("counts", {"killed": "all"}),
           "outcome": ("falsifiers", {"SCALE-001": {"outcome": "passed", "test": "a", "seconds": 1.0}}),
           "not run": ("falsifiers", {"SCALE-001": {"outcome": "not run", "test": "a", "seconds": 1.0}}),
           "negative": ("falsifiers", {"SCALE-001": {"outcome": "killed", "test": "a", "seconds": -1.0}}),
           "id": ("falsifiers", {"scale": {"outcome": "killed", "test": "a", "seconds": 1.0}}),
           "a key more inside": ("falsifiers", {"A-001": {"outcome": "held", "test": "a", "seconds": 1.0, "by": "me"}})}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("action", ["status", "list", "show"])
def test_a_damaged_receipt_is_refused(root, capsys, case, action):
    record(root, CPU, GOOD)
    assert read_receipt(root / CPU).falsifiers["SCALE-001"].outcome == "killed"
    text = DAMAGED[case]
    if isinstance(text, tuple):
        values = json.loads((root / CPU).read_text()) | {text[0]: text[1]}
        text = json.dumps({k: v for k, v in values.items() if v is not None})
    (root / CPU).write_text(text)
    assert main(["contracts", action, *(["scale"] if action == "show" else []), "--root", str(root)]) == 4
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and str(root / CPU) in err


@pytest.mark.parametrize("text", ["{", "[]", '{"passed": 3}', '{"digest": "0", "passed": 3, "failed": 1, "skipped": 0}',
                                  '{"digest": "0", "passed": 0, "failed": 0, "skipped": 0}'])
def test_a_damaged_receipt_of_the_gpu_tests_is_refused(root, capsys, text):
    (root / GPU_TESTS).write_text(text)
    assert main(["contracts", "status", "--root", str(root)]) == 4
    assert capsys.readouterr().err.count("\n") == 1


def test_status_and_what_is_required(root, capsys):
    def apr(*arguments):
        code = main(["contracts", "status", "--root", str(root), *arguments])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    assert apr()[0] == 0 and apr("--require", "unproven")[0] == 0
    record(root, CPU, GOOD)
    code, lines, err = apr()
    assert (code, err, lines[-1]) == (0, "", "2 partial")
    assert lines[1].split() == ["scale", "partial", "1", "killed,", "1", "equivalent,", "1", "held,", "1", "not", "run"]
    code, lines, err = apr("--require", "proven", "--json")
    assert code == 5 and err.count("\n") == 1 and "every contract proven, found 2 less: plan partial, scale part" in err
    assert json.loads(lines[0]) == {"name": "plan", "status": "partial",
                                    "outcomes": {"PLAN-001": "held", "PLAN-002": "not run"}}
    record(root, GPU, {"SCALE-101": "survived"})
    assert [apr("--require", word)[0] for word in STANDINGS] == [5, 5, 5, 5, 0]


def test_a_run_leaves_the_receipt_that_status_reads(root, capsys, monkeypatch):
    monkeypatch.setattr(command, "probe", lambda: DriverInfo(False, "no NVIDIA driver", "", ()))
    edit(root, "contracts/scale-v1.yaml", lambda text: text + SURVIVES)
    assert main(["contracts", "falsify", "--root", str(root), "--receipt", str(root / CPU)]) == 5
    receipt = read_receipt(root / CPU)
    assert receipt.digest == digest(root) and {"python", "numpy", "platform"} == set(receipt.machine)
    assert {name: ran.outcome for name, ran in receipt.falsifiers.items()} == GOOD | {"SCALE-004": "survived"}
    assert receipt.counts["not run"] == 1 and receipt.seconds > 0 and receipt.falsifiers["SCALE-001"].seconds > 0
    assert status(root) == {"plan": "partial", "scale": "red"}
    capsys.readouterr()
    assert main(["contracts", "show", "scale", "--root", str(root)]) == 0
    assert "SCALE-004  survived: a shift is by one" in capsys.readouterr().out


def test_no_receipt_of_sources_that_changed_during_the_run(root, capsys, monkeypatch):
    def changed(*_):
        (root / "tests/cpu/test_new.py").touch()
        return [Outcome("SCALE-001", "killed")]

    monkeypatch.setattr(command, "falsify", changed)
    assert main(["contracts", "falsify", "SCALE-001", "--cpu", "--root", str(root), "--receipt", str(root / CPU)]) == 12
    assert "they have changed" in capsys.readouterr().err and not (root / CPU).exists()


def test_a_receipt_without_a_folder_is_refused_before_anything_runs(root, capsys):
    assert main(["contracts", "falsify", "--cpu", "--root", str(root), "--receipt", "/nowhere/r.json"]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "/nowhere" in err
