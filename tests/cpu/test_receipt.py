"""The receipt of the GPU tests: written by a full, clean run only, worth nothing once what it tested has changed."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "receipt.py"
spec = importlib.util.spec_from_file_location("receipt", SCRIPT)
receipt = importlib.util.module_from_spec(spec)
spec.loader.exec_module(receipt)
FACTS = {"device": "a GPU", "driver": "13.0", "cuda": "12.9", "cupy": "14", "python": "3.11"}
FILES = {"kernels/a.cu": "a", "kernels/common.cuh": "c", "apr/a.py": "x = 1\n", "apr/ops/b.py": "y = 1\n",
         "apr/gemm_tables/t.json": "{}", "tests/gpu/test_a.py": "def test_a(): pass\n", "README.md": "read"}
CONFTEST = """
from pathlib import Path
from receipt import Recorder

def pytest_configure(config):
    recorder = Recorder(Path("docs/evidence/gpu-tests.json"), lambda: FACTS, lambda session: not COMPLETE_IS_FALSE,
                        strict=True, root=Path("."), rows_of=lambda test: ["G4"] if "test_a" in test else [])
    config.pluginmanager.register(recorder, "gpu receipt")
"""
OUTCOMES = {
    "passed": ("def test_a(): pass\n", [], 0),
    "failed": ("def test_a(): assert False\n", [], 1),
    "skipped": ("import pytest\n@pytest.mark.skip(reason='none')\ndef test_a(): pass\ndef test_b(): pass\n", [], 1),
    "skipped in setup": ("import pytest\n@pytest.fixture\ndef f(): pytest.skip('none')\ndef test_a(f): pass\n"
                         "def test_b(): pass\n", [], 1),
    "failed in teardown": ("import pytest\n@pytest.fixture\ndef f():\n    yield\n    assert False\n"
                           "def test_a(f): pass\n", [], 1),
    "expected to fail": ("import pytest\n@pytest.mark.xfail\ndef test_a(): assert False\ndef test_b(): pass\n", [], 1),
    "deselected": ("def test_a(): pass\ndef test_b(): pass\n", ["-k", "not test_b"], 0),
    "broken": ("import nothing_of_this_name\n", [], 2),
    "empty": ("x = 1\n", [], 5),
}


@pytest.fixture
def tree(tmp_path):
    """A small checkout."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def written(tree, **changes):
    """The tree's receipt, as a run writes it; some keys of it changed."""
    path = tree / receipt.RECEIPT
    receipt.write(path, FACTS, 7, 12.34, receipt.digest(tree), {"G4": 2})
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def test_receipt_of_this_code_is_current(tree):
    record = json.loads(written(tree).read_text())
    assert tuple(record) == receipt.KEYS
    assert record["passed"] == 7 and record["seconds"] == 12.3 and record["device"] == "a GPU"
    assert receipt.check(tree / receipt.RECEIPT, tree) == ""


@pytest.mark.parametrize("name", [n for n in FILES if n != "README.md"] + ["apr/new.py", "kernels/new.cu"])
def test_receipt_is_stale_after_a_change(tree, name):
    path = written(tree)
    with (tree / name).open("a") as file:
        file.write("z")
    assert receipt.check(path, tree).startswith("stale: ")


def test_receipt_is_stale_after_a_file_is_renamed_or_gone(tree):
    path = written(tree)
    (tree / "kernels/a.cu").rename(tree / "kernels/b.cu")
    assert receipt.check(path, tree).startswith("stale: ")
    (tree / "kernels/b.cu").unlink()
    assert receipt.check(path, tree).startswith("stale: ")


def test_receipt_does_not_depend_on_anything_else(tree):
    path = written(tree)
    (tree / "README.md").write_text("other")
    (tree / "apr/__pycache__").mkdir()
    (tree / "apr/__pycache__/a.cpython-311.pyc").write_bytes(b"x")
    assert receipt.check(path, tree) == ""


@pytest.mark.parametrize("changes", [{"failed": 1}, {"skipped": 2}, {"passed": 0}, {"more": 1}])
def test_receipt_of_anything_but_a_clean_run_is_none(tree, changes):
    assert receipt.check(written(tree, **changes), tree).startswith("damaged: ")


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"passed": "many"}', "{"])
def test_damaged_receipt_is_none(tree, text):
    path = written(tree)
    path.write_text(text)
    assert receipt.check(path, tree).startswith("damaged: ")


def test_receipt_script_says_what_it_finds_with_the_standard_library_alone(tree):
    def run():
        found = subprocess.run([sys.executable, "-I", "-S", SCRIPT, "--check", "--root", tree], capture_output=True,
                               text=True, timeout=60, check=False)
        return found.returncode, found.stdout.partition(":")[0], found.stderr
    assert run() == (1, "missing", "")
    written(tree)
    assert run() == (0, "current", "")
    (tree / "apr/a.py").write_text("x = 2\n")
    assert run() == (1, "stale", "")


def session(tree, arguments=(), complete=True):
    """pytest over tests/gpu of the tree, with the recorder."""
    shutil.copy(SCRIPT, tree / "tests/gpu/receipt.py")
    text = CONFTEST.replace("FACTS", repr(FACTS)).replace("COMPLETE_IS_FALSE", repr(not complete))
    (tree / "tests/gpu/conftest.py").write_text(text)
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", *arguments],
                          cwd=tree, capture_output=True, text=True, timeout=60, check=False,
                          env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_only_a_clean_session_writes_a_receipt(tree, outcome):
    text, arguments, code = OUTCOMES[outcome]
    (tree / "tests/gpu/test_a.py").write_text(text)
    run, path = session(tree, arguments), tree / receipt.RECEIPT
    assert run.returncode == code, run.stdout + run.stderr
    assert path.exists() == (outcome == "passed")
    assert ("receipt written" if outcome == "passed" else "no receipt") in run.stdout
    if outcome == "passed":
        assert receipt.check(path, tree) == "" and json.loads(path.read_text())["rows"] == {"G4": 1}


def test_a_session_of_some_files_writes_no_receipt(tree):
    run = session(tree, complete=False)
    assert run.returncode == 0 and "no receipt" in run.stdout
    assert not (tree / receipt.RECEIPT).exists()


def test_gpu_tests_without_a_gpu_are_skipped_with_a_reason_or_refused(tmp_path):
    """On this machine, whose GPU, if it has one, is hidden."""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu/test_swiglu.py"]
    lenient = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=120, check=False)
    assert lenient.returncode == 0 and " skipped" in lenient.stdout and " passed" not in lenient.stdout
    strict = subprocess.run([*command, "--require-gpu", "--receipt", tmp_path / "r.json"], cwd=ROOT, env=hidden,
                            capture_output=True, text=True, timeout=120, check=False)
    assert strict.returncode == 1 and "--require-gpu: " in strict.stderr + strict.stdout
    assert not (tmp_path / "r.json").exists()
