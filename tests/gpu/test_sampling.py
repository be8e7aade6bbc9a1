"""The choice of a token on the device: the reference's, token for token; and what it leaves for the next step."""

import dataclasses

import numpy as np
import pytest

from apr.config import Sampling
from apr.ops.sampling import embed, sample
from apr.presets import tiny
from apr.reference.sampling import choose

SIZES = [(300, 300, 20), (50257, 50000, 3142), (151936, 151665, 9496)]  # V, the tokenizer's size, blocks of the head
SETTINGS = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 40}, {"temperature": 1.3, "top_p": 0.9},
            {"temperature": 0.8, "top_k": 50, "top_p": 0.95}, {"temperature": 1.0, "top_k": 1},
            {"temperature": 1.0, "top_p": 1e-9}, {"temperature": 100.0, "top_p": 0.5}, {"temperature": 1e-40}]


def bests_of(scores, vocab, bests):
    """Each block's best, as decode_head leaves it."""
    rows = -(-scores.shape[1] // bests)
    score, ids = np.zeros((len(scores), bests), np.float32), np.full((len(scores), bests), -1, np.int32)
    for b, row in enumerate(scores):
        for block in range(bests):
            part = row[block * rows:min((block + 1) * rows, vocab)]
            if part.size:
                ids[b, block] = block * rows + part.argmax() if not np.isnan(part).any() else -2
                score[b, block] = part[ids[b, block] - block * rows] if ids[b, block] >= 0 else 0
    return score, ids


class Case:
    """The device's arrays of one step; poses are 10, 11, …"""

    def __init__(self, arrays, rng, scores, sampling, bests, limit=4):
        b, v = scores.shape
        self.arrays, self.c = arrays, dataclasses.replace(tiny, vocab_size=v)
        self.matrix = arrays.round(rng.standard_normal((v, self.c.C)))
        score, ids = bests_of(scores, sampling.vocab, bests)
        inverse = 1 / sampling.temperature if sampling.temperature else 0.0
        a = arrays
        self.x, self.token = a.out(b, self.c.C, dtype="f32"), a.out(b, dtype="i32")
        self.pos, self.step = a.update(np.arange(10, 10 + b), "i32"), a.update(np.full(b, 2), "i32")
        self.tokens = a.update(np.full((limit, b), -3), "i32")
        sample(a.dev, self.x, self.token, self.pos, self.step, self.tokens, a.read(scores, "f32"),
               a.read(score, "f32"), a.read(ids, "i32"), a.read(self.matrix),
               a.read(np.array([sampling.vocab, sampling.seed, sampling.first, sampling.top_k, limit]), "i64"),
               a.read(np.array([min(inverse, 3.4028234663852886e38), sampling.top_p]), "f64"), self.c)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: str(s[0]))
def test_sampling_chooses_the_references_token(f32, rng, size, settings):
    v, vocab, bests = size
    scores = (3 * rng.standard_normal((8, v))).astype(np.float32)
    scores[:, vocab:] = 100  # padding scores highest, and is never chosen
    scores[1] = np.round(scores[1])  # ties
    scores[2, ::2] = -np.inf
    scores[3] = 1.5  # all equal
    different = 0
    for seed in range(3):
        sampling = Sampling(vocab, seed=seed << 40 | 12345, first=seed, **settings)
        case = Case(f32, rng, scores, sampling, bests)
        got = f32.get(case.token)
        expected = [choose(row, sampling, seed + b, 11 + b) for b, row in enumerate(scores)]
        different += int((got != expected).sum())
        assert (got < vocab).all()
        assert (f32.get(case.pos) == np.arange(11, 19)).all() and (f32.get(case.step) == 3).all()
        assert (f32.dev.download(case.tokens) == [[-3] * 8, [-3] * 8, got.tolist(), [-3] * 8]).all()
        assert (f32.get(case.x) == case.matrix[got]).all()
    # exp of float differs from the CPU's in the last bit: a draw within 2^-30 of a border may fall on the other side
    assert different == 0


def test_sampling_says_where_a_score_is_not_a_number(f32, rng):
    for temperature in (0.0, 1.0):
        scores = rng.standard_normal((4, 300)).astype(np.float32)
        scores[0, 7], scores[1, 77], scores[2, 99], scores[3] = 1000, np.nan, np.inf, -np.inf
        case = Case(f32, rng, scores, Sampling(300, temperature), 20)
        assert f32.dev.download(case.tokens)[2].tolist() == [7, -2, -2, -2]


def test_sampling_writes_no_token_beyond_the_limit(f32, rng):
    scores = rng.standard_normal((2, 300)).astype(np.float32)
    case = Case(f32, rng, scores, Sampling(300), 20, limit=2)
    assert (f32.dev.download(case.tokens) == -3).all()


def test_sampling_embeds_the_token(arrays, rng):
    c = dataclasses.replace(tiny, vocab_size=300)
    matrix, x = arrays.round(rng.standard_normal((300, c.C))), arrays.out(3, c.C, dtype="f32")
    embed(arrays.dev, x, arrays.read(np.array([0, 299, 7]), "i32"), arrays.read(matrix), 20, c)
    assert (arrays.get(x) == matrix[[0, 299, 7]]).all()
