"""What a variant is: one op done wrongly in one known way, of which some have a number to be found.

The tables are data: variants_forward.py, variants_backward.py and variants_attention.py; apr/tools/causes.py searches.
A variant that cannot say what an element would be (the row beyond the last) says NaN there, and is not judged by it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apr.tools.formulas import FORMULAS

Array = np.ndarray
Args = dict[str, Any]
Faulty = Callable[[float, Args], Array]
Change = Callable[[float, Args], Any]


class NotApplicable(Exception):
    """A variant that these shapes cannot have: a transposed matrix that would not fit, an odd half."""


@dataclass(frozen=True)
class Variant:
    """`formula(number, args)` is the op with the fault; args are the step's, by name.

    kind is a word of KINDS; text a sentence, formatted with `number` and the step's numbers. `values` are the numbers
    to try, or a function of the step's arguments that gives them; with `refine` the best of them is only where the fit
    starts. `early`: a fit that starts from the first positions alone, since a wrong angle grows with the position.
    `needs`: names of the check's values that the formula takes beside the step's own; without them it is not tried.
    """

    kind: str
    text: str
    formula: Faulty
    values: Sequence[float] | Callable[[Args], Sequence[float]] = ()
    refine: bool = False
    early: bool = False
    needs: tuple[str, ...] = ()

    def numbers(self, args: Args) -> Sequence[float]:
        """The numbers to try; one NaN for a variant that has none."""
        values = self.values(args) if callable(self.values) else self.values
        return values if self.values else (np.nan,)


def changed(op: str, **changes: Change) -> Faulty:
    """The op's own formula with some of its arguments changed: each by a function of the number and the arguments.

    What the arguments hold beside the op's own (Variant.needs) is for those functions.
    """
    own = inspect.signature(FORMULAS[op]).parameters
    return lambda number, args: FORMULAS[op](**{
        name: changes[name](number, args) if name in changes else args[name] for name in own})


def times(op: str, factor: float | None = None) -> Faulty:
    """The op's result times a factor: the number, or a given one."""
    return lambda number, args: FORMULAS[op](**args) * (number if factor is None else factor)


def other(op: str, **names: str) -> Faulty:
    """Another op of the step's arguments: those that are called otherwise there by their names here."""
    return lambda _number, args: FORMULAS[op](**{there: args[here] for there, here in names.items()})


def shift_rows(array: Any, by: int) -> Array:
    """Row n of (N, …) is row n + by, float64; NaN where there is none."""
    out = np.full(np.shape(array), np.nan)
    if by > 0:
        out[:-by] = array[by:]
    else:
        out[-by:] = array[:by]
    return out


def without_last(array: Any) -> Array:
    """(…, C) with the last row zero."""
    out = np.array(array, np.float64)
    out.reshape(-1, out.shape[-1])[-1] = 0.0
    return out


ROUNDINGS: dict[str, Callable[[Array, int], Any]] = {
    "nearest even": lambda raw, drop: ((1 << drop - 1) - 1) + (raw >> drop & 1),
    "nearest, halves away from zero": lambda raw, drop: 1 << drop - 1, "cut off": lambda raw, drop: 0}


def rounded(array: Any, bits: int, how: str = "nearest even") -> Array:
    """float32 with `bits` bits of mantissa: 10 for TF32, 7 for bfloat16; `how`: of ROUNDINGS, what is added first."""
    drop = 23 - bits
    raw = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((raw + np.asarray(ROUNDINGS[how](raw, drop), np.uint32)) >> drop << drop).view(np.float32)


def low_precision(op: str, *names: str) -> tuple[Variant, ...]:
    """The op on operands that lost bits on the way in: TF32 or bfloat16 where float32 was asked for."""
    def with_rounding(how: str) -> Faulty:
        return lambda number, args: FORMULAS[op](**(args | {n: rounded(args[n], int(number), how) for n in names}))
    return tuple(Variant("precision", "the operands have {number:.0f} bits of mantissa (10: TF32, 7: bfloat16), "
                         f"rounded: {how}", with_rounding(how), (10, 7)) for how in ROUNDINGS)


# Every kind of cause, and what it says; `op` of the cause names where.
KINDS = {
    "nan": "values that are not numbers", "infinite": "infinite values", "never_written": "NaN in every element",
    "zero": "all zero", "constant": "one value in every element", "shape": "another number of elements",
    "eps": "another epsilon", "gain_missing": "the norm's weight is not applied",
    "gain_plus_one": "the norm's weight is applied as 1 + weight", "mean_subtracted": "LayerNorm for RMSNorm",
    "sum_not_mean": "a sum where a mean is meant", "wrong_divisor": "a mean over one too few",
    "transposed": "a matrix the other way round", "pair_order": "a weight's rows in the other rotary order",
    "half": "halves exchanged", "bias_missing": "no bias", "bias_twice": "the bias twice",
    "bias_displaced": "the bias of other channels", "theta": "another rotary base",
    "pairs": "neighbouring channels turned together", "direction": "turned the other way",
    "position": "another position", "not_rotated": "no rotation", "scaling": "another rotary scaling",
    "scale": "another scale of the scores", "mask_missing": "later keys are seen",
    "mask_ahead": "the next key is seen", "mask_behind": "the own key is not seen",
    "head_map": "query heads read other key/value heads", "exchanged": "two operands or results exchanged",
    "not_normalised": "softmax without its sum", "keys_ignored": "the last keys are not read",
    "addend_missing": "one of two addends missing", "addend_twice": "one of two addends twice",
    "activation": "another activation", "activation_missing": "no activation", "log_base": "another logarithm",
    "target_row": "the targets of other rows", "logits_row": "the logits of other rows",
    "row_missing": "the last row is not counted", "ignored_counted": "ignored targets are counted",
    "one_hot_missing": "the target's own score is not pushed up", "factor": "another factor",
    "norm_term_missing": "the gradient through the norm is missing", "slope_missing": "no slope of the sigmoid",
    "mean_term_missing": "the softmax's gradient without its mean", "group_sum": "summed over other heads of the group",
    "repeats_lost": "repeated ids counted once", "id": "rows of other ids", "twice": "accumulated twice",
    "clip_missing": "gradients not clipped", "clip_square": "clipped by the square of the norm",
    "root_missing": "no square root", "square_missing": "the second moment of the gradient, not of its square",
    "correction": "no bias correction", "step": "another step's bias correction", "eps_inside": "eps inside the root",
    "decay_missing": "no weight decay", "decay": "weight decay of another size",
    "decay_l2": "decay added to the gradient", "learning_rate": "another learning rate",
    "beta": "another decay of the moment", "operand": "another array read", "precision": "fewer bits",
    "scaled": "a constant factor", "shifted": "one vector added to every row",
    "gains": "each column times a factor of its own", "row_factors": "each row times a factor of its own",
    "displaced": "rows of other rows", "sequences": "sequences exchanged",
    "permuted": "columns, heads or rows in another order",
    "stale": "what the buffer held before", "not_cleared": "added to what the buffer held before",
    "rows": "some rows differ, unexplained", "columns": "some columns differ, unexplained", "unknown": "unexplained",
}
