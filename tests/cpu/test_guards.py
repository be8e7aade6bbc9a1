"""Guards: what trips, what does not, and that no NaN or infinity ever yields permission."""

import math

import pytest
from examples import EXAMPLES
from hypothesis import given
from hypothesis import strategies as st

from apr.train.guards import State, judge_init, judge_initial, judge_step, judge_val

GOOD = {"loss": 3.0, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_sec": 100.0, "wall_ms": 10.0}
LN_V = math.log(1000)


def test_states():
    assert judge_step(**GOOD, history=[3.0] * 19).state is State.WARMUP
    assert judge_step(**GOOD, history=[3.0] * 20).state is State.OK
    assert judge_step(**GOOD | {"loss": 10.1}, history=[3.0] * 20).gate == "INV-TRAIN-005"
    assert judge_step(**GOOD | {"loss": 9.9}, history=[3.0] * 20).state is State.OK


def test_a_spike_is_judged_by_the_median_of_the_last_losses():
    for history in ([9.0] * 100 + [3.0] * 20, [3.0] * 11 + [30.0] * 9, [3.0] * 20):
        assert judge_step(**GOOD | {"loss": 10.1}, history=history).gate == "INV-TRAIN-005"
    assert judge_step(**GOOD | {"loss": 10.1}, history=[1.0] * 100 + [9.0] * 20).state is State.OK


@pytest.mark.parametrize("field", ["grad_norm", "lr", "tokens_per_sec", "wall_ms"])
def test_zero_is_a_number_like_others(field):
    """A gradient of nothing, the learning rate of a schedule's end, a clock too coarse: no reason to end a run."""
    assert judge_step(**{**GOOD, field: 0.0}, history=[3.0] * 20).state is State.OK


@pytest.mark.parametrize(("change", "gate"), [
    ({"loss": math.nan}, "INV-TRAIN-007"), ({"grad_norm": math.inf}, "INV-TRAIN-007"),
    ({"lr": math.nan}, "INV-TRAIN-007"), ({"lr": math.inf}, "INV-TRAIN-007"),
    ({"tokens_per_sec": math.inf}, "INV-TRAIN-008"), ({"wall_ms": math.inf}, "INV-TRAIN-008"),
    ({"lr": -1e-9}, "INV-TRAIN-008"), ({"tokens_per_sec": -1.0}, "INV-TRAIN-008"),
    ({"loss": 0.0}, "INV-TRAIN-008"), ({"loss": -1.0}, "INV-TRAIN-008"), ({"grad_norm": -1.0}, "INV-TRAIN-008"),
    ({"tokens_per_sec": math.nan}, "INV-TRAIN-008"), ({"wall_ms": -1.0}, "INV-TRAIN-008"),
    ({"loss": 1.0, "grad_norm": 1.0}, "INV-TRAIN-011")])
def test_step_trips(change, gate):
    for history in ([], [3.0] * 40):
        verdict = judge_step(**GOOD | change, history=history)
        assert verdict.tripped and verdict.gate == gate


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@given(field=st.sampled_from(sorted(GOOD)), history=st.lists(st.floats(0.1, 20), max_size=40),
       others=st.floats(0.01, 10))
@EXAMPLES
def test_no_non_finite_number_yields_permission(value, field, history, others):
    assert judge_step(**{**dict.fromkeys(GOOD, others), field: value}, history=history).tripped
    assert judge_val(value, others, 1000, others).tripped and judge_initial(value, 1000, True).tripped
    assert judge_init(value, 1000).tripped


@pytest.mark.parametrize(("loss", "fresh", "trips"), [
    (LN_V, True, False), (LN_V - 0.4, True, False), (LN_V + 0.9, True, False), (LN_V + 1.1, True, True),
    (LN_V - 0.6, True, True), (0.0, False, True), (LN_V + 5, False, False), (2.0, False, False)])
def test_initial(loss, fresh, trips):
    assert judge_initial(loss, 1000, fresh).tripped is trips


@pytest.mark.parametrize(("share", "trips"), [(0.0, False), (0.69, False), (0.7, False), (0.701, True), (1.0, True),
                                              (1 / math.log(2), True)])
def test_given_weights_beat_most_of_ln_v(share, trips):
    """The last share is log2 V, upstream's yardstick: it is far above ln V and passes garbage."""
    assert judge_init(share * LN_V, 1000).tripped is trips


@pytest.mark.parametrize(("loss", "previous", "recent", "gate"), [
    (3.0, 3.5, 3.2, ""), (3.0, None, None, ""), (6.9, 3.5, 3.2, ""), (7.1, 3.5, 3.2, "INV-TRAIN-005"),
    (7.0, 3.5, 3.2, ""), (0.23, 3.0, 1.20, "EVAL-METHODOLOGY-002"), (0.25, 3.0, 1.20, ""), (LN_V + 0.9, None, None, ""),
    (LN_V + 1.1, None, None, "INV-TRAIN-005"),
    (0.0, 3.0, 3.0, "EVAL-METHODOLOGY-001"), (0.0008, 3.0, 1.20, "EVAL-METHODOLOGY-002"), (0.5, 3.0, 1.20, "")])
def test_val(loss, previous, recent, gate):
    """The last but one row is upstream's evaluation bug: val 0.0008 beside train 1.20."""
    assert judge_val(loss, previous, 1000, recent).gate == gate
