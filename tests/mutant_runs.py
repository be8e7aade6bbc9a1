"""Runs of mutants: copies of the code, each mutated by one test run at a time; and what counts as a kill."""

import os
import queue
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from apr.contract import Falsifier

ROOT = Path(__file__).parents[1]
SEED_CLASS = 19  # mutants of docs/numerics, made from the bugs that began the project
BY_ASSERTION = re.compile(r"^E +(AssertionError|assert |Failed: DID NOT RAISE)", re.M)


class Copies:
    """`workers` copies of `folders` and pyproject.toml, and the runs made in them.

    `options` are added to pytest's; `environment` to the process's; a run may take `timeout` seconds.
    """

    def __init__(self, folder: Path, workers: int, folders: Sequence[str], options: Sequence[str],
                 environment: Mapping[str, str], timeout: float) -> None:
        self.workers, self.options, self.environment, self.timeout = workers, options, environment, timeout
        self.free: queue.Queue[Path] = queue.Queue()
        self.pool = ThreadPoolExecutor(workers)
        self.runs: dict[str, Future] = {}
        for n in range(workers):
            for name in folders:
                shutil.copytree(ROOT / name, folder / str(n) / name, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", folder / str(n))
            self.free.put(folder / str(n))

    def start(self, falsifier: Falsifier) -> Future:
        """The run of a mutant; a second call returns the first one's."""
        if falsifier.id not in self.runs:
            self.runs[falsifier.id] = self.pool.submit(self._mutated, falsifier)
        return self.runs[falsifier.id]

    def start_all(self, request) -> None:
        """Start the run of every mutant that this session of pytest asks about."""
        for item in request.session.items:
            if "falsifier" in getattr(getattr(item, "callspec", None), "params", {}):
                self.start(item.callspec.params["falsifier"])

    def _mutated(self, falsifier: Falsifier) -> subprocess.CompletedProcess:
        copy = self.free.get()
        file = copy / falsifier.mutant.file
        original = file.read_text(encoding="utf-8")
        try:
            file.write_text(falsifier.mutant.apply(original), encoding="utf-8")
            return self.pytest(copy, "-x", falsifier.test)
        finally:
            file.write_text(original, encoding="utf-8")
            self.free.put(copy)

    def all(self) -> list[Path]:
        """Every copy, when no run is under way."""
        every = sorted({self.free.get() for _ in range(self.workers)})
        for copy in every:
            self.free.put(copy)
        return every

    def pytest(self, copy: Path, *arguments: str) -> subprocess.CompletedProcess:
        """pytest in a copy."""
        return self.python(copy, "-m", "pytest", "-q", *self.options, *arguments)

    def python(self, copy: Path, *arguments: str) -> subprocess.CompletedProcess:
        """Python in a copy, which stands before the installed apr."""
        packages = [p for p in sys.path if p and not Path(p).is_relative_to(ROOT)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), *packages]),
                       "PYTHONDONTWRITEBYTECODE": "1",  # its time stamps are too coarse to notice an edit
                       "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a second less in each of many runs
                       **self.environment}
        return subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True,
                              encoding="utf-8", timeout=self.timeout, check=False)


def demand_killed(run: subprocess.CompletedProcess, falsifier: Falsifier) -> None:
    """Red by an assertion: a mutant that does not even import, or that crashes, would prove nothing about the test."""
    assert run.returncode != 0, f"{falsifier.id}, '{falsifier.claim}', survives {falsifier.test}"
    killed = run.returncode == 1 and BY_ASSERTION.search(run.stdout)
    assert killed, f"{falsifier.id} ended with {run.returncode}, not by an assertion:\n{run.stdout[-3000:]}{run.stderr}"


def demand_seeds_killed(copies: Copies, falsifiers: Sequence[Falsifier]) -> None:
    """The mutants of the seed class are there, and killed."""
    seeds = [f for f in falsifiers if f.seed]
    assert len(seeds) >= SEED_CLASS
    for falsifier in seeds:
        demand_killed(copies.start(falsifier).result(), falsifier)
