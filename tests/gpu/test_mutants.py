"""Every falsifier of the GPU code, executed: the mutant goes into a copy of the code, and its named test must go red.

As tests/cpu/test_mutants.py, with a GPU, on which all copies run.
"""

import pytest
from mutant_runs import demand_clean, demand_killed, demand_seeds_killed, falsifiers, started

FALSIFIERS = falsifiers("gpu")


@pytest.fixture(scope="module")
def copies(request):
    """The copies, with a run under way for every mutant."""
    with started(request, "gpu") as copies:
        yield copies


@pytest.mark.parametrize("falsifier", [f for f in FALSIFIERS if f.mutant], ids=lambda f: f.id)
def test_mutant_is_killed(copies, falsifier):
    demand_killed(copies, falsifier)


def test_seed_class_mutants_are_killed(copies):
    demand_seeds_killed(copies, FALSIFIERS)


def test_unmutated_copies_pass(copies):
    demand_clean(copies, FALSIFIERS)
