"""Every falsifier of the contracts, executed: the mutant goes into a copy of the code, and its named test must go red.

Red by an assertion: a mutant that does not even import, or that crashes, would prove nothing about the test.
"""

import os
import queue
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from apr.contract import Falsifier, load_all
from apr.paths import contracts_dir

ROOT = Path(__file__).parents[2]
WORKERS = 2  # copies of the code, each mutated by one test run at a time
SEED_CLASS = 19  # mutants of docs/numerics, made from the bugs that began the project
FALSIFIERS = [f for c in load_all(contracts_dir()) for f in c.falsifiers if f.test.startswith("tests/cpu/")]
BY_ASSERTION = re.compile(r"^E +(AssertionError|assert |Failed: DID NOT RAISE)", re.M)


class Copies:
    """Copies of apr and its tests, and the runs made in them."""

    def __init__(self, folder: Path) -> None:
        self.free: queue.Queue[Path] = queue.Queue()
        self.pool = ThreadPoolExecutor(WORKERS)
        self.runs: dict[str, Future] = {}
        for n in range(WORKERS):
            for name in ("apr", "tests", "kernels"):
                shutil.copytree(ROOT / name, folder / str(n) / name, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", folder / str(n))
            self.free.put(folder / str(n))

    def start(self, falsifier: Falsifier) -> Future:
        """The run of a mutant; a second call returns the first one's."""
        if falsifier.id not in self.runs:
            self.runs[falsifier.id] = self.pool.submit(self._mutated, falsifier)
        return self.runs[falsifier.id]

    def _mutated(self, falsifier: Falsifier) -> subprocess.CompletedProcess:
        copy = self.free.get()
        file = copy / falsifier.mutant.file
        original = file.read_text(encoding="utf-8")
        try:
            file.write_text(falsifier.mutant.apply(original), encoding="utf-8")
            return python(copy, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", falsifier.test)
        finally:
            file.write_text(original, encoding="utf-8")
            self.free.put(copy)


def python(copy: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python in a copy, which stands before the installed apr."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OPENBLAS_NUM_THREADS": "1",
                   "PYTHONDONTWRITEBYTECODE": "1",  # its time stamps are too coarse to notice an edit
                   "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # a second less in each of many runs
    return subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True,
                          encoding="utf-8", timeout=120, check=False)


@pytest.fixture(scope="module")
def copies(request, tmp_path_factory):
    """The copies, with a run under way for every mutant that this session asks about."""
    copies = Copies(tmp_path_factory.mktemp("mutants"))
    for item in request.session.items:
        if "falsifier" in getattr(getattr(item, "callspec", None), "params", {}):
            copies.start(item.callspec.params["falsifier"])
    yield copies
    copies.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("falsifier", FALSIFIERS, ids=lambda f: f.id)
def test_mutant_is_killed(copies, falsifier):
    demand_killed(copies.start(falsifier).result(), falsifier)


def demand_killed(run: subprocess.CompletedProcess, falsifier: Falsifier) -> None:
    assert run.returncode != 0, f"{falsifier.id}, '{falsifier.claim}', survives {falsifier.test}"
    killed = run.returncode == 1 and BY_ASSERTION.search(run.stdout)
    assert killed, f"{falsifier.id} ended with {run.returncode}, not by an assertion:\n{run.stdout[-3000:]}{run.stderr}"


def test_seed_class_mutants_are_killed(copies):
    seeds = [f for f in FALSIFIERS if f.seed]
    assert len(seeds) >= SEED_CLASS
    for falsifier in seeds:
        demand_killed(copies.start(falsifier).result(), falsifier)


def test_unmutated_copies_pass(copies):
    """What the mutants are measured against: the same tests, in every copy, with the copy's own apr."""
    for copy in sorted({copies.free.get() for _ in range(WORKERS)}):
        where = python(copy, "-c", "import apr; print(apr.__file__)")
        assert Path(where.stdout.strip()).is_relative_to(copy), f"not the copy: {where.stdout}{where.stderr}"
        run = python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted({f.test for f in FALSIFIERS}))
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr
        copies.free.put(copy)
