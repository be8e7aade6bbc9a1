"""The attention kernels, all families: every head size of the presets, grouped heads, tails, the mask."""

from dataclasses import replace

import naive
import numpy as np
import pytest
from harness import TENSOR_CORES, Arrays, f64, gate, same_bits
from models import FAMILIES

from apr import driver
from apr.errors import UnavailableError
from apr.ops.attention import attention_backward, attention_forward
from apr.reference import attention as reference

# B, T, NH, NKV, HS: T = 1, tails of every tile, several tiles; G = 1, 2, 4, 7
BOTH = [(1, 1, 4, 2, 64), (2, 17, 4, 1, 32), (1, 127, 14, 2, 64), (1, 129, 3, 3, 80), (2, 65, 4, 2, 96),
        (1, 200, 4, 1, 128), (3, 257, 2, 1, 32)]
# The fast path of Hopper. G = 9: no cluster is that large; 40 and 34 sequences: more work than blocks, and no clusters
SM90 = [(1, 1, 4, 2, 64), (2, 17, 4, 1, 64), (1, 127, 14, 2, 64), (1, 193, 3, 3, 64), (3, 257, 2, 1, 64),
        (1, 65, 9, 1, 64), (40, 129, 4, 2, 64), (2, 64, 2, 2, 128), (1, 385, 4, 1, 128), (34, 130, 4, 2, 128)]
KINDS = ["f32", "bf16", "sm90"]
if any(gpu.capability != (9, 0) for gpu in driver.probe().devices):
    KINDS.remove("sm90")
CASES = [(kind, case) for kind in KINDS for case in (SM90 if kind == "sm90" else BOTH)]
CASES += [("f32", (2, 33, 4, 2, 8)), ("f32", (1, 1, 2, 2, 6))]
NAMES = [f"{kind}-{'x'.join(map(str, case))}" for kind, case in CASES]


@pytest.fixture(autouse=True)
def _path(dev):
    """A case sets the path of its kind."""
    before = dev.fast
    yield
    dev.fast = before


