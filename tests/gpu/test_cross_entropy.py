"""The cross-entropy kernels: ignored targets, garbage in the padded columns, huge and equal scores, and the sum."""

import numpy as np
import pytest
from harness import Arrays, f64, gate, rounded, same_bits

from apr.config import IGNORE
from apr.ops.cross_entropy import cross_entropy_forward, cross_entropy_forward_backward, cross_entropy_sum
from apr.reference.cross_entropy import cross_entropy_forward_backward as reference

# N, V, padded V: one row; V odd, prime, a multiple of nothing, without padding; GPT-2's vocabulary
CASES = [(1, 97, 128), (17, 37, 128), (127, 123, 128), (129, 128, 128), (70, 1000, 1024), (33, 50257, 50304)]
DLOSS = 0.037
GARBAGE = 1e30  # in the padded columns: a maximum or a sum over them would drown everything


def some(arrays, rng, case, size=3.0):
    """Scores with their padding, and targets: ignored ones, the first and the last id among them."""
    n, v, vp = case
    logits = arrays.round(np.full((n, vp), GARBAGE, np.float32))
    logits[:, :v] = arrays.round(size * rng.standard_normal((n, v)))
    targets = rng.integers(0, v, n).astype(np.int32)
    targets[:4] = [v - 1, IGNORE, 0, IGNORE][:len(targets[:4])]
    return logits, targets


def expected(logits, targets, v):
    """Losses and gradient in float64."""
    scores = logits[:, :v].astype(np.float64)
    losses = reference(scores, targets, DLOSS)
    return losses, scores


@pytest.mark.parametrize("case", CASES)
def test_cross_entropy_forward_matches_reference(arrays, rng, case):
    logits, targets = some(arrays, rng, case)
    losses = arrays.out(case[0], dtype="f32")
    cross_entropy_forward(arrays.dev, losses, arrays.read(logits), arrays.read(targets, "i32"), case[1])
    arrays.judge("losses", losses, expected(logits, targets, case[1])[0], gate("cross_entropy"))
    assert (arrays.get(losses)[targets == IGNORE] == 0).all()


def backward(arrays, rng, case, size=3.0):
    """losses, what replaced the scores; the scores and targets."""
    logits, targets = some(arrays, rng, case, size)
    losses, buffer = arrays.out(case[0], dtype="f32"), arrays.update(logits)
    cross_entropy_forward_backward(arrays.dev, losses, buffer, arrays.read(targets, "i32"),
                                   arrays.read(np.array([DLOSS]), "f64"), case[1])
    return losses, buffer, logits, targets


@pytest.mark.parametrize("case", CASES)
def test_cross_entropy_backward_matches_reference(arrays, rng, case):
    v = case[1]
    losses, dlogits, logits, targets = backward(arrays, rng, case)
    truth_losses, truth = expected(logits, targets, v)

    def naive():
        scores = logits[:, :v].copy()
        reference(scores, targets, DLOSS)
        return np.pad(rounded(scores), ((0, 0), (0, case[2] - v)))

    arrays.judge("losses", losses, truth_losses, gate("cross_entropy"))
    arrays.judge("dlogits", dlogits, np.pad(truth, ((0, 0), (0, case[2] - v))), gate("cross_entropy"), naive)
    assert not arrays.get(dlogits)[:, v:].any(), "the padding of the gradient must be 0"
    assert not arrays.get(dlogits)[targets == IGNORE].any(), "an ignored target has no gradient"


def test_cross_entropy_at_huge_logits(arrays, rng):
    losses, dlogits, logits, targets = backward(arrays, rng, (17, 97, 128), size=1e4)
    truth_losses, truth = expected(logits, targets, 97)
    arrays.judge("losses", losses, truth_losses, gate("cross_entropy"))
    assert np.abs(arrays.get(dlogits)[:, :97] - truth).max() <= 4e-3 * DLOSS  # bf16 rounds DLOSS itself by up to 2e-3
    assert np.isfinite(arrays.get(losses)).all()


@pytest.mark.parametrize("level", [0.0, -1e4, 1e4])
def test_cross_entropy_of_equal_logits_is_ln_v(arrays, level):
    for v, vp in ((97, 128), (50257, 50304)):
        losses = arrays.out(3, dtype="f32")
        logits = np.full((3, vp), GARBAGE, np.float32)
        logits[:, :v] = level
        cross_entropy_forward(arrays.dev, losses, arrays.read(logits), arrays.read(np.array([0, 5, v - 1]), "i32"), v)
        assert np.abs(arrays.get(losses) - np.log(v)).max() <= 2e-6  # ln 50257 is 10.8: two ulp of float32


@pytest.mark.parametrize("target", [-1, 97, 127, 128, 2**31 - 1])
def test_cross_entropy_of_an_unknown_target_is_nan(arrays, rng, target):
    """Ids are checked on the host; should one slip through, the guard of the step sees it and nothing is applied."""
    losses = arrays.out(2, dtype="f32")
    cross_entropy_forward(arrays.dev, losses, arrays.read(rng.standard_normal((2, 128))),
                          arrays.read(np.array([target, 3]), "i32"), 97)
    assert np.isnan(arrays.get(losses)[0]) and np.isfinite(arrays.get(losses)[1])


@pytest.mark.parametrize("n", [1, 17, 1024, 5000])
def test_cross_entropy_sum_matches_reference(arrays, rng, n):
    losses, total = rng.random(n).astype(np.float32) * 11, arrays.update(np.array([3.5]), "f64")
    cross_entropy_sum(arrays.dev, total, arrays.read(losses, "f32"), 97, 128, arrays.storage)
    arrays.judge("total", total, np.array([3.5 + losses.astype(np.float64).sum()]), 1e-13)  # sums in float64


@pytest.mark.parametrize("storage", ["f32", "bf16"])
def test_cross_entropy_gives_the_same_bits_twice(dev, storage):
    def run():
        arrays = Arrays(dev, storage)
        losses, dlogits, *_ = backward(arrays, np.random.default_rng(1), (33, 50257, 50304))
        return {"losses": arrays.bits(losses), "dlogits": arrays.bits(dlogits)}
    same_bits(run)


def test_cross_entropy_rows_do_not_touch_each_other(f32, rng):
    """Each row alone gives the bits that it gives among others."""
    together, _, logits, targets = backward(f32, rng, (17, 97, 128))
    for n in (0, 5, 16):
        alone = f32.out(1, dtype="f32")
        cross_entropy_forward(f32.dev, alone, f32.read(logits[n:n + 1]), f32.read(targets[n:n + 1], "i32"), 97)
        assert f32.get(alone)[0] == f32.get(together)[n]
    assert f64(f32.get(together))[0].sum() > 0
