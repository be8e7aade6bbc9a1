"""`apr parity`: a model's scores against the reference's, another file's or another program's, at every position.

Every prompt is taken three ways (WAYS), since a GPU computes them with different kernels, and what one leaves in the
cache the next one reads. The verdict is one of pass, fail and unmeasured, and a comparison of nothing is unmeasured.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from apr.errors import GateError, MeasureError, ShapeError
from apr.formats.source import ModelSource
from apr.infer.engine import Engine
from apr.tools.config_diff import PARAMS, check_shapes
from apr.tools.parity_hints import hints, worst
from apr.tools.parity_judge import (
    FAIL,
    NEAR_TIE,
    PASS,
    UNMEASURED,
    Limits,
    Measured,
    Place,
    Position,
    Together,
    fixed_limit,
    judge_way,
    measure_all,
)
from apr.tools.parity_models import FieldFault, field_faults, weight_faults
from apr.tools.parity_prompts import Prompt
from apr.tools.parity_truth import reference_scores
from apr.tools.weights import TensorFault

# How many of a prompt's T tokens go through prefill; the rest follow one by one. What is judged of `continued` are the
# positions after its prefill: those before are `prompt` again. Decoding comes first, while the cache is still empty.
WAYS: dict[str, Callable[[int], int]] = {"decoding": lambda t: 0, "prompt": lambda t: t, "continued": lambda t: t // 2}
GPU, MODELS, FILE = "FALSIFY-CPU-GPU-006", "apr-vs-gguf-forward-parity-v1", "parity with given scores"
Weights = Iterable[tuple[str, TensorFault | None]]
Scores = dict[str, list[np.ndarray]]


@dataclass
class Report:
    """What a comparison found; `gate`: the id that a failure is reported under; `found` and `expected`: the sides."""

    gate: str
    found: str
    expected: str
    precision: str
    slots: int  # prompts that were in the cache at a time, each in a slot of its own
    positions: list[Position] = field(default_factory=list)
    together: list[Together] = field(default_factory=list)
    weights_compared: int = 0
    weight_faults: list[TensorFault] = field(default_factory=list)
    field_faults: list[FieldFault] = field(default_factory=list)

    @property
    def what(self) -> str:
        """The two sides in words."""
        return f"{self.found} against {self.expected}"

    @property
    def failed(self) -> list[Position]:
        """The positions beyond their limits, in order."""
        return [p for p in self.positions if p.verdict == FAIL]

    @property
    def verdict(self) -> str:
        """fail where anything failed; else unmeasured where nothing, or not every position, could be measured."""
        if (self.failed or self.weight_faults or any(t.verdict == FAIL for t in self.together)
                or any(f.computed for f in self.field_faults)):
            return FAIL
        if not self.positions or any(p.verdict == UNMEASURED for p in self.positions):
            return UNMEASURED
        return PASS

    def require(self) -> None:
        """Raise GateError naming what differs first, or MeasureError; nothing for a pass."""
        remedy = "'apr bisect MODEL' finds the stage that goes wrong first"
        if self.verdict == UNMEASURED:
            first = next((p for p in self.positions if p.verdict == UNMEASURED), None)
            raise MeasureError(f"{self.gate} {_place(first)}", "scores to compare at every position",
                               "none" if first is None else first.why, "give another prompt, or another model")
        if self.verdict == FAIL:
            where, expected, found = self._first_fault()
            raise GateError(f"{self.gate} {where}", expected, found, remedy)

    def _first_fault(self) -> tuple[str, str, str]:
        """(where, expected, found) of the first fault: configuration, weights, one position, all together."""
        for f in self.field_faults:
            if f.computed:
                return f.name, str(f.expected), str(f.found)
        if self.weight_faults:
            w = self.weight_faults[0]
            more = f", and {len(self.weight_faults) - 1} more tensors" if len(self.weight_faults) > 1 else ""
            return (f"weight '{w.name}' element {w.index}", f"{w.expected:g}, as {self.expected} has",
                    f"{w.found:g} ({w.count} of {w.elements} elements differ{more})")
        if self.failed:
            p = self.failed[0]
            return _place(p), f"{self.what} within limits", p.why
        t = next(t for t in self.together if t.verdict == FAIL)
        return f"all {t.positions} positions ({t.way})", f"{self.what} within limits", t.why

    def summary(self) -> dict[str, Any]:
        """The verdict, what was compared, the worst of each number and where, and hints; for JSON."""
        return {"verdict": self.verdict, "gate": self.gate, "compared": self.what, "precision": self.precision,
                "positions": len(self.positions), "failed": len(self.failed),
                "unmeasured": sum(p.verdict == UNMEASURED for p in self.positions),
                "near_ties": sum(p.verdict == NEAR_TIE for p in self.positions), "worst": worst(self.positions),
                "together": self.together, "weights_compared": self.weights_compared,
                "weight_faults": self.weight_faults, "config_differences": self.field_faults,
                "hints": hints(self.positions, bool(self.weight_faults), self.slots),
                "next": "apr bisect MODEL names the first stage that differs" if self.verdict == FAIL else None}


def _place(p: Position | None) -> str:
    return "no position" if p is None else f"prompt '{p.prompt}' ({p.way}) position {p.position}"


def against_reference(engine: Engine, source: ModelSource, prompts: Sequence[Prompt], weights: Weights) -> Report:
    """An engine against the reference on the file's weights, rounded as the engine holds them.

    `weights`: (parameter, how the engine's differs from the file's). Raises as Engine.scores and source.read.
    """
    report = Report(GPU, engine.device, "the file's weights in the reference", engine.precision, engine.B)
    _look_at(report, weights)
    found, ids = run_ways(engine, prompts), [p.ids for p in prompts]
    expected = reference_scores(source, ids, engine.precision)
    _judge(report, source, prompts, found, dict.fromkeys(WAYS, expected), exact=expected)
    return report


def against_model(source: ModelSource, other: ModelSource, make: Callable[[ModelSource], Engine],
                  prompts: Sequence[Prompt]) -> Report:
    """Another file against this one, both through engines that `make` makes, one after the other.

    Raises ConfigError for different shapes, and what `make`, Engine.scores and reading raise.
    """
    check_shapes(source.config, other.config, f"{source.path} and {other.path}", PARAMS)
    report = Report(MODELS, str(other.path), str(source.path), "", 0)
    report.field_faults = field_faults(source, other)
    _look_at(report, weight_faults(source, other))
    engine = make(source)
    report.precision, report.slots = engine.precision, engine.B
    expected = run_ways(engine, prompts)
    del engine  # a model's memory
    _judge(report, source, prompts, run_ways(make(other), prompts), expected)
    return report


def against_scores(engine: Engine, source: ModelSource, prompts: Sequence[Prompt], expected: list[np.ndarray],
                   rounding: float) -> Report:
    """An engine against given scores (T, V) of each prompt, which were rounded by `rounding` when they were stored."""
    report = Report(FILE, engine.device, "the given scores", engine.precision, engine.B)
    found = run_ways(engine, prompts)
    _judge(report, source, prompts, found, dict.fromkeys(WAYS, expected), rounding)
    return report


def run_ways(engine: Engine, prompts: Sequence[Prompt]) -> Scores:
    """Scores (T, V) of each prompt, each way; as many prompts at a time as the engine takes, in the order given."""
    found: Scores = {}
    for way, cached in WAYS.items():
        scores: list[np.ndarray] = []
        for at in range(0, len(prompts), engine.B):
            ids = [p.ids for p in prompts[at:at + engine.B]]
            scores += engine.scores(ids, [cached(len(i)) for i in ids])
        for prompt, array in zip(prompts, scores, strict=True):
            if array.shape != (len(prompt.ids), engine.config.V):
                raise ShapeError(f"scores of prompt '{prompt.name}' ({way})",
                                 f"({len(prompt.ids)}, {engine.config.V})", f"{array.shape}", "this is a defect of apr")
        found[way] = scores
    return found


def _look_at(report: Report, weights: Weights) -> None:
    for _, fault in weights:
        report.weights_compared += 1
        if fault is not None:
            report.weight_faults.append(fault)


def _judge(report: Report, source: ModelSource, prompts: Sequence[Prompt], found: Scores, expected: Scores,
           rounding: float = 0.0, exact: list[np.ndarray] | None = None) -> None:
    """Fill in positions and verdicts. `exact`: the reference's scores without rounding, where they are there already.

    In bf16 the limits come from the reference's own rounding. In float32 they are fixed, and only where something is
    beyond them it is asked whether float32 can do better there: a model may amplify roundings more than others do.
    """
    fixed, ids = fixed_limit(source.config.L, rounding), [p.ids for p in prompts]
    places = {way: _places(way, [len(row) for row in ids]) for way in WAYS}
    measured = {way: measure_all(places[way], found[way], expected[way]) for way in WAYS}
    for calibrated in ((True,) if report.precision == "bf16" else (False, True)):
        limits = Limits(fixed, _noise(source, ids, report.precision, exact) if calibrated else None)
        report.positions, report.together = [], []
        for way in WAYS:
            positions, together = judge_way(prompts, way, places[way], measured[way], limits)
            report.positions += positions
            report.together += [together] if together else []
        if not report.failed and all(t.verdict == PASS for t in report.together):
            return


def _places(way: str, lengths: list[int]) -> list[Place]:
    """The positions that are judged of prompts of these lengths; one token cannot be continued."""
    starts = [WAYS[way](t) or t if way == "continued" else 0 for t in lengths]
    return [(i, t) for i, start in enumerate(starts) for t in range(start, lengths[i])]


def _noise(source: ModelSource, ids: list[list[int]], precision: str, exact: list[np.ndarray] | None
           ) -> list[list[Measured]]:
    """What the plainest arithmetic of a precision costs at each position of each prompt, against a finer one.

    Without `exact` the rounding of the weights to bf16 counts too: the other side may not have it.
    """
    if precision == "bf16":
        finer = reference_scores(source, ids, "fp32") if exact is None else exact
        plain = reference_scores(source, ids, "bf16", "bf16")
    else:
        finer = reference_scores(source, ids, "fp32", "fp64")
        plain = reference_scores(source, ids, "fp32") if exact is None else exact
    places = _places("prompt", [len(row) for row in ids])
    noise: list[list[Measured]] = [[] for _ in ids]
    for (i, _), measured in zip(places, measure_all(places, plain, finer), strict=True):
        noise[i].append(measured)
    return noise
