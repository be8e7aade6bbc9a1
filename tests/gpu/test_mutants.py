"""Every falsifier of the GPU code, executed: the mutant goes into a copy of the code, and its named test must go red.

As tests/cpu/test_mutants.py, with a GPU: red by an assertion, since a mutant that does not compile proves nothing. The
copies share one folder of compiled kernels: its keys are hashes of the sources, so a mutant never meets another's.
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
WORKERS = 6  # copies of the code, each mutated by one test run at a time; all on one GPU
SEED_CLASS = 19  # mutants of docs/numerics, made from the bugs that began the project
FALSIFIERS = [f for c in load_all(contracts_dir()) for f in c.falsifiers if f.test.startswith("tests/gpu/")]
BY_ASSERTION = re.compile(r"^E +(AssertionError|assert |Failed: DID NOT RAISE)", re.M)


class Copies:
    """Copies of what the tests need, and the runs made in them."""

    def __init__(self, folder: Path) -> None:
        self.kernels = folder / "compiled"
        self.free: queue.Queue[Path] = queue.Queue()
        self.pool = ThreadPoolExecutor(WORKERS)
        self.runs: dict[str, Future] = {}
        for n in range(WORKERS):
            for name in ("apr", "kernels", "contracts", "tests"):
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
            return self.python(copy, "-m", "pytest", "-x", "-q", "--require-gpu", falsifier.test)
        finally:
            file.write_text(original, encoding="utf-8")
            self.free.put(copy)

    def python(self, copy: Path, *arguments: str) -> subprocess.CompletedProcess:
        """Python in a copy, which stands before the installed apr."""
        packages = [p for p in sys.path if p and not Path(p).is_relative_to(ROOT)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), *packages]), "OPENBLAS_NUM_THREADS": "2",
                       "APR_CACHE_DIR": str(self.kernels), "PYTHONDONTWRITEBYTECODE": "1",
                       "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True,
                              encoding="utf-8", timeout=300, check=False)


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
    """What the mutants are measured against: the same tests, with the copy's own apr and kernels."""
    where = "import apr, apr.paths; print(apr.__file__, apr.paths.kernels_dir(), apr.paths.contracts_dir())"
    every = sorted({copies.free.get() for _ in range(WORKERS)})
    for copy in every:
        copies.free.put(copy)
        found = copies.python(copy, "-c", where).stdout.split()
        assert len(found) == 3 and all(Path(path).is_relative_to(copy) for path in found), f"not the copy: {found}"
    run = copies.python(every[0], "-m", "pytest", "-q", "--require-gpu", *sorted({f.test for f in FALSIFIERS}))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr
