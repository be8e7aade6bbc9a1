"""Falsifiers, executed: each mutant goes into a copy of the checkout, and the test that it names must turn red.

A mutant is killed when its test fails by an assertion. One that does not even import, or that crashes or hangs, says
nothing about the test; one that survives says that the test does not hold what the contract claims.
"""

import os
import queue
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from apr.contract import Contract, Falsifier
from apr.errors import MeasureError, NotFoundError, did_you_mean
from apr.files import PrivateFolder
from apr.tools.pytest_runs import Run, merged, pytest, python

# Worst first. A falsifier's outcome; of several that another rests on, the worst counts.
FAULTS = {"broken": "its test fails without any mutant", "survived": "its test passes under the mutant",
          "not equivalent": "it is called equivalent, and a test killed it",
          "not by assertion": "the test did not fail by an assertion: it proves nothing"}
NOT_RUN = "not run"
GOOD = ("equivalent", "held", "killed")
OUTCOMES = (*FAULTS, NOT_RUN, *GOOD)
COPIED = ("apr", "kernels", "contracts", "tests", "docs", "benchmarks", "pyproject.toml", "setup.py", "README.md",
          "Makefile")
UNMUTATED_SECONDS = 900.0


@dataclass(frozen=True)
class Outcome:
    """What became of a falsifier: one of OUTCOMES, the test that was red, seconds, and what there is to say besides."""

    id: str
    outcome: str
    test: str = ""
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Suite:
    """How the tests of a suite are run: copies at once, pytest's options, environment, seconds for each run."""

    workers: int
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 120.0
    shared_cache: bool = False  # compiled kernels: their keys are hashes of the sources, so no mutant meets another's


CORES = len(os.sched_getaffinity(0))
SUITES = {"cpu": Suite(CORES, ("-p", "no:cacheprovider"), {"OPENBLAS_NUM_THREADS": "1"}),
          "gpu": Suite(max(2, min(12, CORES - 2)), ("--require-gpu",), {"OPENBLAS_NUM_THREADS": "1"}, 300.0,
                       shared_cache=True)}  # on one GPU, but nearly all of a run is Python, and NumPy's truth


class Copies:
    """Copies of a checkout and the runs made in them, one at a time in each; they go at the end of the `with` block."""

    def __init__(self, root: Path, suite: Suite, workers: int | None = None) -> None:
        self.suite, self.runs = suite, dict[str, Future[Outcome]]()
        self.clean = dict[frozenset[str], list[Future[Run]]]()
        self.folder = PrivateFolder("apr-falsify-")
        self.free: queue.Queue[Path] = queue.Queue()
        self.copies = [Path(self.folder.name).resolve() / str(n) for n in range(workers or suite.workers)]
        self.environment = dict(suite.environment)
        if suite.shared_cache:
            self.environment["APR_CACHE_DIR"] = str(Path(self.folder.name) / "compiled")
        for copy in self.copies:
            _copy(root, copy)
            self.free.put(copy)
        self.pool = ThreadPoolExecutor(len(self.copies))

    def __enter__(self) -> "Copies":
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None,
                 _trace: TracebackType | None) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.folder.remove()

    def start_unmutated(self, tests: Iterable[str]) -> list[Future[Run]]:
        """The runs of these tests without a mutant, their files shared out; a second call returns the first one's.

        Raises MeasureError if apr is not the copy's own.
        """
        ids = frozenset(tests)
        if ids not in self.clean:
            with self._borrowed() as copy:
                where = python(copy, ["-c", "import apr; print(apr.__file__)"], self.environment, self.suite.seconds)
            if not Path(where.stdout.strip() or "/").resolve().is_relative_to(copy):
                raise MeasureError("apr contracts falsify", f"apr of the copy {copy}",
                                   (where.stdout + where.stderr).strip()[-200:] or "none", "run it in the checkout")
            files = sorted({i.partition("::")[0] for i in ids})
            shares = (sorted(i for i in ids if i.partition("::")[0] in files[n::len(self.copies)])
                      for n in range(min(len(files), len(self.copies))))
            self.clean[ids] = [self.pool.submit(self._unmutated, share) for share in shares]
        return self.clean[ids]

    def unmutated(self, tests: Iterable[str]) -> Run:
        """Outcomes of these tests without a mutant, as of one run. Raises what start_unmutated raises."""
        return merged([run.result() for run in self.start_unmutated(tests)])

    def start(self, falsifier: Falsifier) -> Future[Outcome]:
        """The run of a mutant; a second call returns the first one's."""
        if falsifier.id not in self.runs:
            self.runs[falsifier.id] = self.pool.submit(self._mutated, falsifier)
        return self.runs[falsifier.id]

    @contextmanager
    def _borrowed(self) -> Iterator[Path]:
        """A copy that nobody else uses meanwhile."""
        copy = self.free.get()
        try:
            yield copy
        finally:
            self.free.put(copy)

    def _unmutated(self, tests: Sequence[str]) -> Run:
        with self._borrowed() as copy:
            return self._pytest(copy, tests, UNMUTATED_SECONDS)

    def _mutated(self, falsifier: Falsifier) -> Outcome:
        assert falsifier.mutant is not None and falsifier.test is not None
        with self._borrowed() as copy:
            file = copy / falsifier.mutant.file
            original = file.read_bytes()
            try:
                file.write_bytes(falsifier.mutant.apply(original.decode()).encode())
                return judge(falsifier, self._pytest(copy, ["-x", falsifier.test], self.suite.seconds))
            finally:
                file.write_bytes(original)

    def _pytest(self, copy: Path, arguments: Sequence[str], seconds: float) -> Run:
        return pytest(copy, arguments, self.suite.options, self.environment, seconds, copy.with_suffix(".xml"))


