"""A check: what a GPU computed, and the steps of the reference that say what it should have been.

A step is one op on named values. A fused kernel is several steps with one result to compare, and a hypothesis about a
fault is the same steps with one of them replaced: what then equals the GPU's result is the likely cause.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Formula = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Step:
    """`out` = the formula of `op`, whose arguments are the values named in `given`."""

    op: str
    out: str
    given: Mapping[str, str]


@dataclass(frozen=True)
class Check:
    """A result of the GPU at `stage` (a name of apr/taps.py, `grad.<parameter>`, `m.<parameter>`, …).

    `values` are what the steps start from: arrays (the GPU's own, as earlier stages left them, and parameters) and
    numbers of the configuration. `before`: what the result's buffer held for an earlier batch, where that is known.
    `exact`: the result is float32 whatever the weights are stored in, and nothing is rounded on the way to it.
    """

    stage: str
    steps: tuple[Step, ...]
    values: Mapping[str, Any]
    got: np.ndarray
    before: np.ndarray | None = None
    exact: bool = False


def run_steps(check: Check, formulas: Mapping[str, Formula], replaced: Mapping[int, Formula] | None = None) -> Any:
    """The last step's result; step i uses replaced[i] where that is given, else the formula of its op."""
    values, out = dict(check.values), None
    for index, step in enumerate(check.steps):
        formula = (replaced or {}).get(index, formulas[step.op])
        out = values[step.out] = formula(**{argument: values[name] for argument, name in step.given.items()})
    return out
