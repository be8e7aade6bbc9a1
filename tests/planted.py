"""Planted faults: a check of one op, and results that were computed wrongly, in float32 or rounded to bfloat16."""

import numpy as np

from apr.tools.causes import Cause, explain
from apr.tools.checks import Check, Step

FP32, BF16 = 1e-6, 6e-3  # the gates of elementwise float32, and of bfloat16
FP32_PRODUCTS = 2e-6


def check_of(op: str, args: dict, got: np.ndarray, **more) -> Check:
    """The check of one step whose arguments are called as the op calls them; `more` values are known beside them."""
    return Check("L00.stage", (Step(op, "out", {name: name for name in args}),), args | more, np.asarray(got))


def bf16(array: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, to nearest and to even."""
    raw = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((raw + 0x7FFF + (raw >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def cause_of(op: str, args: dict, got: np.ndarray, tolerance: float = FP32_PRODUCTS, **more) -> Cause:
    """The cause that is found for `got`; there must be one."""
    cause = explain(check_of(op, args, got, **more), tolerance)
    assert cause is not None, "no fault was seen"
    return cause


def normal(rng: np.random.Generator, *shape: int, size: float = 1.0) -> np.ndarray:
    """float32 standard normal times `size`."""
    return (size * rng.standard_normal(shape)).astype(np.float32)
