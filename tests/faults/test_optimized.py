"""H5: `python -O`, which drops every assert, drops no guard: in apr/ an assert is for the type checker."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import all_cases
from test_malformed_cli import arguments

ROOT = Path(__file__).parents[2]
OPTIMIZED = {**os.environ, "PYTHONOPTIMIZE": "1"}  # for children's children
# What guards files, numbers and checkpoints; the malformed files are of every reader, but not of every row.
GUARDS = ["tests/cpu/test_guards.py", "tests/cpu/test_checkpoint.py", "tests/cpu/test_strict.py",
          "tests/cpu/test_config.py", "tests/faults/test_malformed.py", "tests/faults/test_security.py"]
CONTROL = """
def test_asserts_of_tests_are_kept():
    assert 1 == 2

def test_asserts_of_others_are_not():
    exec(compile("assert 1 == 2", "other", "exec"))
"""


def is_narrowing(test: ast.expr) -> bool:
    """Whether a test says of what is there only that it is not None, or of which class it is."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return all(map(is_narrowing, test.values))
    if isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance":
        return not any(isinstance(n, ast.Call) for value in test.args for n in ast.walk(value))
    return (isinstance(test, ast.Compare) and ast.unparse(test).endswith(" is not None")
            and not any(isinstance(n, (ast.Call, ast.NamedExpr)) for n in ast.walk(test)))


def dropped(source: str) -> list[str]:
    """What -O would change in a module."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(source))
            if (isinstance(node, ast.Assert) and not is_narrowing(node.test))
            or (isinstance(node, ast.Name) and node.id == "__debug__")]


def test_H5_an_assert_in_apr_is_for_the_type_checker():
    sources = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in sorted((ROOT / "apr").rglob("*.py"))}
    assert len(sources) > 100 and {name: found for name, text in sources.items() if (found := dropped(text))} == {}


@pytest.mark.parametrize("text", [
    "assert x > 0", "assert x", "assert x is None", "assert x is not None and x.y", "assert f() is not None",
    "assert (x := y) is not None", "assert isinstance(f(), int)", "assert not x", "if __debug__:\n    check()",
    "assert x is not None or isinstance(x, int)", "assert all(x)"])
def test_H5_an_assert_that_guards_is_seen(text):
    assert len(dropped(text)) == 1


@pytest.mark.parametrize("text", [
    "assert x is not None", "assert isinstance(x, Engine)", "assert a.b[0] is not None and c is not None"])
def test_an_assert_that_narrows_is_not(text):
    assert dropped(text) == []


def first(row, kind):
    """The first malformed file of a row and kind that is also tried through the command."""
    return next(c for c in all_cases() if (c.row, c.kind) == (row, kind) and c.cli)


@pytest.mark.parametrize(("row", "kind"), [("B4", "apr"), ("H1", "yaml"), ("H3", "yaml"), ("H4", "env"),
                                           ("B10", "hf")])
def test_H5_refusals_are_the_same_without_asserts(tmp_path, row, kind):
    case = first(row, kind)
    path = case.write(tmp_path)
    variables = dict(line.split("=") for line in path.read_text().splitlines()) if kind == "env" else {}
    done = subprocess.run([sys.executable, "-O", "-m", "apr", *arguments(kind, path, tmp_path)], capture_output=True,
                          text=True, env={**OPTIMIZED, **variables}, timeout=60, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("device: ")]
    assert (done.returncode, len(said)) == (case.exit, 1) and case.says in said[0]
    assert not (tmp_path / "run").exists() and not (tmp_path / "pwned").exists()


def optimized_pytest(*tests):
    """pytest under -O. It warns that asserts outside of tests are dropped, which is what is wanted here."""
    return subprocess.run([sys.executable, "-O", "-m", "pytest", "-q", "-W", "ignore::pytest.PytestConfigWarning",
                           "-m", "not long", *map(str, tests)], cwd=ROOT, env=OPTIMIZED, capture_output=True, text=True,
                          check=False)


def test_H5_tests_still_judge_without_asserts(tmp_path):
    """pytest keeps the asserts of test modules: without this the next test would prove nothing."""
    (tmp_path / "test_control.py").write_text(CONTROL, encoding="utf-8")
    done = optimized_pytest(tmp_path / "test_control.py")
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout


@pytest.mark.long
def test_H5_the_guards_fire_without_asserts():
    done = optimized_pytest(*GUARDS)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:]
