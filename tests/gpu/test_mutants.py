"""Every falsifier of the GPU code, executed: the mutant goes into a copy of the code, and its named test must go red.

As tests/cpu/test_mutants.py, with a GPU, on which all copies run. They share one folder of compiled kernels: its keys
are hashes of the sources, so a mutant never meets another's.
"""

from pathlib import Path

import pytest
from mutant_runs import Copies, demand_killed, demand_seeds_killed

from apr.contract import load_all
from apr.paths import contracts_dir

WORKERS = 6
FALSIFIERS = [f for c in load_all(contracts_dir()) for f in c.falsifiers if f.test.startswith("tests/gpu/")]


@pytest.fixture(scope="module")
def copies(request, tmp_path_factory):
    """The copies, with a run under way for every mutant that this session asks about."""
    folder = tmp_path_factory.mktemp("mutants")
    copies = Copies(folder, WORKERS, ("apr", "kernels", "contracts", "tests"), ("--require-gpu",),
                    {"OPENBLAS_NUM_THREADS": "2", "APR_CACHE_DIR": str(folder / "compiled")}, 300)
    copies.start_all(request)
    yield copies
    copies.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("falsifier", FALSIFIERS, ids=lambda f: f.id)
def test_mutant_is_killed(copies, falsifier):
    demand_killed(copies.start(falsifier).result(), falsifier)


def test_seed_class_mutants_are_killed(copies):
    demand_seeds_killed(copies, FALSIFIERS)


def test_unmutated_copies_pass(copies):
    """What the mutants are measured against: the same tests, with the copy's own apr and kernels."""
    where = "import apr, apr.paths; print(apr.__file__, apr.paths.kernels_dir(), apr.paths.contracts_dir())"
    every = copies.all()
    for copy in every:
        found = copies.python(copy, "-c", where).stdout.split()
        assert len(found) == 3 and all(Path(path).is_relative_to(copy) for path in found), f"not the copy: {found}"
    run = copies.pytest(every[0], *sorted({f.test for f in FALSIFIERS}))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr
