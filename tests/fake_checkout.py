"""A checkout of a package `apr` of three functions, with tests and contracts in which every kind of falsifier is."""

from pathlib import Path

FILES = {
    "apr/__init__.py": "",
    "apr/scale.py": '''
FACTOR, SPARE = 2, 1

def scale(inp: float, factor: float = FACTOR) -> float:
    return inp * factor

def shift(a, /, b: int = 1, *rest: int, c, d: str = "x", **more: int) -> int:
    return a + b

class Scaler:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    async def apply(self, inp: list[float], *, twice: bool = False) -> None:
        pass

class Settings:
    low: float
    high: float = 1.0
''',
    "tests/cpu/test_scale.py": '''
import pytest
from apr.scale import scale, shift

@pytest.mark.parametrize("inp", [1, 2])
def test_scale(inp):
    assert scale(inp) == 2 * inp

def test_shift():
    assert shift(1, c=0) > 0

def test_skipped():
    pytest.skip("not here")
''',
    "tests/gpu/conftest.py": "def pytest_addoption(parser):\n"
                             "    parser.addoption('--require-gpu', action='store_true')\n",
    "tests/gpu/test_kernel.py": "from apr.scale import scale\n\ndef test_kernel():\n    assert scale(2, 3) == 6\n",
    "kernels/scale.cu": "// a kernel\n",
    "contracts/scale-v1.yaml": '''
name: scale
version: 1
source: a test
symbols:
  apr.scale.scale: "(inp, factor=FACTOR)"
  apr.scale.shift: "(a, /, b=1, *rest, c, d='x', **more)"
  apr.scale.Scaler: "(self, factor)"
  apr.scale.Scaler.apply: "(self, inp, *, twice=False)"
  apr.scale.Settings: "(low, high=1.0)"
equations: {out: "inp * factor"}
falsifiers:
  - id: SCALE-001
    claim: the factor is used
    mutant: {file: apr/scale.py, replace: " * factor", with: ""}
    test: "tests/cpu/test_scale.py::test_scale[2]"
  - id: SCALE-002
    claim: a spare number is never read
    mutant: {file: apr/scale.py, replace: "SPARE = 2, 1", with: "SPARE = 2, 7"}
    test: tests/cpu/test_scale.py::test_scale
    equivalent: nobody reads it
  - id: SCALE-003
    claim: all of it holds by itself
    test: tests/cpu/test_scale.py::test_scale
  - id: SCALE-101
    claim: the kernel scales
    mutant: {file: apr/scale.py, replace: "inp * factor", with: "inp + factor"}
    test: tests/gpu/test_kernel.py::test_kernel
''',
    "contracts/plan-v1.yaml": '''
name: plan
version: 1
source: a test
symbols: {apr.scale.shift: "(a, /, b=1, *rest, c, d='x', **more)"}
equations: {out: "the parts"}
document: {version: "1.5.0", corrected: ["log2 for ln"]}
falsifiers:
  - {id: PLAN-001, claim: it scales, rests_on: [SCALE-001, SCALE-003]}
  - {id: PLAN-002, claim: the GPU too, rests_on: [SCALE-101]}
''',
}
SURVIVES = '''  - id: SCALE-004
    claim: a shift is by one
    mutant: {file: apr/scale.py, replace: a + b, with: a + b + 1}
    test: tests/cpu/test_scale.py::test_shift
'''
CRASHES = '''  - id: SCALE-005
    claim: it can be imported
    mutant: {file: apr/scale.py, replace: "FACTOR, SPARE =", with: "FACTOR, SPARE, x ="}
    test: tests/cpu/test_scale.py::test_shift
'''
WRONG = '''  - id: SCALE-006
    claim: the factor is two
    mutant: {file: apr/scale.py, replace: "SPARE = 2, 1", with: "SPARE = 3, 1"}
    test: tests/cpu/test_scale.py::test_scale
    equivalent: nobody sees it
'''
SKIPPED = '''  - {id: SCALE-007, claim: a skipped test is no pass, test: "tests/cpu/test_scale.py::test_skipped"}
'''


def plant(root: Path, *more: str) -> Path:
    """The checkout in a folder; its contract `scale` has these falsifiers too."""
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    edit(root, "contracts/scale-v1.yaml", lambda text: text + "".join(more))
    return root


def edit(root: Path, name: str, change) -> None:
    """Change a file: `change` is given its text and returns the new one, or it is (old, new)."""
    text = (root / name).read_text(encoding="utf-8")
    if isinstance(change, tuple):
        assert text.count(change[0]) == 1, change[0]
        change = (lambda old, new: lambda text: text.replace(old, new))(*change)
    (root / name).write_text(change(text), encoding="utf-8")
