"""The reference's cross-entropy and its gradient: ignored targets, huge logits, known losses, refused ids."""

import math

import numpy as np
import pytest
from compare import assert_close, finite_difference_error

from apr.config import IGNORE
from apr.errors import ShapeError
from apr.reference.cross_entropy import ROWS, cross_entropy_forward_backward

FINITE_DIFFERENCE = 1e-7  # the project's gate; measured worst 2e-8
FLOAT32 = 1e-6  # relative L2 of float32: softmax; measured worst 5e-8
EXACT = 1e-12  # float64, the same mathematics in another order
SHAPES = [(1, 1), (1, 2), (5, 7), (ROWS - 1, 33), (ROWS, 5), (2 * ROWS + 1, 11)]  # N, V: around the blocks of rows


def some(rng, rows, vocab, size=1.0):
    """logits, and targets: some ignored, but neither the first row (whose target is the least likely) nor the last."""
    logits, targets = size * rng.standard_normal((rows, vocab)), rng.integers(0, vocab, rows)
    targets[0] = logits[0].argmin()
    targets[1:-1:3] = IGNORE
    return logits, targets


def backward(logits, targets, dloss=1.0):
    """losses, dlogits; the logits given stay as they are."""
    dlogits = logits.copy()
    return cross_entropy_forward_backward(dlogits, targets, dloss), dlogits


@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_cross_entropy_gradient_matches_finite_differences(rng, rows, vocab, size):
    logits, targets = some(rng, rows, vocab, size)
    dlogits = backward(logits, targets, 0.37)[1]
    def loss():
        return 0.37 * float(cross_entropy_forward_backward(logits, targets, None).sum())
    if vocab == 1:
        assert not dlogits.any(), "one choice is certain"
    else:
        assert finite_difference_error(loss, logits, dlogits, rng, h=1e-5) <= FINITE_DIFFERENCE


@pytest.mark.parametrize("size", [1.0, 8.0])
def test_cross_entropy_float32_matches_float64(rng, size):
    logits, targets = some(rng, 130, 997, size)
    logits = logits.astype(np.float32)
    for ours, truth in zip(backward(logits, targets), backward(logits.astype(np.float64), targets), strict=True):
        assert ours.dtype == np.float32
        assert_close(ours, truth, FLOAT32, "loss or gradient")


@pytest.mark.parametrize("vocab", [1, 2, 300, 50257, 151936])
@pytest.mark.parametrize("level", [0.0, -7.0, 1e4])
def test_cross_entropy_of_equal_logits_is_ln_v(vocab, level):
    with np.errstate(over="ignore"):  # an overflow must show in the loss
        losses = cross_entropy_forward_backward(np.full((2, vocab), level, np.float32), np.array([0, vocab - 1]), None)
    assert np.abs(losses - math.log(vocab)).max() <= 1e-6 * max(1.0, math.log(vocab))


def test_cross_entropy_of_a_sure_right_answer_is_zero_and_of_a_wrong_one_its_margin():
    logits = np.array([[100.0, 0.0, 0.0], [100.0, 0.0, 0.0], [1e4, -1e4, -1e4]])
    losses = cross_entropy_forward_backward(logits, np.array([0, 1, 1]), None)
    assert losses[0] == 0
    assert losses[1:].tolist() == [100, 2e4]


@pytest.mark.parametrize("shift", [-50.0, 3.0, 1e3])
def test_cross_entropy_ignores_a_shift_of_all_logits(rng, shift):
    logits, targets = some(rng, 5, 7)
    for ours, truth in zip(backward(logits + shift, targets), backward(logits, targets), strict=True):
        assert_close(ours, truth, EXACT, "loss or gradient")


def test_cross_entropy_gradient_rows_sum_to_zero(rng):
    """The softmax sums to 1 and the target takes 1 away."""
    logits, targets = some(rng, 70, 33)
    dlogits = backward(logits, targets)[1]
    assert np.abs(dlogits.sum(axis=-1)).max() <= EXACT
    assert ((dlogits < 0).sum(axis=-1) == (targets != IGNORE)).all(), "only the target's score should rise"


def test_cross_entropy_of_ignored_rows_is_nothing(rng):
    logits, targets = some(rng, 2 * ROWS + 1, 7, 3.0)
    ignored = targets == IGNORE
    losses, dlogits = backward(logits, targets)
    assert ignored.sum() > ROWS // 2
    assert not losses[ignored].any()
    assert not dlogits[ignored].any()
    assert (losses[~ignored] > 0).all()
    alone = backward(logits[~ignored], targets[~ignored])
    assert_close(losses[~ignored], alone[0], EXACT, "losses of the others")
    assert_close(dlogits[~ignored], alone[1], EXACT, "gradients of the others")
    assert not any(a.any() for a in backward(logits, np.full(len(targets), IGNORE)))


def test_cross_entropy_without_dloss_leaves_the_logits_alone(rng):
    logits, targets = some(rng, 70, 7)
    kept = logits.copy()
    losses = cross_entropy_forward_backward(logits, targets, None)
    assert (logits == kept).all()
    assert (losses == backward(logits, targets)[0]).all(), "training and evaluation see the same loss"


def test_cross_entropy_halves_of_a_batch_add_up(rng):
    logits, targets = some(rng, 90, 7)
    losses, dlogits = backward(logits, targets, 1 / 90)
    parts = [backward(logits[half], targets[half], 1 / 90) for half in (slice(0, 37), slice(37, 90))]
    assert_close(np.concatenate([p[0] for p in parts]), losses, EXACT, "losses")
    assert_close(np.concatenate([p[1] for p in parts]), dlogits, EXACT, "dlogits")


@pytest.mark.parametrize("bad", [7, 10**6, -1, -99, -101])
def test_cross_entropy_refuses_targets_out_of_range(rng, bad):
    logits, targets = some(rng, 5, 7)
    targets[3] = bad
    kept = logits.copy()
    with pytest.raises(ShapeError, match=rf"ids in \[0, 7\) or {IGNORE}, found {bad};"):
        cross_entropy_forward_backward(logits, targets, 1.0)
    assert (logits == kept).all(), "refused before anything was written"
