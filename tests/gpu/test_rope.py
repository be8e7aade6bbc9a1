"""The rotation kernels: tables at far positions, Llama 3's scaling, grouped heads, and Qwen3's norm of each head."""

from dataclasses import replace

import numpy as np
import pytest
from harness import Arrays, f64, gate, rounded, same_bits
from models import FAMILIES

from apr.buffers import PARTS
from apr.config import RopeScaling
from apr.ops.rope import HeadNorm, rope_backward, rope_forward, rope_table
from apr.reference.rmsnorm import rmsnorm_backward, rmsnorm_forward
from apr.reference.rope import rope_backward as turn_back
from apr.reference.rope import rope_forward as turn
from apr.reference.rope import rope_tables

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
# B, T, NH, NKV, HS: one token; an odd HS/2; no power of two; each head size of the presets
CASES = [(1, 1, 4, 2, 8), (3, 17, 4, 1, 32), (2, 127, 14, 2, 64), (1, 129, 3, 3, 80), (5, 7, 4, 2, 6),
         (1, 33, 3, 1, 96), (2, 65, 4, 2, 128)]
FAR = 131072  # positions of a table


def config_of(case, norm, theta=1e6, scaling=None):
    """A model with these heads, with or without Qwen3's norms."""
    return replace(FAMILIES["qwen3" if norm else "llama"], num_attention_heads=case[2], num_key_value_heads=case[3],
                   head_dim=case[4], rope_theta=theta, rope_scaling=scaling, rms_norm_eps=1e-6,
                   max_position_embeddings=FAR)


@pytest.mark.parametrize(("hs", "theta", "scaling"), [(64, 1e6, None), (128, 5e5, LLAMA3), (6, 1e4, None),
                                                       (80, 1e4, LLAMA3)])
def test_rope_table_matches_reference(f32, hs, theta, scaling):
    """To the rounding of a float32 of size 1, at every position: an angle in float32 would lose four digits."""
    config = config_of((1, 1, 2, 1, hs), False, theta, scaling)
    tables = f32.out(FAR, hs // 2), f32.out(FAR, hs // 2)
    rope_table(f32.dev, *tables, config, "f32")
    truth = rope_tables(np.arange(FAR), hs, theta, scaling, np.dtype(np.float64))
    for name, table, expected in zip(("cos", "sin"), tables, truth, strict=True):
        error = np.abs(f32.get(table) - expected[:, 0])
        assert error.max() <= 2**-24, f"{name}: {error.max()} at {np.unravel_index(error.argmax(), error.shape)}"


class Heads:
    """Inputs of a case: x (B, T, all heads, HS) and dout, weights, tables in float64 and float32."""

    def __init__(self, arrays, rng, case):
        self.b, self.t, self.nh, self.nkv, self.hs = case
        self.turned, self.all = self.nh + self.nkv, self.nh + 2 * self.nkv
        shape = (self.b, self.t, self.all, self.hs)
        self.x = arrays.round(0.02 * rng.standard_normal(shape))  # small, so that eps shows
        self.dout = arrays.round(rng.standard_normal(shape))
        self.weights = [arrays.round(1 + 0.3 * rng.standard_normal(self.hs)) for _ in "qk"]
        self.exact = rope_tables(np.arange(self.t), self.hs, 1e6, None, np.dtype(np.float64))
        self.single = tuple(x.astype(np.float32) for x in self.exact)

    def on_gpu(self, arrays, x):
        """As the kernels take it: (N, QKV)."""
        return x.reshape(self.b * self.t, self.all * self.hs)

    def tables(self, arrays):
        """cos and sin on the GPU."""
        return tuple(arrays.read(x[:, 0], "f32") for x in self.single)

    def parts(self):
        """(heads, which weight) of queries and of keys."""
        return (slice(0, self.nh), 0), (slice(self.nh, self.turned), 1)

    def forward(self, x, weights, tables, norm, eps=1e-6, round_=lambda x: x):
        """The reference: all heads turned, value heads as they are; and the reciprocal norms."""
        out, rstd = x.copy(), np.ones((*x.shape[:2], self.turned), x.dtype)
        for heads, which in self.parts():
            part = x[:, :, heads]
            if norm:
                part, r = rmsnorm_forward(part, weights[which], eps)
                part, rstd[:, :, heads] = round_(part), r[..., 0]
            out[:, :, heads] = round_(turn(part, *tables))
        return out, rstd

    def backward(self, dout, x, weights, rstd, tables, norm, dweights, round_=lambda x: x):
        """The reference: gradients of all heads; the weights' are added to."""
        dinp = dout.copy()
        for heads, which in self.parts():
            part = round_(turn_back(dout[:, :, heads], *tables))
            if norm:
                part = round_(rmsnorm_backward(dweights[which], part, x[:, :, heads], weights[which],
                                               rstd[:, :, heads, None]))
            dinp[:, :, heads] = part
        return dinp


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "head_norm"])
@pytest.mark.parametrize("case", CASES)
def test_rope_forward_matches_reference(arrays, rng, case, norm):
    h, config = Heads(arrays, rng, case), config_of(case, norm)
    rows = h.on_gpu(arrays, h.x)
    inp = arrays.read(rows) if norm else arrays.update(rows)
    out = arrays.out(*rows.shape) if norm else inp  # without norms in place, as the layer does
    rstd = arrays.out(len(rows), h.turned, dtype="f32") if norm else None
    head_norm = HeadNorm(*(arrays.read(w) for w in h.weights), rstd) if norm else None
    rope_forward(arrays.dev, out, inp, head_norm, *h.tables(arrays), h.t, config)
    truth, truth_rstd = h.forward(*f64(h.x), f64(*h.weights), h.exact, norm)
    naive = h.forward(h.x, h.weights, h.single, norm, round_=rounded)[0]
    arrays.judge("out", out, h.on_gpu(arrays, truth), gate("rope"), lambda: h.on_gpu(arrays, naive))
    values = slice(h.turned * h.hs, None)
    assert (arrays.get(out)[:, values] == rows[:, values]).all(), "value heads are not turned"
    if norm:
        arrays.judge("head_rstd", rstd, truth_rstd.reshape(len(rows), -1), gate("rmsnorm"))