def _copy(root: Path, copy: Path) -> None:
    copy.mkdir()
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (root / name).is_file():
            shutil.copy(root / name, copy / name)


def judge(falsifier: Falsifier, run: Run) -> Outcome:
    """What the run of a mutant's test says."""
    def outcome(word: str, detail: str = "") -> Outcome:
        return Outcome(falsifier.id, word, run.red or falsifier.test or "", round(run.seconds, 2), detail)

    if run.code == 0:
        return outcome("equivalent" if falsifier.equivalent else "survived", falsifier.equivalent or "")
    if not run.by_assertion:
        return outcome("not by assertion", f"pytest ended with {run.code}: {run.last_words}")
    return outcome("not equivalent" if falsifier.equivalent else "killed")


def select(contracts: Iterable[Contract], names: Sequence[str]) -> list[Falsifier]:
    """The falsifiers of these contracts or ids (all, if none are named), and those that they rest on.

    Raises NotFoundError for a name that is neither.
    """
    by_contract = {c.name: c.falsifiers for c in contracts}
    by_id = {f.id: f for falsifiers in by_contract.values() for f in falsifiers}
    chosen = set[str]()
    for name in names or by_contract:
        if name not in by_contract and name not in by_id:
            raise NotFoundError(f"'{name}'", "a contract or a falsifier's id", "none of that name",
                                did_you_mean(name, by_contract.keys() | by_id if "-" in name else by_contract))
        for falsifier in by_contract.get(name) or (by_id[name],):
            chosen |= {falsifier.id, *falsifier.rests_on}
    return [f for f in by_id.values() if f.id in chosen]


def tests_of(falsifiers: Iterable[Falsifier]) -> set[str]:
    """The tests that are to turn red under mutants, or that claim something without one."""
    return {f.test for f in falsifiers if f.test is not None}


def falsify(root: Path, falsifiers: Sequence[Falsifier], suite: Suite, workers: int | None,
            done: Callable[[str], None]) -> list[Outcome]:
    """Run falsifiers of one suite in copies of the checkout at `root`; `done` is given each one's id as it ends.

    Returns their outcomes, in order.

    Raises MeasureError, before any mutant, unless the test of every mutant passes without it.
    """
    with Copies(root, suite, workers) as copies:
        clean = copies.unmutated(tests_of(falsifiers))
        having_mutants = [f for f in falsifiers if f.mutant is not None]
        if red := [f for f in having_mutants if not clean.passed(f.test or "")]:
            raise MeasureError(f"{red[0].id}: {red[0].test}", "a test that passes on the code as it is",
                               f"{len(red)} of {len(having_mutants)} do not, pytest: {clean.last_words}",
                               "make them pass first; nothing was measured")
        return outcomes(copies, clean, falsifiers, done)


def outcomes(copies: Copies, clean: Run, falsifiers: Sequence[Falsifier], done: Callable[[str], None]) -> list[Outcome]:
    """Of these falsifiers, in order: those without a mutant by the run without any, the others by their own runs."""
    found = dict[str, Outcome]()
    for falsifier in falsifiers:
        if falsifier.mutant is None:
            held = clean.passed(falsifier.test or "")
            found[falsifier.id] = Outcome(falsifier.id, "held" if held else "broken", falsifier.test or "")
            done(falsifier.id)
    for future in as_completed([copies.start(f) for f in falsifiers if f.mutant is not None]):
        found[future.result().id] = future.result()
        done(future.result().id)
    return [found[f.id] for f in falsifiers]


def resting(falsifier: Falsifier, outcomes: Mapping[str, str]) -> str:
    """A falsifier's outcome: its own, or the worst of those that it rests on; NOT_RUN where there is none."""
    return min((outcomes.get(name, NOT_RUN) for name in falsifier.rests_on or (falsifier.id,)), key=OUTCOMES.index)


def count(falsifiers: Iterable[Falsifier], outcomes: Mapping[str, str]) -> dict[str, int]:
    """How many falsifiers have which outcome, those that rest on others apart; `mutants` that were run."""
    own = [f for f in falsifiers if not f.rests_on]
    words = [outcomes.get(f.id, NOT_RUN) for f in own]
    return {"mutants": sum(f.mutant is not None and f.id in outcomes for f in own),
            **{word: words.count(word) for word in ("killed", "survived", "equivalent", "not equivalent",
                                                    "not by assertion", "held", "broken", NOT_RUN)}}
