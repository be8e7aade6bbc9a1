"""The receipt of a full run of the GPU tests: docs/evidence/gpu-tests.json, and whether it is of the code at hand.

Most machines have no GPU, so a run is recorded together with a digest of what it tested: every kernel, every module of
apr, every table of algorithms and every GPU test. `python tests/gpu/receipt.py --check` says whether it still holds.
Only the standard library is used, since that question is asked where nothing is installed.
"""

import argparse
import datetime
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECEIPT = Path("docs/evidence/gpu-tests.json")
TESTED = ("kernels/*", "apr/**/*.py", "apr/gemm_tables/*.json", "tests/gpu/*.py")
FACTS = ("device", "driver", "cuda", "cupy", "python")
KEYS = (*FACTS, "passed", "failed", "skipped", "seconds", "date", "digest", "rows")


def digest(root: Path) -> str:
    """SHA-256 over the names and contents of what the GPU tests test, in the order of the names."""
    files = {p.relative_to(root).as_posix(): p for pattern in TESTED for p in root.glob(pattern) if p.is_file()}
    total = hashlib.sha256()
    for name in sorted(files):
        data = files[name].read_bytes()
        total.update(f"{name}\0{len(data)}\0".encode())  # lengths, so that no two trees look alike
        total.update(data)
    return total.hexdigest()


def write(path: Path, facts: dict[str, str], passed: int, seconds: float, tested: str, rows: dict[str, int]) -> None:
    """The receipt of a run in which everything passed; `tested` is the digest taken before it.

    `rows`: how many tests passed of each row of the catalogue of faults.
    """
    record = {**facts, "passed": passed, "failed": 0, "skipped": 0, "seconds": round(seconds, 1),
              "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "digest": tested, "rows": rows}
    assert tuple(record) == KEYS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def check(path: Path, root: Path) -> str:
    """'' for a receipt of exactly this code, else why it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        counts = {key: record[key] for key in ("passed", "failed", "skipped")}
        recorded, date = str(record["digest"]), str(record["date"])
    except FileNotFoundError:
        return f"missing: {path}"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"damaged: {path}: {type(e).__name__}: {e}"
    if set(record) != set(KEYS) or not (counts["passed"] > 0 and counts["failed"] == counts["skipped"] == 0):
        return f"damaged: {path} is not of a run in which everything passed"
    if recorded != digest(root):
        return f"stale: kernels/, apr/ or tests/gpu/ changed since the run of {date}"
    return ""


class Recorder:
    """A pytest plugin: counts outcomes, writes the receipt of a full and clean run.

    `complete`: whether a session's items are all there are; `facts`: what is recorded of the machine; `strict`: a
    skipped test is a failure; `rows_of`: the rows of the catalogue of faults that a test is of.
    """

    def __init__(self, path: Path | None, facts: Callable[[], dict[str, str]], complete: Callable[[object], bool],
                 strict: bool, root: Path = ROOT, rows_of: Callable[[str], list[str]] = lambda test: []) -> None:
        self.path, self.facts, self.complete, self.strict = path, facts, complete, strict
        self.rows_of, self.rows = rows_of, dict[str, int]()
        self.passed = self.failed = self.skipped = self.deselected = 0
        self.start, self.tested, self.said = time.monotonic(), digest(root), ""

    def pytest_runtest_logreport(self, report) -> None:
        """Count a phase: a test passed when its call did, failed or was skipped when any phase was."""
        self.failed += report.failed
        self.skipped += report.skipped
        self.passed += report.passed and report.when == "call"
        for row in self.rows_of(report.nodeid) if report.passed and report.when == "call" else ():
            self.rows[row] = self.rows.get(row, 0) + 1

    def pytest_deselected(self, items) -> None:
        """Count what -k or -m left out."""
        self.deselected += len(items)

    def pytest_sessionfinish(self, session, exitstatus) -> None:
        """Fail for what was skipped, write the receipt, or say why not."""
        if self.strict and self.skipped and exitstatus == 0:
            session.exitstatus = exitstatus = 1
            self.said = f"{self.skipped} skipped, and --require-gpu allows none"
        if self.path is None:
            return
        clean = exitstatus == 0 and self.passed > 0 and not (self.failed or self.skipped or self.deselected)
        if clean and self.complete(session):
            write(self.path, self.facts(), self.passed, time.monotonic() - self.start, self.tested, self.rows)
            self.said = f"receipt written: {self.path}"
        else:
            self.said += ("; " if self.said else "") + "no receipt: not a full run in which everything passed"

    def pytest_terminal_summary(self, terminalreporter) -> None:
        """Say what became of the receipt."""
        if self.said:
            terminalreporter.write_line(self.said)


def main(arguments: list[str]) -> int:
    """0 and 'current', or 1 and why not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", required=True, help="say whether the receipt is current")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    root = parser.parse_args(arguments).root
    fault = check(root / RECEIPT, root)
    print(fault or f"current: {RECEIPT}")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