def backward(arrays, h, config, norm, parts, in_place):
    """dinp, the weights' gradients, and where those started."""
    rows, douts = h.on_gpu(arrays, h.x), h.on_gpu(arrays, h.dout)
    rstd = h.forward(*f64(h.x), f64(*h.weights), h.exact, norm)[1]
    start = [np.linspace(-1, 1, h.hs, dtype=np.float32) * s for s in (3, 5)]
    dweights = [arrays.update(s, "f32") if norm else None for s in start]
    head_norm = HeadNorm(*(arrays.read(w) for w in h.weights), arrays.read(rstd.reshape(len(rows), -1), "f32"))
    dinp = arrays.update(douts)
    dout = dinp if in_place else arrays.read(douts)
    partial = arrays.out(parts, 2 * h.hs, dtype="f32")
    rope_backward(arrays.dev, dinp, *dweights, partial, dout, arrays.read(rows) if norm else None,
                  head_norm if norm else None, *h.tables(arrays), h.t, config)
    return dinp, dweights, start, rstd


@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in_place"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "head_norm"])
@pytest.mark.parametrize("case", CASES)
def test_rope_backward_matches_reference(arrays, rng, case, norm, in_place):
    h, config = Heads(arrays, rng, case), config_of(case, norm)
    dinp, dweights, start, rstd = backward(arrays, h, config, norm, 3 if in_place else PARTS, in_place)
    truth_dweights = list(f64(*start))
    truth = h.backward(*f64(h.dout, h.x), f64(*h.weights), rstd, h.exact, norm, truth_dweights)
    naive = h.backward(h.dout, h.x, h.weights, rstd.astype(np.float32), h.single, norm, [s.copy() for s in start],
                       rounded)
    turned = (slice(None), slice(0, h.turned * h.hs))
    arrays.judge("dinp", dinp, h.on_gpu(arrays, truth), gate("rope"), lambda: h.on_gpu(arrays, naive), turned)
    values = (slice(None), slice(h.turned * h.hs, None))
    assert (arrays.get(dinp)[values] == h.on_gpu(arrays, h.dout)[values]).all(), "value heads are left alone"
    for name, ours, expected in zip(("q_dweight", "k_dweight"), dweights, truth_dweights, strict=True):
        if norm:
            arrays.judge(name, ours, expected, gate("rmsnorm"))


@pytest.mark.parametrize("storage", ["f32", "bf16"])
def test_rope_backward_gives_the_same_bits_twice(dev, storage):
    case = (2, 127, 14, 2, 64)

    def run():
        arrays = Arrays(dev, storage)
        h = Heads(arrays, np.random.default_rng(1), case)
        dinp, (dq, dk), _, _ = backward(arrays, h, config_of(case, True), True, PARTS, True)
        return {"dinp": arrays.bits(dinp), "q_dweight": arrays.bits(dq), "k_dweight": arrays.bits(dk)}
    same_bits(run)
