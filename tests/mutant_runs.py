"""What the tests of the mutants on the CPU and on a GPU share: copies with runs under way, and what they demand."""

from collections.abc import Sequence
from pathlib import Path

from apr.contract import Falsifier, load_all
from apr.paths import contracts_dir
from apr.tools.falsify import GOOD, SUITES, Copies, tests_of
from apr.tools.pytest_runs import Run

ROOT = Path(__file__).parents[1]
SEED_CLASS = 19  # mutants of docs/numerics, made from the bugs that began the project


def falsifiers(suite: str) -> list[Falsifier]:
    """All of a suite that are run."""
    return [f for c in load_all(contracts_dir()) for f in c.falsifiers if f.suite == suite]


def started(request, suite: str) -> Copies:
    """Copies, with runs under way without a mutant, and for every mutant that this session of pytest asks about."""
    copies = Copies(ROOT, SUITES[suite])
    if any(item.name == "test_unmutated_copies_pass" for item in request.session.items):
        copies.start_unmutated(tests_of(falsifiers(suite)))
    for item in request.session.items:
        falsifier = getattr(getattr(item, "callspec", None), "params", {}).get("falsifier")
        if falsifier is not None and falsifier.suite == suite:
            copies.start(falsifier)
    return copies


def demand_killed(copies: Copies, falsifier: Falsifier) -> None:
    """Red by an assertion, or declared equivalent and indeed not seen."""
    outcome = copies.start(falsifier).result()
    assert outcome.outcome in GOOD, f"{falsifier.id}, '{falsifier.claim}': {outcome.outcome} by {outcome.test}: " \
                                    f"{outcome.detail}"


def demand_seeds_killed(copies: Copies, of: Sequence[Falsifier]) -> None:
    """The mutants of the seed class are there, and killed."""
    seeds = [f for f in of if f.seed]
    assert len(seeds) >= SEED_CLASS
    for falsifier in seeds:
        assert copies.start(falsifier).result().outcome == "killed"


def demand_clean(copies: Copies, of: Sequence[Falsifier]) -> Run:
    """What the mutants are measured against: the same tests pass without them, and those without a mutant hold.

    Returns that run.
    """
    run = copies.unmutated(tests_of(of))
    assert run.code == 0 and all(run.passed(f.test) for f in of), run.output[-3000:]
    return run
