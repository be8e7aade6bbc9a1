"""What a failed comparison looks like: the worst of each number, and what kind of fault shows in that way.

Hints, not findings: `apr bisect` finds the stage. The kinds are upstream's, and those that our own faults showed.
"""

import math
from collections.abc import Sequence
from typing import Any

from apr.tools.parity_judge import FAIL, UNMEASURED, Measured, Position

GROWTH = 2.0  # of the error, from the first half of a prompt to the second
SAME_DIRECTION, OTHER_FUNCTION = 0.999, 0.9  # cosine


def worst(positions: Sequence[Position]) -> dict[str, dict[str, Any] | None]:
    """The worst value of each number and where it is; a NaN is worse than any number. None without a position."""
    numbers = {"relative_l2": lambda m: m.relative_l2, "kl": lambda m: m.kl, "max_abs": lambda m: m.max_abs,
               "mean_abs": lambda m: m.mean_abs, "cosine": lambda m: -m.cosine, "scale": lambda m: abs(m.scale - 1)}
    known = [p for p in positions if p.verdict != UNMEASURED]
    out: dict[str, dict[str, Any] | None] = dict.fromkeys(numbers)
    for name, badness in numbers.items():
        if known:
            p = max(known, key=lambda p: _or_infinite(badness(p.measured)))
            out[name] = {"value": getattr(p.measured, name), "prompt": p.prompt, "way": p.way, "position": p.position}
    return out


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def hints(positions: Sequence[Position], weights_differ: bool, slots: int) -> list[str]:
    """Likely kinds of fault, in words; none where no position failed. `slots`: prompts in the cache at a time."""
    failed = [p for p in positions if p.verdict == FAIL]
    out = ["the weights differ, which alone explains scores that do"] if weights_differ else []
    if not failed:
        return out
    ways = {p.way for p in failed}
    if "prompt" not in ways:
        out.append("only what the prompt leaves in the cache, or the step after it, is wrong" if ways == {"continued"}
                   else "only decoding is wrong: its kernels, or the cache that it reads and writes")
    elif ways == {"prompt"}:
        out.append("only whole prompts are wrong: the kernels that take many tokens at a time")
    later = {p.prompt for p in failed if p.way == "decoding"}
    if later and "prompt" not in ways and not later & set(list(dict.fromkeys(p.prompt for p in positions))[:slots]):
        out.append("the first prompt in the cache is right and later ones are not: old keys or values are read")
    if any(p.position == 0 for p in failed):
        out.append("position 0 fails, where attention sees one token: a layer's weights, norms, biases or products")
    else:
        out.append("position 0 is right and later ones are not: rotation, attention over earlier tokens, or the cache")
    if _grows(positions, ways):
        out.append("the error grows along a prompt: rotation (theta, pairing), or a cache that drifts")
    first = max(failed, key=lambda p: _or_infinite(p.measured.relative_l2)).measured
    return out + _direction(first)


def _grows(positions: Sequence[Position], ways: set[str]) -> bool:
    """Whether the second half of the longest prompt is worse than the first, GROWTH times or more."""
    way = "prompt" if "prompt" in ways else "decoding"
    rows: dict[str, list[float]] = {}
    for p in positions:
        if p.way == way and p.verdict != UNMEASURED:
            rows.setdefault(p.prompt, []).append(p.measured.relative_l2)
    longest = max(rows.values(), key=len, default=[])
    half = len(longest) // 2
    return half > 1 and sum(longest[-half:]) >= GROWTH * sum(longest[:half])


def _direction(m: Measured) -> list[str]:
    if m.nans or m.infs:
        return ["scores that are no numbers: an overflow, or memory that was never written"]
    if m.cosine >= SAME_DIRECTION and abs(m.scale - 1) > m.relative_l2 / 2:
        return [f"the direction holds and the scale is {m.scale:.4g}: a norm's weight, or a factor too many or missing"]
    if m.cosine < OTHER_FUNCTION:
        return [f"cosine {m.cosine:.3f}: another function, such as a transposed or permuted weight or the wrong tensor"]
    return []
