"""The reference's causal grouped-query attention: gradients, mask, head map, and the cases with a known answer."""

import numpy as np
import pytest
from compare import assert_close, finite_difference_error

from apr.reference.attention import attention_backward, attention_forward

FINITE_DIFFERENCE = 1e-7  # the project's gate; measured worst 8e-10
FLOAT32 = 2e-6  # relative L2 of float32: two products around a softmax; measured worst 4e-7
EXACT = 1e-12  # float64, the same mathematics in another order
SHAPES = [(1, 1, 1, 1, 2), (2, 5, 2, 2, 4), (2, 7, 4, 2, 6), (1, 17, 6, 2, 8), (3, 4, 3, 1, 4)]  # B, T, NH, NKV, HS


def some(rng, b, t, nh, nkv, hs, size=1.0):
    """q, k, v, dout and the scale; `size` makes the scores larger."""
    q, k, v = (rng.standard_normal((b, t, n, hs)) for n in (nh, nkv, nkv))
    return size * q, k, v, rng.standard_normal(q.shape), hs**-0.5


def naive(q, k, v, scale):
    """The definition, one query at a time: head h reads key/value head h // G, query i sees keys up to i."""
    out, group = np.empty_like(q), q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(q.shape[:3]):
        score = scale * k[b, :i + 1, h // group] @ q[b, i, h]
        prob = np.exp(score - score.max())
        out[b, i, h] = prob / prob.sum() @ v[b, :i + 1, h // group]
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 6.0])
def test_attention_backward_matches_finite_differences(rng, shape, size):
    q, k, v, dout, scale = some(rng, *shape, size)
    prob = attention_forward(q, k, v, scale)[1]
    gradients = attention_backward(dout, q, k, v, prob, scale)
    def loss():
        return float((attention_forward(q, k, v, scale)[0] * dout).sum())
    for name, array, gradient in zip("qkv", (q, k, v), gradients, strict=True):
        if shape[1] == 1 and name != "v":  # one key takes all the weight, whatever its score
            assert not gradient.any()
        else:
            assert finite_difference_error(loss, array, gradient, rng, h=1e-5) <= FINITE_DIFFERENCE, name


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_matches_its_definition(rng, shape):
    q, k, v, _, scale = some(rng, *shape, 3.0)
    assert_close(attention_forward(q, k, v, scale)[0], naive(q, k, v, scale), EXACT, "out")


@pytest.mark.parametrize("shape", [(1, 17, 6, 2, 8), (2, 129, 4, 2, 64)])
def test_attention_float32_matches_float64(rng, shape):
    *arrays, scale = some(rng, *shape)
    results = []
    for kind in (np.float32, np.float64):
        q, k, v, dout = (a.astype(kind) for a in arrays)
        out, prob = attention_forward(q, k, v, scale)
        results.append([out, *attention_backward(dout, q, k, v, prob, scale)])
    for ours, truth, name in zip(*results, ("out", "dq", "dk", "dv"), strict=True):
        assert ours.dtype == np.float32
        assert_close(ours, truth, FLOAT32, name)


def test_attention_probabilities_sum_to_one_and_never_look_ahead(rng):
    q, k, v, _, scale = some(rng, 2, 7, 4, 2, 6, 5.0)
    prob = attention_forward(q, k, v, scale)[1].reshape(2, 4, 7, 7)
    assert_close(prob.sum(axis=-1), np.ones((2, 4, 7)), EXACT, "row sums")
    ahead = np.triu(np.ones((7, 7), bool), k=1)
    assert not prob[..., ahead].any()
    assert (prob[..., ~ahead] > 0).all(), "every key up to the query itself is seen"


@pytest.mark.parametrize(("nh", "nkv"), [(4, 4), (4, 2), (4, 1)])
def test_attention_of_equal_scores_is_the_mean_of_the_values(rng, nh, nkv):
    _, k, v, _, scale = some(rng, 2, 9, nh, nkv, 4)
    out = attention_forward(np.zeros((2, 9, nh, 4)), k, v, scale)[0]
    mean = np.cumsum(v, axis=1) / np.arange(1, 10)[:, None, None]
    assert_close(out, np.repeat(mean, nh // nkv, axis=2), EXACT, "out")


def test_attention_at_huge_scores_picks_one_value(rng):
    q, k, v, _, scale = some(rng, 1, 5, 2, 2, 4, 1e6)
    out, prob = attention_forward(q, k, v, scale)
    assert set(np.unique(prob)) == {0.0, 1.0}
    best = np.where(np.tri(5, dtype=bool), np.einsum("tnh,snh->nts", q[0], k[0]), -np.inf).argmax(axis=-1)
    assert (out[0].transpose(1, 0, 2) == v[0].transpose(1, 0, 2)[np.arange(2)[:, None], best]).all()


@pytest.mark.parametrize("changed", [0, 3, 6])
def test_attention_is_causal_to_the_bit(rng, changed):
    q, k, v, _, scale = some(rng, 2, 7, 4, 2, 6)
    before = attention_forward(q, k, v, scale)[0]
    for array in (q, k, v):
        array[:, changed] = 1e3 * rng.standard_normal(array[:, changed].shape)
    after = attention_forward(q, k, v, scale)[0]
    assert (after[:, :changed] == before[:, :changed]).all()
    assert not np.isclose(after[:, changed], before[:, changed]).all()


def test_grouped_queries_equal_full_heads_with_repeated_keys_and_values(rng):
    q, k, v, dout, scale = some(rng, 2, 7, 6, 2, 4)
    full = [np.repeat(a, 3, axis=2) for a in (k, v)]
    grouped, prob = attention_forward(q, k, v, scale)
    repeated, prob_full = attention_forward(q, *full, scale)
    assert_close(grouped, repeated, EXACT, "out")
    ours, truth = attention_backward(dout, q, k, v, prob, scale), attention_backward(dout, q, *full, prob_full, scale)
    assert_close(ours[0], truth[0], EXACT, "dq")
    for name, d, wide in zip(("dk", "dv"), ours[1:], truth[1:], strict=True):
        assert_close(d, wide.reshape(2, 7, 2, 3, 4).sum(axis=3), EXACT, f"{name}, summed over the queries of its group")


def test_attention_of_the_last_queries_equals_the_end_of_all(rng):
    """T queries over S > T keys, as in decoding: the last query sees every key."""
    q, k, v, _, scale = some(rng, 2, 9, 4, 2, 6)
    whole = attention_forward(q, k, v, scale)[0]
    for t in (1, 4):
        assert_close(attention_forward(q[:, -t:], k, v, scale)[0], whole[:, -t:], EXACT, f"the last {t}")


def test_attention_treats_sequences_alone(rng):
    q, k, v, dout, scale = some(rng, 4, 5, 4, 2, 6)
    order = rng.permutation(4)
    out, prob = attention_forward(q, k, v, scale)
    moved, moved_prob = attention_forward(q[order], k[order], v[order], scale)
    assert_close(moved, out[order], EXACT, "out")
    gradients = attention_backward(dout, q, k, v, prob, scale)
    moved = attention_backward(dout[order], q[order], k[order], v[order], moved_prob, scale)
    for ours, truth in zip(moved, gradients, strict=True):
        assert_close(ours, truth[order], EXACT, "a gradient")
