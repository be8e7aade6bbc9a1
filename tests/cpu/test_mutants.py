"""Every falsifier of the contracts, executed: the mutant goes into a copy of the code, its named test must go red."""

from pathlib import Path

import pytest
from mutant_runs import Copies, demand_killed, demand_seeds_killed

from apr.contract import load_all
from apr.paths import contracts_dir

WORKERS = 2
FALSIFIERS = [f for c in load_all(contracts_dir()) for f in c.falsifiers if f.test.startswith("tests/cpu/")]


@pytest.fixture(scope="module")
def copies(request, tmp_path_factory):
    """The copies, with a run under way for every mutant that this session asks about."""
    copies = Copies(tmp_path_factory.mktemp("mutants"), WORKERS, ("apr", "tests", "kernels"),
                    ("-p", "no:cacheprovider"), {"OPENBLAS_NUM_THREADS": "1"}, 120)
    copies.start_all(request)
    yield copies
    copies.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("falsifier", FALSIFIERS, ids=lambda f: f.id)
def test_mutant_is_killed(copies, falsifier):
    demand_killed(copies.start(falsifier).result(), falsifier)


def test_seed_class_mutants_are_killed(copies):
    demand_seeds_killed(copies, FALSIFIERS)


def test_unmutated_copies_pass(copies):
    """What the mutants are measured against: the same tests, in every copy, with the copy's own apr."""
    for copy in copies.all():
        where = copies.python(copy, "-c", "import apr; print(apr.__file__)")
        assert Path(where.stdout.strip()).is_relative_to(copy), f"not the copy: {where.stdout}{where.stderr}"
        run = copies.pytest(copy, *sorted({f.test for f in FALSIFIERS}))
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr
