"""The likely cause of a wrong result: the fault that, put into the reference, gives what the GPU gave.

Every hypothesis is run, and what does not explain is not claimed: `unknown` with its numbers is an answer too. Of those
that explain equally well the simpler one is the cause: a fault without a number before one that was fitted, a fault of
an op before a pattern of its result. Where only some rows or columns are wrong, those alone are explained.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from apr.errors import ShapeError
from apr.tools.checks import Check, Formula, Step, run_steps
from apr.tools.compare import relative
from apr.tools.fit import Case, Score, best_of, refine
from apr.tools.formulas import FORMULAS
from apr.tools.patterns import as_rows, patterns, spans
from apr.tools.variants import NotApplicable, Variant
from apr.tools.variants_attention import ATTENTIONS
from apr.tools.variants_backward import BACKWARD
from apr.tools.variants_forward import EARLY, FORWARD

Array = np.ndarray
VARIANTS: dict[str, tuple[Variant, ...]] = FORWARD | ATTENTIONS | BACKWARD
PLAIN, FITTED, OPERAND, PATTERN = range(4)  # from the simplest explanation to the last resort
FEWEST = 8  # elements from which a number is fitted
COARSE = 1e-3  # the tolerance from which operands of fewer bits are meant, not a fault
REFUSED = (NotApplicable, ValueError, IndexError, ShapeError)  # what a fault that these values cannot have raises
MOST = 0.75  # of rows or columns: where more are wrong, that the others are right explains nothing by itself
ROW = 5.0  # tolerances beyond which a row or column is wrong


@dataclass(frozen=True)
class Cause:
    """Why a result is wrong. `kind` is a word of variants.KINDS, `text` a sentence, `value` the number found, if any.

    `explains` is the relative L2 of the result against the hypothesis, NaN where there is none (values that are not
    numbers); for kinds `rows`, `columns` and `unknown`, against the truth. `op` is the op of the step at fault.
    """

    kind: str
    text: str
    value: float | None
    explains: float
    op: str


@dataclass(frozen=True)
class Found:
    """A hypothesis that explains: its cause, how well, and how simple it is (smaller is simpler)."""

    cause: Cause
    score: Score
    rank: int


def explain(check: Check, tolerance: float) -> Cause | None:
    """The likely cause of a result that is beyond `tolerance` (relative L2); None for one that is within it."""
    with np.errstate(all="ignore"):
        truth = np.asarray(run_steps(check, FORMULAS), np.float64)
        op = check.steps[-1].op
        if check.got.size != truth.size:
            return Cause("shape", f"it has {check.got.size} elements, not {truth.size}", None, math.nan, op)
        got = check.got.astype(np.float64).reshape(truth.shape)
        if (cause := of_values(got, truth, op)) is not None:
            return cause
        if relative(got, truth)[0] <= tolerance:
            return None
        case = Case(got, truth, np.isfinite(got) & np.isfinite(truth), tolerance)
        return chosen(check, case)


def of_values(got: Array, truth: Array, op: str) -> Cause | None:
    """What is seen without any hypothesis: not finite, or one value everywhere where the truth varies."""
    bad = np.flatnonzero(~np.isfinite(got.reshape(-1)) & np.isfinite(truth.reshape(-1)))
    if bad.size:
        kind = "nan" if np.isnan(got).any() else "infinite"
        name = "NaN" if kind == "nan" else "infinite"
        if bad.size == got.size and kind == "nan":
            return Cause("never_written", "every value is NaN: it was never written", None, math.nan, op)
        where = tuple(int(i) for i in np.unravel_index(int(bad[0]), got.shape))
        return Cause(kind, f"{bad.size} of {got.size} values are {name}, the first at {list(where)}; rows "
                     f"{spans(np.unique(bad // as_rows(got).shape[1]))}", float(bad.size), math.nan, op)
    if got.size > 1 and np.ptp(got) == 0.0 and np.isfinite(truth).all() and np.ptp(truth) > 0.0:
        value = float(got.reshape(-1)[0])
        text = "every value is zero" if value == 0.0 else f"every value is {value:.6g}"
        return Cause("zero" if value == 0.0 else "constant", text, value, 0.0, op)
    return None


def search(check: Check, case: Case) -> Iterator[Found]:
    """Every hypothesis that explains the judged elements."""
    known = dict(check.values)
    for index, step in enumerate(check.steps):
        rest = dataclasses.replace(check, steps=check.steps[index:], values=dict(known))
        for variant in VARIANTS.get(step.op, ()):
            yield from tried(rest, case, variant)
        yield from operands(rest, case)
        known[step.out] = FORMULAS[step.op](**arguments(step, known))
    for p in patterns(case.got, case.truth, check.before, case.tolerance, case.where):
        score = case.score(p.array)
        if score is not None and score.accepted(case.tolerance):
            yield Found(Cause(p.kind, p.text, p.number, score.explains, check.steps[-1].op), score, PATTERN)


def arguments(step: Step, values: Mapping[str, Any]) -> dict[str, Any]:
    """The step's arguments by name."""
    return {argument: values[name] for argument, name in step.given.items()}


