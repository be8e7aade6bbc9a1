"""Sizes that keep the project readable, and a docstring for everything public in apr/."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import apr.errors

ROOT = Path(__file__).parents[2]
PYTHON_FILE, TEST_FILE, CUDA_FILE, COLUMNS = 400, 300, 300, 120
FUNCTION, MIRROR = 50, 90  # lines; straight-line code that mirrors the model, block_* and model_*, may be long
EXCEPTIONS: dict[str, str] = {  # "file" or "file:function": the reason
}
UNDOCUMENTED: dict[str, str] = {  # "file:name": the reason
    "apr/cli/main.py:Parser.error": "overrides argparse's, whose class docstring says how",
}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def files(root: Path, *patterns: str) -> list[Path]:
    """The files of these patterns, sorted."""
    return sorted(p for pattern in patterns for p in root.glob(pattern))


def definitions(node: ast.AST, prefix: str = "", public: bool = True) -> Iterator[tuple[str, Definition, bool]]:
    """(dotted name, definition, public) of every function and class; inside a function nothing is public."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            open_ = public and not child.name.startswith("_")
            yield prefix + child.name, child, open_
            yield from definitions(child, f"{prefix}{child.name}.", open_ and isinstance(child, ast.ClassDef))
        else:
            yield from definitions(child, prefix, public)


def too_long(root: Path) -> dict[str, str]:
    """What is over its limit, by "file" or "file:function" or "file:line", with the size found."""
    found = {}
    for limit, patterns in ((PYTHON_FILE, ["apr/**/*.py", "setup.py"]), (TEST_FILE, ["tests/**/*.py"]),
                            (CUDA_FILE, ["kernels/*.cu", "kernels/*.cuh"])):
        for path in files(root, *patterns):
            name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
            lines = text.splitlines()
            if len(lines) > limit:
                found[name] = f"{len(lines)} lines > {limit}"
            wide = [(n, len(line)) for n, line in enumerate(lines, 1) if len(line) > COLUMNS]
            found |= {f"{name}:{n}": f"{width} columns > {COLUMNS}" for n, width in wide}
            if name.startswith("apr/"):
                for function, node, _ in definitions(ast.parse(text)):
                    limit_here = MIRROR if re.match(r"(block|model)_", node.name) else FUNCTION
                    if not isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno + 1 > limit_here:
                        found[f"{name}:{function}"] = f"{node.end_lineno - node.lineno + 1} lines > {limit_here}"
    return found


def undocumented(root: Path) -> list[str]:
    """Modules, and public functions, classes and methods, without a docstring."""
    found = []
    for path in files(root, "apr/**/*.py"):
        name, tree = path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))
        if not (ast.get_docstring(tree) or "").strip():
            found.append(name)
        found += [f"{name}:{dotted}" for dotted, node, public in definitions(tree)
                  if public and not (ast.get_docstring(node) or "").strip()]
    return found


def in_the_error_table(name: str) -> bool:
    """Whether an exception class has its line in the table of apr/errors.py, which is its docstring."""
    file, _, cls = name.partition(":")
    return file == "apr/errors.py" and re.search(rf"^    [├└]── {cls} +\d+ +\w", apr.errors.__doc__, re.M) is not None


@pytest.mark.parametrize("unit", ["lines", "columns"])
def test_sizes(unit):
    found = [f"{name}: {size}" for name, size in too_long(ROOT).items()
             if name not in EXCEPTIONS and f" {unit} " in size]
    assert not found, "\n".join([f"{len(found)} over the limit", *found])


def test_everything_public_is_documented():
    assert [n for n in undocumented(ROOT) if n not in UNDOCUMENTED and not in_the_error_table(n)] == []


def test_exceptions_are_needed_and_have_reasons():
    assert EXCEPTIONS.keys() <= too_long(ROOT).keys()
    assert set(UNDOCUMENTED) <= set(undocumented(ROOT))
    assert all(EXCEPTIONS.values()) and all(UNDOCUMENTED.values())


@pytest.mark.parametrize(("name", "text", "found"), [
    ("apr/a.py", "x = 1\n" * 401, "apr/a.py"),
    ("tests/cpu/test_a.py", "x = 1\n" * 301, "tests/cpu/test_a.py"),
    ("kernels/a.cu", "//\n" * 301, "kernels/a.cu"),
    ("kernels/common.cuh", "//\n" * 301, "kernels/common.cuh"),
    ("apr/x/a.py", "\nx = '" + "é" * 120 + "'\n", "apr/x/a.py:2"),
    ("apr/a.py", "def f():\n" + "    x = 1\n" * 50, "apr/a.py:f"),
    ("apr/a.py", "class A:\n    def f(self):\n" + "        x = 1\n" * 50, "apr/a.py:A.f"),
    ("apr/a.py", "def block_forward():\n" + "    x = 1\n" * 90, "apr/a.py:block_forward"),
    ("apr/a.py", "x = 1\n" * 400, None),
    ("apr/a.py", "x = '" + "é" * 114 + "'\n", None),
    ("apr/a.py", "def f():\n" + "    x = 1\n" * 49, None),
    ("apr/a.py", "def block_forward():\n" + "    x = 1\n" * 89, None),
    ("apr/a.py", "class A:\n" + "    x = 1\n" * 100, None),
])
def test_what_is_too_long_is_named(tmp_path, name, text, found):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert list(too_long(tmp_path)) == ([found] if found else [])


@pytest.mark.parametrize(("text", "found"), [
    ("x = 1\n", ["apr/a.py"]),
    ('"""A."""\ndef f(): pass\ndef _g(): pass\n', ["apr/a.py:f"]),
    ('"""A."""\nclass C:\n    """C."""\n    def f(self): pass\n    def _g(self): pass\n', ["apr/a.py:C.f"]),
    ('"""A."""\nif True:\n    class C:\n        """ """\n', ["apr/a.py:C"]),
    ('"""A."""\ndef f():\n    """F."""\n    def inner(): pass\nclass _P:\n    def f(self): pass\n', []),
])
def test_what_has_no_docstring_is_named(tmp_path, text, found):
    (tmp_path / "apr").mkdir()
    (tmp_path / "apr" / "a.py").write_text(text, encoding="utf-8")
    assert undocumented(tmp_path) == found
