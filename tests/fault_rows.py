"""Which row of tests/faults/catalogue.yaml a test is of, and what came of each row's tests in a run."""

import datetime
import json
import platform
import re
import time
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CATALOGUE = ROOT / "tests" / "faults" / "catalogue.yaml"
EVIDENCE = Path("docs/evidence/faults.json")
ID = re.compile(r"::test_([A-H]\d{1,2})_|\[([A-H]\d{1,2})[-\]]")


@cache
def catalogue():
    """The rows by id: fault, how, want, and `tests` (beginnings of test ids) or `no` where there are such."""
    from apr.strict import read_yaml
    return read_yaml(CATALOGUE)


def rows_of(test: str) -> list[str]:
    """The rows that a test is of, by its id: by name, by first parameter, or because the catalogue names it."""
    found = {a or b for a, b in ID.findall(test)}
    found |= {name for name, row in catalogue().items() if any(test.startswith(t) for t in row.get("tests", ()))}
    return sorted(found & catalogue().keys())


class RowRecorder:
    """A pytest plugin: only tests of a row are run, and what came of each row is written at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.start = path, defaultdict(Counter), time.monotonic()

    def pytest_collection_modifyitems(self, config, items) -> None:
        """Leave out what is of no row."""
        mine = [item for item in items if rows_of(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if not rows_of(item.nodeid)])
        items[:] = mine

    def pytest_runtest_logreport(self, report) -> None:
        """Count a test when its call passed, or when any phase did not."""
        if report.when == "call" or not report.passed:
            for row in rows_of(report.nodeid):
                self.rows[row][report.outcome] += 1

    def pytest_sessionfinish(self, session) -> None:
        """Write the record, unless this is a worker."""
        if hasattr(session.config, "workerinput"):
            return
        rows = {name: {end: self.rows[name][end] for end in ("passed", "failed", "skipped")}
                for name in catalogue() if name in self.rows}
        record = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "python": platform.python_version(),
                  "seconds": round(time.monotonic() - self.start, 1), "rows": rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