def tried(rest: Check, case: Case, variant: Variant) -> Iterator[Found]:
    """The variant of the first step of `rest`, with the number that explains best, if that explains."""
    step = rest.steps[0]
    if any(name not in rest.values for name in variant.needs) or (
            variant.kind == "precision" and case.tolerance >= COARSE):
        return
    extra = {name: rest.values[name] for name in variant.needs}
    args = arguments(step, rest.values)

    def run(number: float) -> Array:
        faulty: Formula = lambda **given: variant.formula(number, given | extra)  # noqa: E731
        return np.asarray(run_steps(rest, FORMULAS, {0: faulty}), np.float64)

    try:
        numbers = variant.numbers(args)
        if not len(numbers):
            return
        number, array = fitted(case, variant, run, numbers) if variant.refine else best_of(case, run, numbers)
    except REFUSED:
        return
    score = case.score(array)
    if score is None or not score.accepted(case.tolerance) or (variant.refine and score.size < FEWEST):
        return
    plain = {name: float(np.asarray(value).reshape(-1)[0]) for name, value in args.items()
             if not isinstance(value, str) and value is not None and np.size(value) == 1 and np.isrealobj(value)
             and np.asarray(value).dtype.kind in "iuf"}
    value = None if math.isnan(number) else float(number)
    cause = Cause(variant.kind, variant.text.format(**(plain | {"number": number})), value, score.explains, step.op)
    yield Found(cause, score, FITTED if variant.refine else PLAIN)


def fitted(case: Case, variant: Variant, run: Callable[[float], Array], numbers: Any) -> tuple[float, Array]:
    """The variant's number, from the best of its grid; where it is `early`, found in the first positions first."""
    lowest = 0.0 if min(numbers) >= 0.0 else -math.inf
    first = case
    if variant.early and case.got.ndim > 2:
        early = np.zeros(case.got.shape, bool)
        early[:, :EARLY] = True
        if (early & case.where).any():
            first = dataclasses.replace(case, where=early & case.where)
    number, array = best_of(first, run, numbers)
    if not math.isfinite(first.error(array)):
        return number, array
    if first is not case:
        number, _ = refine(first, run, number, lowest)
    return refine(case, run, number, lowest)


def operands(rest: Check, case: Case) -> Iterator[Found]:
    """The first step of `rest` with one of its arrays replaced by another of that shape that the check knows."""
    step = rest.steps[0]
    for argument, name in step.given.items():
        own = rest.values[name]
        if not isinstance(own, np.ndarray) or own.size < 2:
            continue
        for other, value in rest.values.items():
            if other == name or not isinstance(value, np.ndarray) or value.shape != own.shape or (
                    value.dtype.kind != own.dtype.kind):
                continue
            given = dict(step.given) | {argument: other}
            changed = dataclasses.replace(rest, steps=(dataclasses.replace(step, given=given), *rest.steps[1:]))
            try:
                score = case.score(np.asarray(run_steps(changed, FORMULAS), np.float64))
            except REFUSED:
                continue
            if score is not None and score.accepted(case.tolerance):
                yield Found(Cause("operand", f"{step.op} reads {other} where it should read {name}", None,
                                  score.explains, step.op), score, OPERAND)


def chosen(check: Check, case: Case) -> Cause:
    """A fault of an op that explains the whole result; else what explains its wrong rows or columns; else a pattern."""
    whole = simplest(search(check, case), case.tolerance)
    if whole is not None and whole.rank < PATTERN:
        return whole.cause
    part = local(check, case)
    if part is not None and part.kind not in ("rows", "columns"):
        return part
    return whole.cause if whole is not None else part or unknown(case, check.steps[-1].op)


def simplest(found: Iterator[Found], tolerance: float) -> Found | None:
    """The simplest of those that explain as well as the best."""
    every = list(found)
    if not every:
        return None
    best = min((f.score for f in every), key=lambda s: s.explains)
    return min((f for f in every if f.score.equal(best, tolerance)), key=lambda f: f.rank)