class Case:
    """q, k, v and dout as stored, (B, T, heads, HS); `kind` f32, bf16 (the general path) or sm90 (the fast one)."""

    def __init__(self, dev, kind, case, seed=5, size=1.5):
        dev.fast = frozenset({"attention"} if kind == "sm90" else ())
        rng, self.arrays = np.random.default_rng(seed), Arrays(dev, "f32" if kind == "f32" else "bf16")
        self.b, self.t, self.nh, self.nkv, self.hs = case
        self.q, self.k, self.v = (self.arrays.round(rng.standard_normal((self.b, self.t, n, self.hs)) * s)
                                  for n, s in ((self.nh, size), (self.nkv, 1), (self.nkv, 1)))
        self.dout = self.arrays.round(rng.standard_normal(self.q.shape))
        self.config = replace(FAMILIES["llama"], num_attention_heads=self.nh, num_key_value_heads=self.nkv,
                              head_dim=self.hs, max_position_embeddings=4096)
        self.scale = self.hs ** -0.5

    def forward(self):
        """out (B*T, NH*HS) and lse (B, NH, T) on the GPU, and the qkv that they are of."""
        a, n = self.arrays, self.b * self.t
        qkv = a.read(np.concatenate([x.reshape(n, -1) for x in (self.q, self.k, self.v)], axis=1))
        out, lse = a.out(n, self.nh * self.hs), a.out(self.b, self.nh, self.t, dtype="f32")
        attention_forward(a.dev, out, lse, qkv, self.b, self.t, self.config, scale=self.scale)
        return out, lse, qkv

    def backward(self):
        """dqkv (B*T, QKV) on the GPU."""
        a, (out, lse, qkv) = self.arrays, self.forward()
        dqkv, delta = a.out(*qkv.shape), a.out(self.b, self.nh, self.t, dtype="f32")
        attention_backward(a.dev, dqkv, delta, a.read(self.dout.reshape(out.shape)), qkv, out, lse, self.b, self.t,
                           self.config, scale=self.scale)
        a.get(delta)
        return dqkv

    def truth(self):
        """out, lse, dq, dk, dv of the reference in float64."""
        q, k, v, dout = f64(self.q, self.k, self.v, self.dout)
        out, prob = reference.attention_forward(q, k, v, self.scale)
        score = np.einsum("bihd,bjhd->bhij", q, np.repeat(k, self.nh // self.nkv, axis=2)) * self.scale
        score = np.where(np.tri(self.t, dtype=bool), score, -np.inf)
        lse = np.logaddexp.reduce(score, axis=-1)
        return out, lse, *reference.attention_backward(dout, q, k, v, prob, self.scale)


@pytest.mark.parametrize(("kind", "shape"), CASES, ids=NAMES)
def test_attention_forward_matches_reference(dev, kind, shape):
    case = Case(dev, kind, shape)
    out, lse, _ = case.forward()
    truth, truth_lse, *_ = case.truth()
    flat = truth.reshape(out.shape)
    case.arrays.judge("out", out, flat, gate("attention"), lambda: naive.attention_forward(
        case.q, case.k, case.v, case.scale)[0].reshape(out.shape))
    case.arrays.judge("lse", lse, truth_lse, gate("attention") if kind == "f32" else TENSOR_CORES)
    case.arrays.check()


@pytest.mark.parametrize(("kind", "shape"), CASES, ids=NAMES)
def test_attention_backward_matches_reference(dev, kind, shape):
    case = Case(dev, kind, shape)
    dqkv, (_, _, *gradients) = case.backward(), case.truth()
    truth = np.concatenate([d.reshape(len(dqkv), -1) for d in gradients], axis=1)

    def rival():
        prob = naive.attention_forward(case.q, case.k, case.v, case.scale)[1]
        rivals = naive.attention_backward(case.dout, case.q, case.k, case.v, prob, case.scale)
        return np.concatenate([d.reshape(len(dqkv), -1) for d in rivals], axis=1)

    edges = np.cumsum([0, case.nh, case.nkv, case.nkv]) * case.hs
    for name, begin, end in zip(("dq", "dk", "dv"), edges, edges[1:], strict=False):
        case.arrays.judge(name, dqkv, truth, gate("attention"), rival, (slice(None), slice(begin, end)))
    case.arrays.check()


@pytest.mark.parametrize("kind", KINDS)
def test_attention_gives_the_same_bits_twice(dev, kind):
    def run():
        case = Case(dev, kind, (2, 129, 4, 2, 64))
        return {"dqkv": case.arrays.bits(case.backward())}
    same_bits(run)


@pytest.mark.parametrize("changed", [0, 31, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_causal_to_the_bit(dev, kind, changed):
    shape = (1, 129, 4, 2, 64)
    case = Case(dev, kind, shape)
    before = case.arrays.bits(case.forward()[0]).reshape(129, -1)
    for x in (case.q, case.k, case.v):
        x[:, changed] = 1e3 * x[:, changed] + 7
    after = case.arrays.bits(case.forward()[0]).reshape(129, -1)
    assert (after[:changed] == before[:changed]).all(), "an earlier token saw a later one"
    assert (after[changed] != before[changed]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_equal_scores_is_the_mean_of_the_values(dev, kind):
    case = Case(dev, kind, (2, 129, 4, 2, 64))
    case.q[:] = 0
    out, lse, _ = case.forward()
    mean = np.cumsum(f64(case.v)[0], axis=1) / np.arange(1, 130)[:, None, None]
    truth = np.repeat(mean, 2, axis=2).reshape(out.shape)
    case.arrays.judge("out", out, truth, gate("attention"), lambda: naive.attention_forward(
        case.q, case.k, case.v, case.scale)[0].reshape(out.shape))
    expected = np.broadcast_to(np.log(np.arange(1, 130)), lse.shape)
    assert np.abs(case.arrays.get(lse) - expected).max() <= 2e-6  # log 129 is 4.9: five ulp of float32


@pytest.mark.parametrize("kind", KINDS)
def test_attention_at_huge_scores_picks_one_value(dev, kind):
    case = Case(dev, kind, (1, 129, 4, 2, 64), size=1e4)
    out = case.arrays.get(case.forward()[0]).reshape(129, 4, 64)
    keys, values = (np.repeat(x[0], 2, axis=1) for x in f64(case.k, case.v))
    score = np.einsum("ihd,jhd->hij", f64(case.q)[0][0], keys) * case.scale
    score = np.where(np.tri(129, dtype=bool), score, -np.inf)
    sharp = np.sort(score, axis=-1)
    clear = (sharp[..., -1] - sharp[..., -2] > 200).T  # exp(-200) is nothing, whatever the rounding
    assert clear.mean() > 0.8
    best = values[score.argmax(axis=-1).T, np.arange(4)]
    assert (out[clear] == best[clear]).all()


@pytest.mark.parametrize("hs", [8, 48, 112, 256])
def test_attention_refuses_a_head_size_that_it_does_not_have(dev, hs):
    case = Case(dev, "bf16", (1, 4, 2, 1, hs))
    with pytest.raises(UnavailableError, match="--precision fp32, or --device cpu"):
        case.forward()
