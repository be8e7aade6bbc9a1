"""The hints of `apr parity`, from made-up positions: each pattern of failures says its own kind of fault alone."""

import dataclasses
import math

import pytest

from apr.tools.parity_hints import hints, worst
from apr.tools.parity_judge import Limit, Measured, Position

FINE = Measured(1, 1, 1.0, 1e-7, 1e-6, 1e-7, 1.0, 1e-12, 0, 0, 1.0, 5.0, 0.0)
LENGTH = 8
SAID = {"decoding": "only decoding is wrong", "continued": "what the prompt leaves in the cache",
        "prompt": "only whole prompts", "old": "old keys or values", "first": "position 0 fails",
        "later": "position 0 is right", "grows": "grows along", "scale": "the direction holds and the scale is 1.1",
        "other": "another function", "nan": "no numbers", "weights": "the weights differ"}
ALL = ("decoding", "prompt", "continued")


def positions(wrong, ways=ALL, prompts=("long", "short"), at=range(LENGTH)):
    """Two prompts each way; `wrong(t)` changes what was measured at position t of these ways and prompts."""
    limit, out = Limit(1e-5, 1e-6, 1e-5), []
    for way in ALL:
        for prompt in ("long", "short"):
            for t in range(LENGTH // 2 if way == "continued" else 0, LENGTH):
                bad = way in ways and prompt in prompts and t in at
                m = dataclasses.replace(FINE, **wrong(t)) if bad else FINE
                out.append(Position(prompt, way, t, 0, m, limit, "fail" if bad else "pass", ""))
    return out


def far(_t):
    return {"relative_l2": 0.3, "cosine": 0.95}


@pytest.mark.parametrize(("made", "said"), [
    (positions(far), {"first"}),
    (positions(far, ("decoding", "continued")), {"decoding", "first"}),
    (positions(far, ("decoding",), at=range(3, LENGTH)), {"decoding", "later", "grows"}),
    (positions(far, ("continued",)), {"continued", "later"}),
    (positions(far, ("prompt",)), {"prompt", "first"}),
    (positions(far, ("decoding", "continued"), ("short",)), {"decoding", "old", "first"}),
    (positions(lambda t: {"relative_l2": 0.01 * t, "cosine": 0.95}, at=range(1, LENGTH)), {"later", "grows"}),
    (positions(lambda t: {"relative_l2": 0.1, "scale": 1.1, "cosine": 1.0}), {"first", "scale"}),
    (positions(lambda t: {"relative_l2": 0.1, "scale": 1.1, "cosine": 0.99}), {"first"}),
    (positions(lambda t: {"relative_l2": 1.2, "cosine": 0.1}), {"first", "other"}),
    (positions(lambda t: {"relative_l2": math.nan, "nans": 3}), {"first", "nan"}),
    (positions(far, ()), set())])
def test_each_pattern_says_its_own(made, said):
    found = " / ".join(hints(made, False, 1))
    assert {name for name, text in SAID.items() if text in found} == said


def test_weights_are_said_alone_or_before_the_rest():
    assert hints(positions(far, ()), True, 1) == ["the weights differ, which alone explains scores that do"]
    assert len(hints(positions(far), True, 1)) == 2


def test_one_token_does_not_grow():
    limit = Limit(1e-5, 1e-6, 1e-5)
    short = [Position("p", "prompt", t, 0, dataclasses.replace(FINE, relative_l2=0.1 * (t + 1), cosine=0.95), limit,
                      "fail", "") for t in range(2)]
    assert SAID["grows"] not in " / ".join(hints(short, False, 1))


def test_the_worst_of_each_number_has_its_place():
    made = positions(lambda t: {"relative_l2": 0.1 * t, "cosine": 1 - 0.1 * t, "scale": 1 - 0.01 * t, "kl": math.nan},
                     ("prompt",), ("short",), at=(2, 5))
    found = worst(made)
    assert {name: place["position"] for name, place in found.items() if place["prompt"] == "short"} == {
        "relative_l2": 5, "cosine": 5, "scale": 5, "kl": 2}
    assert found["scale"]["value"] == 0.95 and found["cosine"]["way"] == "prompt"
    assert worst([]) == dict.fromkeys(found)
