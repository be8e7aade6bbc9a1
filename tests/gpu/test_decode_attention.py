"""Attention over the key/value cache, and its filling, against the reference on whole sequences."""

import dataclasses

import numpy as np
import pytest
from compare import relative_l2
from harness import BF16, f64, gate

from apr.ops.decode_attention import decode_attention, kv_cache_append, partial_size
from apr.presets import llama_370m, qwen3_0_6b
from apr.reference.attention import attention_forward
from apr.reference.rmsnorm import rmsnorm_forward
from apr.reference.rope import rope_forward, rope_tables

# NH, NKV, HS, head norm: Qwen2-0.5B's 7:1; one head per key; 12:1, in three shares; odd sizes; the largest head
MODELS = [(14, 2, 64, False), (4, 4, 128, False), (12, 1, 32, False), (3, 1, 10, False), (8, 2, 80, True),
          (2, 1, 128, True)]
LENGTHS = [1, 2, 31, 33, 64, 129, 600, 2050]


def config_of(nh, nkv, hs, norm):
    """A model of these heads; eps shows beside heads of size 0.05."""
    return dataclasses.replace(qwen3_0_6b if norm else llama_370m, num_attention_heads=nh, num_key_value_heads=nkv,
                               head_dim=hs, hidden_size=64, rms_norm_eps=1e-3, rope_theta=1e4)


class Case:
    """B sequences: cached keys and values of the tokens before, and this token's q, k, v."""

    def __init__(self, arrays, rng, config, lengths, room):
        c, b = config, len(lengths)
        self.c, self.lengths, self.arrays = c, lengths, arrays
        self.cache = [arrays.round(rng.standard_normal((b, c.NKV, room, c.HS))) for _ in "kv"]
        self.qkv = rng.standard_normal((b, c.QKV)).astype(np.float32)
        self.qkv[:, :c.NH * c.HS] *= 2
        self.norms = [arrays.round(1 + 0.3 * rng.standard_normal(c.HS)) for _ in "qk"] if c.qk_norm else [None, None]
        self.tables = [t[:, 0] for t in rope_tables(np.arange(room), c.HS, c.rope_theta, None, np.dtype(np.float32))]

    def run(self, rows=slice(None)):
        """out, k_cache, v_cache on the device."""
        a, c = self.arrays, self.c
        caches, qkv, lengths = [x[rows] for x in self.cache], self.qkv[rows], self.lengths[rows]
        b = len(lengths)
        out, k, v = a.out(b, c.NH * c.HS, dtype="f32"), a.update(caches[0]), a.update(caches[1])
        ticket = a.update(np.zeros((b, c.NH), np.int32), "i32")
        decode_attention(a.dev, out, a.update(np.full(partial_size(c, b), np.nan), "f32"), ticket, k, v,
                         a.read(qkv, "f32"), *(None if n is None else a.read(n) for n in self.norms),
                         *(a.read(t, "f32") for t in self.tables), a.read(np.array(lengths) - 1, "i32"), c,
                         scale=c.HS ** -0.5)
        assert not a.dev.download(ticket).any()
        return out, k, v

    def truth(self, row):
        """Sequence `row`: out (NH*HS,), and the key and value that enter the cache, in float64."""
        c, t = self.c, self.lengths[row]
        q, k, v = np.split(f64(self.qkv[row])[0].reshape(-1, c.HS), [c.NH, c.NH + c.NKV])
        if c.qk_norm:
            q, k = (rmsnorm_forward(x, f64(w)[0], c.rms_norm_eps)[0] for x, w in zip((q, k), self.norms, strict=True))
        tables = rope_tables(np.array([t - 1]), c.HS, c.rope_theta, None, np.dtype(np.float64))
        q, k = (rope_forward(x[None, None], *tables)[0, 0] for x in (q, k))
        k, v = (f64(self.arrays.round(x))[0] for x in (k, v))
        keys, values = (np.concatenate([f64(cache[row, :, :t - 1])[0], new[:, None]], 1).swapaxes(0, 1)[None]
                        for cache, new in zip(self.cache, (k, v), strict=True))
        return attention_forward(q[None, None], keys, values, c.HS ** -0.5)[0].reshape(-1), k, v


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_decode_attention_matches_reference(arrays, rng, model):
    config = config_of(*model)
    case = Case(arrays, rng, config, LENGTHS, max(LENGTHS) + 3)
    out, k, v = case.run()
    got, caches = arrays.get(out), [arrays.get(x) for x in (k, v)]
    for row, length in enumerate(LENGTHS):
        truth, key, value = case.truth(row)
        # bf16: the new key may be rounded to the other neighbour, which counts for much where there are few
        tolerance = gate("decode_attention") if arrays.storage == "f32" else 2e-3
        assert relative_l2(got[row], truth) <= tolerance, f"length {length}"
        others = np.arange(max(LENGTHS) + 3) != length - 1
        for cache, before, new in zip(caches, case.cache, (key, value), strict=True):
            assert (cache[row][:, others] == before[row][:, others]).all(), "another position changed"
            assert np.abs(cache[row, :, length - 1] - new).max() <= (1e-5 if arrays.storage == "f32" else 0.04)


def test_decode_attention_gives_a_sequence_the_same_bits_alone_and_in_a_batch(arrays, rng):
    case = Case(arrays, rng, config_of(14, 2, 64, False), LENGTHS, 2060)
    together = arrays.bits(case.run()[0])
    for row in range(len(LENGTHS)):
        assert (arrays.bits(case.run(slice(row, row + 1))[0])[0] == together[row]).all(), LENGTHS[row]


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("length", [1, 33, 257])
def test_kv_cache_append_copies_keys_and_values_and_nothing_else(arrays, rng, model, length):
    c, room = config_of(*model), 300
    qkv = arrays.round(rng.standard_normal((length, c.QKV)))
    before = arrays.round(rng.standard_normal((2, c.NKV, room, c.HS)))
    k, v = (arrays.update(x) for x in before)
    kv_cache_append(arrays.dev, k, v, arrays.read(qkv), c)
    heads = qkv.reshape(length, -1, c.HS)
    for got, start, first in ((k, before[0], c.NH), (v, before[1], c.NH + c.NKV)):
        expected = start.copy()
        expected[:, :length] = heads[:, first:first + c.NKV].swapaxes(0, 1)
        assert (arrays.get(got) == expected).all()


def test_the_bf16_cache_is_rounded_to_nearest_even(bf16, rng):
    case = Case(bf16, rng, config_of(4, 4, 128, False), [5], 8)
    _, _, v = case.run()
    c = case.c
    values = case.qkv[0, (c.NH + c.NKV) * c.HS:].reshape(c.NKV, c.HS)
    assert (bf16.get(v)[0, :, 4] == values.astype(BF16).astype(np.float32)).all()