def wrong(case: Case, axis: int) -> Array | None:
    """Which rows (axis 0) or columns (1) of the result are wrong, where those are not all."""
    g, t = (as_rows(np.where(case.where, a, 0.0)) for a in (case.got, case.truth))
    size = np.linalg.norm(t, axis=1 - axis)
    typical = float(np.sqrt(np.mean(size * size)))
    error = np.linalg.norm(g - t, axis=1 - axis) / np.maximum(size, 0.1 * typical + 1e-300)
    numbers = np.flatnonzero(error > ROW * case.tolerance)
    others = np.delete(np.arange(error.size), numbers)
    if not 0 < numbers.size < error.size:
        return None
    kept = [a[others] if axis == 0 else a[:, others] for a in (g, t)]
    return numbers if relative(kept[0], kept[1])[0] <= case.tolerance else None


def local(check: Check, case: Case) -> Cause | None:
    """The cause of what is wrong in some rows or columns only; where none explains it, which they are."""
    for axis, kind in enumerate(("rows", "columns")):
        if (numbers := wrong(case, axis)) is None:
            continue
        rows: Array = np.zeros(as_rows(case.got).shape, bool)
        rows[numbers if axis == 0 else (slice(None), numbers)] = True
        part = dataclasses.replace(case, where=rows.reshape(case.got.shape) & case.where)
        place = named_place(case.got, axis, numbers)
        found = simplest(search(check, part), case.tolerance)
        if found is not None:
            return dataclasses.replace(found.cause, text=f"in {place} only: {found.cause.text}")
        if numbers.size > MOST * as_rows(case.got).shape[axis]:
            continue
        error, scale = relative(case.got[part.where], case.truth[part.where])
        return Cause(kind, f"only {place} are wrong: relative L2 {error:.2e}, scale {scale:.4g}", float(numbers.size),
                     error, check.steps[-1].op)
    return None


def named_place(array: Array, axis: int, numbers: Array) -> str:
    """Which rows or columns of an array these are; elements where it has no columns, heads where they are whole."""
    count = as_rows(array).shape[axis]
    if axis == 0:
        return f"{'elements' if array.ndim == 1 else 'rows'} {spans(numbers)} of {count}"
    if array.ndim == 4:
        size = array.shape[3]
        owners, each = np.unique(numbers // size, return_counts=True)
        if (each == size).all():
            return f"heads {spans(owners)} of {array.shape[2]}"
    return f"columns {spans(numbers)} of {count}"


def unknown(case: Case, op: str) -> Cause:
    """That nothing explains the result, and its numbers."""
    error, scale = relative(case.got[case.where], case.truth[case.where])
    return Cause("unknown", f"no known fault explains it: relative L2 {error:.2e}, scale {scale:.4g}", None, error, op)


OWN = {"attention_dq": "attention", "attention_dk": "attention", "attention_dv": "attention", "heads": "attention",
       "flat": "attention", "bias": "linear", "bias_dbias": "linear", "linear_dinp": "linear",
       "linear_dweight": "linear", "rmsnorm_dinp": "rmsnorm", "rmsnorm_dweight": "rmsnorm", "rope_dinp": "rope",
       "silu": "swiglu", "silu_d": "swiglu", "swiglu_dgate": "swiglu", "swiglu_dup": "swiglu",
       "loss_sum": "cross_entropy", "dlogits": "cross_entropy", "embedding_dtable": "embedding", "add": "residual",
       "clip": "global_norm", "adamw_m": "adamw", "adamw_v": "adamw", "adamw_param": "adamw", "identity": "buffers"}
BROKEN = {("rmsnorm", "eps"): "apr-pretrain-cuda-rmsnorm-eps-parity-v1",
          ("rmsnorm_dinp", "eps"): "apr-pretrain-cuda-rmsnorm-eps-parity-v1",
          ("rmsnorm_dweight", "eps"): "apr-pretrain-cuda-rmsnorm-eps-parity-v1",
          ("rope", "theta"): "apr-pretrain-cuda-rope-theta-cache-key-v1",
          ("rope_dinp", "theta"): "apr-pretrain-cuda-rope-theta-cache-key-v1",
          ("bias", "bias_missing"): "apr-pretrain-cuda-forward-parity-v1",
          ("swiglu", "exchanged"): "block-v1", ("clip", "clip_missing"): "adamw-v1"}
MEMORY = {"stale": "buffers-v1", "never_written": "buffers-v1", "not_cleared": "model-v1", "operand": "block-v1"}


def contract_of(op: str, kind: str) -> str:
    """The stem of the contract that a cause breaks; `op` "upload" is a parameter that differs on the GPU."""
    if op == "upload":
        return "apr-pretrain-from-init-v1"
    return BROKEN.get((op, kind)) or MEMORY.get(kind) or f"{OWN.get(op, op)}-v1"
