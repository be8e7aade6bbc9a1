"""Every falsifier of the GPU code, executed: the mutant goes into a copy of the code, and its named test must go red.

As tests/cpu/test_mutants.py, with a GPU, on which all copies run, beside the other tests (conftest.py). With
--falsify-receipt the outcomes are recorded, in the receipt that `apr contracts falsify --gpu --receipt` writes, so that
not everything must be run again for it.
"""

import time

import pytest
from mutant_runs import ROOT, demand_clean, demand_killed, demand_seeds_killed, falsifiers

from apr.driver import probe
from apr.tools.falsify import count, outcomes
from apr.tools.receipts import digest, machine, write_receipt

FALSIFIERS = falsifiers("gpu")
START, TESTED = time.monotonic(), digest(ROOT)


@pytest.mark.parametrize("falsifier", [f for f in FALSIFIERS if f.mutant], ids=lambda f: f.id)
def test_mutant_is_killed(copies, falsifier):
    demand_killed(copies, falsifier)


def test_seed_class_mutants_are_killed(copies):
    demand_seeds_killed(copies, FALSIFIERS)


def test_unmutated_copies_pass(copies, request):
    clean = demand_clean(copies, FALSIFIERS)
    if path := request.config.getoption("--falsify-receipt"):
        found = outcomes(copies, clean, FALSIFIERS, lambda _: None)
        assert digest(ROOT) == TESTED, "the sources have changed during the run: no receipt was written"
        write_receipt(path, machine(probe()), TESTED, time.monotonic() - START,
                      count(FALSIFIERS, {o.id: o.outcome for o in found}), found)
