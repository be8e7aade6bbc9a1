"""pytest on a checkout, in a process of its own: what became of each test."""

import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apr.paths import child_environment

CHECKOUT = Path(__file__).resolve().parents[2]  # whose modules must not stand in for those of the one under test
BY_ASSERTION = re.compile(r"^E +(AssertionError|assert |Failed: DID NOT RAISE)", re.M)
WORST_FIRST = ("error", "failure", "skipped", "passed")
TIMED_OUT = -1


@dataclass(frozen=True)
class Run:
    """pytest's exit code (TIMED_OUT if it was ended), its output, each test's result, and the seconds it took."""

    code: int
    output: str
    tests: Mapping[str, str] = field(default_factory=dict)  # id: one of WORST_FIRST
    seconds: float = 0.0

    def passed(self, test: str) -> bool:
        """Whether a test was run and passed; one named without its parameters, with all of them. A skip is no pass."""
        results = [result for name, result in self.tests.items() if named(test, name)]
        return bool(results) and set(results) == {"passed"}

    @property
    def red(self) -> str:
        """The first test that failed, '' if none did."""
        return next((name for name, result in self.tests.items() if result in ("error", "failure")), "")

    @property
    def by_assertion(self) -> bool:
        """Whether a test failed because what it demands was not so, and not because the code could not run."""
        return self.code == 1 and BY_ASSERTION.search(self.output) is not None

    @property
    def last_words(self) -> str:
        """The end of what pytest said, on one line."""
        return " / ".join(line for line in self.output.splitlines()[-3:] if line.strip())[-300:]


def named(test: str, full: str) -> bool:
    """Whether `test`, an id with parameters or without, names the test of the whole id `full`."""
    return full == test or full.startswith(f"{test}[")


def python(root: Path, arguments: Iterable[str], environment: Mapping[str, str],
           timeout: float) -> subprocess.CompletedProcess[str]:
    """Python in a checkout, whose modules stand before the installed apr. Raises subprocess.TimeoutExpired."""
    packages = [p for p in sys.path if p and not Path(p).is_relative_to(CHECKOUT)]
    changed = {"PYTHONPATH": os.pathsep.join([str(root), *packages]),
               "PYTHONDONTWRITEBYTECODE": "1",  # its time stamps are too coarse to notice an edit
               "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # a second less in each of many runs
    return subprocess.run([sys.executable, *arguments], cwd=root, env=child_environment({**changed, **environment}),
                          capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=timeout,
                          check=False)


def pytest(root: Path, tests: Iterable[str], options: Iterable[str], environment: Mapping[str, str],
           timeout: float, report: Path) -> Run:
    """These tests (ids or files) of a checkout; `report` is a file to write and read again, outside of it.

    Temporary folders are beside the report: runs at once would clear away each other's in a common place.
    """
    report.unlink(missing_ok=True)
    start = time.monotonic()
    try:
        run = python(root, ["-m", "pytest", "-q", "--rootdir=.", f"--junitxml={report}",
                            f"--basetemp={report.with_suffix('.tmp')}", *options, *tests],
                     environment, timeout)
    except subprocess.TimeoutExpired:
        return Run(TIMED_OUT, f"no end in {timeout:.0f} s", seconds=time.monotonic() - start)
    return Run(run.returncode, run.stdout + run.stderr, _results(report), time.monotonic() - start)


def merged(runs: Sequence[Run]) -> Run:
    """Runs beside each other as one: the first code that is not 0, and the output of those that failed at the end."""
    outputs = [run.output for run in sorted(runs, key=lambda run: run.code != 0)]
    return Run(next((run.code for run in runs if run.code != 0), 0), "\n".join(outputs),
               {name: result for run in runs for name, result in run.tests.items()},
               max((run.seconds for run in runs), default=0.0))


def collect(root: Path, files: Iterable[str], environment: Mapping[str, str], timeout: float) -> tuple[set[str], str]:
    """The ids of all tests in these files of a checkout, none of them run; and what went wrong, '' if nothing did."""
    try:
        run = python(root, ["-m", "pytest", "-q", "--rootdir=.", "--collect-only", *files], environment, timeout)
    except subprocess.TimeoutExpired:
        return set(), f"no end in {timeout:.0f} s"
    found = {line for line in run.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "SKIPPED"))}
    return found, "" if run.returncode == 0 else Run(run.returncode, run.stdout + run.stderr).last_words


def _results(report: Path) -> dict[str, str]:
    """Each test's result from pytest's JUnit file, which is empty where pytest could not even begin."""
    try:
        cases = list(xml.parse(report).iter("testcase"))
    except (OSError, xml.ParseError):
        return {}
    results: dict[str, str] = {}
    for case in cases:
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        kinds = {child.tag for child in case} & set(WORST_FIRST) or {"passed"}
        kinds |= {results[name]} if name in results else set()
        results[name] = next(kind for kind in WORST_FIRST if kind in kinds)
    return results
