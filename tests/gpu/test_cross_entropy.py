"""The cross-entropy kernels: ignored targets, garbage in the padded columns, huge and equal scores, and the sum.

Every test runs twice: with the kernels that this GPU takes (`own`), which on Hopper are the fast ones, and with the
general ones.
"""

import os

import numpy as np
import pytest
from harness import Arrays, f64, gate, rounded, same_bits

from apr.config import IGNORE
from apr.ops.cross_entropy import (
    FAST_FORWARD,
    FORWARD,
    cross_entropy_forward,
    cross_entropy_forward_backward,
    cross_entropy_sum,
    variants,
)
from apr.reference.cross_entropy import cross_entropy_forward_backward as reference

# N, V, padded V: one row; V odd, prime, a multiple of nothing, without padding; GPT-2's vocabulary; then rows that a
# cluster of 1, 2, 4 and 8 blocks shares on Hopper, whatever the type, and one that its shared memory cannot hold in f32
CASES = [(1, 97, 128), (17, 37, 128), (127, 123, 128), (129, 128, 128), (70, 1000, 1024), (33, 50257, 50304),
         (40, 512, 512), (9, 20001, 20096), (5, 38911, 39040), (3, 151936, 151936), (4, 151643, 151680),
         (2, 250002, 250112)]
DLOSS = 0.037
GARBAGE = 1e30  # in the padded columns: a maximum or a sum over them would drown everything


@pytest.fixture(params=["own", "general"], autouse=True)
def path(request, dev, monkeypatch):
    """Which kernels the test launches."""
    if request.param == "general":
        monkeypatch.setattr(dev, "fast", frozenset())
    return request.param


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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", [(6, 97, 128), (6, 50257, 50304)])
def test_cross_entropy_of_a_row_that_is_not_finite_is_not_a_number_and_stays_in_its_row(arrays, rng, case, bad):
    """One score that is not a number, or is infinite; scores of -inf alone are no probability, one of them is 0."""
    n, v, vp = case
    logits = arrays.round(np.full((n, vp), GARBAGE, np.float32))
    logits[:, :v] = arrays.round(rng.standard_normal((n, v)))
    targets = np.array([1, 2, IGNORE, 4, 5, v - 1], np.int32)
    logits[1, v // 2], logits[2, :v], logits[4, :v] = bad, bad, -np.inf
    losses, buffer = arrays.out(n, dtype="f32"), arrays.update(logits)
    cross_entropy_forward_backward(arrays.dev, losses, buffer, arrays.read(targets, "i32"),
                                   arrays.read(np.array([DLOSS]), "f64"), v)
    loss, gradient = arrays.get(losses), arrays.get(buffer)[:, :v]
    finite = [0, 3, 5] + ([1] if bad == -np.inf else [])
    assert np.isfinite(loss[finite]).all() and np.isfinite(gradient[finite]).all()
    assert loss[2] == 0 and not gradient[2].any(), "an ignored row is not looked at"
    assert not np.isfinite(loss[4])
    if bad != -np.inf:
        assert np.isnan(loss[1]) and np.isnan(gradient[1]).any()
    with np.errstate(invalid="ignore"):
        truth_losses, truth = expected(logits[finite], targets[finite], v)
    assert np.abs(loss[finite] - truth_losses).max() <= 1e-5
    assert np.abs(gradient[finite] - truth).max() <= 4e-3 * DLOSS


def test_cross_entropy_takes_the_path_that_it_should(dev, path):
    """On Hopper the fast one, in shared memory; where a row does not fit, and elsewhere, the general one."""
    spec, baked = variants(151936, 151936, "bf16", dev.fast)[0]
    fast = path == "own" and dev.cache.arch == "sm_90a" and "cross_entropy" not in os.environ.get("APR_GENERAL", "")
    assert (spec, baked.get("CLUSTER")) == ((FAST_FORWARD, 8) if fast else (FORWARD, None))
    assert variants(250002, 250112, "f32", dev.fast)[0][0] is FORWARD


def test_cross_entropy_rows_do_not_touch_each_other(f32, rng):
    """Each row alone gives the bits that it gives among others."""
    together, _, logits, targets = backward(f32, rng, (17, 97, 128))
    for n in (0, 5, 16):
        alone = f32.out(1, dtype="f32")
        cross_entropy_forward(f32.dev, alone, f32.read(logits[n:n + 1]), f32.read(targets[n:n + 1], "i32"), 97)
        assert f32.get(alone)[0] == f32.get(together)[n]
    assert f64(f32.get(together))[0].sum() > 0
