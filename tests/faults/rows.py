"""The catalogue of faults and its tests: `python tests/faults/rows.py run` runs them, `table` shows what came of it.

    run     every test of a row that needs no GPU, the long ones too; outcomes go to docs/evidence/faults.json
    table   docs/faults.md, of the catalogue, that record, and the GPU rows of docs/evidence/gpu-tests.json
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fault_rows import EVIDENCE, catalogue  # noqa: E402

TABLE = ROOT / "docs" / "faults.md"
UNRECORDED = "no run is recorded"  # yet: of what needs a GPU
GPU = ROOT / "docs" / "evidence" / "gpu-tests.json"
IN_NAME = re.compile(r"^def test_[A-H]\d{1,2}_", re.M)


def files(rows) -> list[str]:
    """The tests of faults, and the files of tests/cpu in which a row has a test."""
    named = {test.partition("::")[0] for row in rows.values() for test in row.get("tests", ())}
    mine = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests" / "cpu").glob("test_*.py")
            if IN_NAME.search(p.read_text(encoding="utf-8"))}
    return ["tests/faults", *sorted(mine | {name for name in named if name.startswith("tests/cpu/")})]


def run() -> int:
    """Run the rows' tests and record what came of them."""
    workers = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *workers, *files(catalogue()), "--fault-receipt",
                           str(ROOT / EVIDENCE)], cwd=ROOT, check=False).returncode


def outcome(name, row, cpu, gpu) -> str:
    """What came of a row's tests, and where and when."""
    if "no" in row:
        return f"not automated: {row['no']}"
    parts = []
    here = cpu["rows"].get(name, {})
    if here:
        bad = here["failed"] + here["skipped"]
        parts.append(f"{here['passed']} passed" + (f", {bad} FAILED" if bad else "") + f" ({cpu['date']})")
    if name in gpu.get("rows", {}):
        parts.append(f"{gpu['rows'][name]} passed on {gpu['device']} ({gpu['date']})")
    return "; ".join(parts) or UNRECORDED


def table() -> str:
    """The text of docs/faults.md."""
    rows, cpu, gpu = catalogue(), json.loads((ROOT / EVIDENCE).read_text()), json.loads(GPU.read_text())
    ends = {name: outcome(name, row, cpu, gpu) for name, row in rows.items()}
    states = Counter("not automated" if "no" in rows[n] else "unrecorded" if e == UNRECORDED
                     else "failing" if "FAILED" in e else "passing" for n, e in ends.items())
    tests = sum(r["passed"] for r in cpu["rows"].values()), sum(gpu.get("rows", {}).values())
    lines = ["# Faults", "",
             "What is injected, what must come of it, and what did. Made by `python tests/faults/rows.py table` of "
             "`tests/faults/catalogue.yaml`, of", "`make test-faults` (every row that needs no GPU) and of `make "
             "test-gpu`; the tests of a row are named by its id.", "",
             f"{len(rows)} rows; {len(rows) - states['not automated']} apply to one process on one GPU, "
             f"{states['passing']} of them pass, {states['failing']} fail, of {states['unrecorded']} {UNRECORDED}; "
             f"{tests[0]} tests without a GPU in {cpu['seconds'] / 60:.0f} minutes, {tests[1]} on one.", "",
             "| row | fault | how it is injected | what must come of it | outcome |", "|---|---|---|---|---|"]
    lines += [f"| {n} | {row['fault']} | {row['how']} | {row['want']} | {ends[n]} |" for n, row in rows.items()]
    return "\n".join(lines) + "\n"


def main(arguments) -> int:
    if arguments == ["run"]:
        return run()
    if arguments == ["table"]:
        TABLE.write_text(table(), encoding="utf-8")
        return 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
