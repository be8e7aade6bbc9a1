"""The cache of keys and values: prefill and decode give the full forward pass, at every length, in any company."""

import dataclasses

import numpy as np
import pytest
from compare import assert_close
from models import FAMILIES

from apr.errors import ShapeError
from apr.params import param_specs
from apr.reference.kv_cache import KVCache, cached_forward
from apr.reference.model import model_forward
from apr.taps import expected_names

FLOAT32 = 1e-5  # relative L2: the same sums in products of other shapes; measured worst 5.1e-6
LONGEST = 600
CONFIGS = {name: dataclasses.replace(c, max_position_embeddings=LONGEST) for name, c in FAMILIES.items()}


def parameters(config, dtype=np.float32):
    """Parameters at which every one matters."""
    rng = np.random.default_rng(5)
    noise = {s.name: rng.standard_normal(s.shape) for s in param_specs(config)}
    return {n: (1 + 0.2 * x if "norm" in n else 0.3 * x).astype(dtype) for n, x in noise.items()}


def tokens(count, seed=1):
    return np.random.default_rng(seed).integers(0, 97, count)


def run(params, config, ids, cache, row, steps):
    """Scores (T, V) of ids fed to one sequence in pieces of these sizes."""
    out, at = [], 0
    for step in steps:
        out.append(cached_forward(params, config, ids[None, at:at + step], cache, [row])[0])
        at += step
    assert at == len(ids) == cache.lengths[row]
    return np.concatenate(out)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_then_decode_is_the_full_forward(name):
    config = CONFIGS[name]
    params, ids = parameters(config), tokens(90)
    full = model_forward(params, config, ids[None])[0]
    for steps in ([1] * 90, [89, 1], [40] + [1] * 50, [17, 30, 1, 1, 41], [90]):
        ours = run(params, config, ids, KVCache(config, 1, 90, np.dtype(np.float32)), 0, steps)
        for position in range(90):
            assert_close(ours[position], full[position], FLOAT32, f"{steps[:3]} position {position}")


def test_every_length_from_1_to_600():
    """Decoded one by one from a prompt of 1, and of 300, every position of 600; and prompts of every length."""
    config = CONFIGS["qwen2"]
    params, ids = parameters(config), tokens(LONGEST)
    full = model_forward(params, config, ids[None])[0]
    for prompt in (1, 300):
        ours = run(params, config, ids, KVCache(config, 1, LONGEST, np.dtype(np.float32)), 0,
                   [prompt] + [1] * (LONGEST - prompt))
        for position in range(LONGEST):
            assert_close(ours[position], full[position], FLOAT32, f"prompt {prompt}, position {position}")
    for length in range(1, LONGEST):
        cache = KVCache(config, 1, LONGEST, np.dtype(np.float32))
        first = cached_forward(params, config, ids[None, :length], cache, [0], last=True)
        assert_close(first[0, 0], full[length - 1], FLOAT32, f"prompt of {length}")
        after = cached_forward(params, config, ids[None, length:length + 1], cache, [0])
        assert_close(after[0, 0], full[length], FLOAT32, f"the token after a prompt of {length}")


def test_in_float64_the_cache_changes_nothing():
    config = CONFIGS["qwen3"]
    params, ids = parameters(config, np.float64), tokens(50)
    ours = run(params, config, ids, KVCache(config, 1, 50, np.dtype(np.float64)), 0, [7] + [1] * 43)
    assert_close(ours, model_forward(params, config, ids[None])[0], 1e-13, "float64")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_ragged_batch_is_each_alone(name):
    config = CONFIGS[name]
    params, lengths, steps = parameters(config), [5, 1, 33, 12], 20
    ids = [tokens(n + steps, seed=n) for n in lengths]
    cache = KVCache(config, 4, 60, np.dtype(np.float32))
    for row, n in enumerate(lengths):
        cached_forward(params, config, ids[row][None, :n], cache, [row])
    full = [model_forward(params, config, i[None])[0] for i in ids]
    for step in range(steps):
        rows = [r for r in (2, 0, 3, 1) if step < 10 or r != 3]  # in another order; one leaves half way
        now = np.array([[ids[r][lengths[r] + step]] for r in rows])
        for r, scores in zip(rows, cached_forward(params, config, now, cache, rows), strict=True):
            assert_close(scores[0], full[r][lengths[r] + step], FLOAT32, f"sequence {r}, step {step}")
    assert cache.lengths == [25, 21, 53, 22]


def test_what_an_earlier_longer_sequence_left_is_not_read():
    config = CONFIGS["qwen2"]
    params, ids = parameters(config), tokens(40)
    cache = KVCache(config, 1, 64, np.dtype(np.float32))
    cache.k.fill(np.nan)
    cache.v.fill(np.nan)
    cached_forward(params, config, tokens(60, seed=9)[None], cache, [0])
    cache.lengths[0] = 0
    ours = run(params, config, ids, cache, 0, [10] + [1] * 30)
    assert_close(ours, model_forward(params, config, ids[None])[0], FLOAT32, "after a longer one")


def test_a_full_cache_refuses_more():
    config = CONFIGS["llama"]
    params, cache = parameters(config), KVCache(config, 2, 8, np.dtype(np.float32))
    cached_forward(params, config, tokens(8)[None], cache, [1])
    for ids, rows in ((tokens(1)[None], [1]), (tokens(9)[None], [0]), (np.zeros((1, 0), int), [0]),
                      (np.zeros((2, 1), int), [0, 1])):
        with pytest.raises(ShapeError, match="S = 8"):
            cached_forward(params, config, ids, cache, rows)
    assert cache.lengths == [0, 8]


@pytest.mark.parametrize("name", CONFIGS)
def test_taps_are_those_of_the_model(name):
    config = CONFIGS[name]
    params, ids, cache = parameters(config), tokens(9), KVCache(config, 1, 9, np.dtype(np.float32))
    whole, prefill, decode = {}, {}, {}
    model_forward(params, config, ids[None], tap=lambda n, a: whole.__setitem__(n, a.copy()))
    cached_forward(params, config, ids[None, :8], cache, [0], prefill.__setitem__)
    cached_forward(params, config, ids[None, 8:], cache, [0], decode.__setitem__)
    assert list(prefill) == list(decode) == list(whole) == expected_names(config.L, config.qk_norm)
    for name_, array in whole.items():
        assert_close(prefill[name_], array[:, :8], FLOAT32, name_)
        assert_close(decode[name_], array[:, 8:], FLOAT32, name_)
