"""The matrix-vector products of decoding, against the reference's ops one after the other."""

import numpy as np
import pytest
from harness import f64, gate

from apr.ops.decode_linear import decode_add, decode_gate_up, decode_head, decode_linear_baked, decode_qkv
from apr.reference.linear import linear_forward
from apr.reference.rmsnorm import rmsnorm_forward
from apr.reference.swiglu import swiglu_forward

EPS = 1e-3  # large enough to show beside inputs of this size
SHAPES = [(64, 48), (1152, 896), (37, 123), (6, 34), (307, 5120), (2, 8)]  # O, I
BATCHES = [1, 2, 4, 8]


def inputs(arrays, rng, b, o, i):
    """x (B, I) with a row of tiny norm, matrix (O, I), weight (I,), as the storage type holds the last two."""
    x = (0.05 * rng.standard_normal((b, i))).astype(np.float32)
    x[-1] *= 1e-3
    return x, arrays.round(rng.standard_normal((o, i)) / np.sqrt(i)), arrays.round(1 + 0.3 * rng.standard_normal(i))


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_qkv_matches_reference(arrays, rng, shape, b):
    (o, i), out = shape, arrays.out(b, shape[0], dtype="f32")
    x, matrix, weight = inputs(arrays, rng, b, o, i)
    bias = arrays.round(rng.standard_normal(o))
    for given in (None, bias):
        decode_qkv(arrays.dev, out, arrays.read(x, "f32"), arrays.read(matrix), arrays.read(weight),
                   None if given is None else arrays.read(given), eps=EPS, first=True)
        x_, m_, w_ = f64(x, matrix, weight)
        truth = linear_forward(rmsnorm_forward(x_, w_, EPS)[0], m_) + (0 if given is None else f64(given)[0])
        arrays.judge("out", out, truth, gate("decode_linear"))


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_add_matches_reference(arrays, rng, shape, b):
    o, i = shape
    inp, matrix, _ = inputs(arrays, rng, b, o, i)
    start = rng.standard_normal((b, o)).astype(np.float32)
    x = arrays.update(start, "f32")
    decode_add(arrays.dev, x, arrays.read(inp, "f32"), arrays.read(matrix), eps=EPS)
    arrays.judge("x", x, f64(start)[0] + linear_forward(*f64(inp, matrix)), gate("decode_linear"))


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("shape", [(f, i) for f, i in SHAPES if f != 37] + [(2 * 37, 123)])
def test_decode_gate_up_matches_reference(arrays, rng, shape, b):
    o, i = shape
    o -= o % 2
    x, matrix, weight = inputs(arrays, rng, b, o, i)
    matrix = arrays.round(3 * matrix)
    out = arrays.out(b, o // 2, dtype="f32")
    decode_gate_up(arrays.dev, out, arrays.read(x, "f32"), arrays.read(matrix), arrays.read(weight), eps=EPS)
    x_, m_, w_ = f64(x, matrix, weight)
    both = linear_forward(rmsnorm_forward(x_, w_, EPS)[0], m_)
    tolerance = gate("decode_linear") if arrays.storage == "f32" else 2 * gate("decode_linear")  # fast exponential
    arrays.judge("out", out, swiglu_forward(both[:, :o // 2], both[:, o // 2:]), tolerance)


def head(arrays, x, matrix, weight, vocab):
    """Scores, and every block's best."""
    b, o = x.shape[0], matrix.shape[0]
    baked = decode_linear_baked(b, *matrix.shape, EPS, arrays.storage)
    bests = -(-o // int(baked["ROWS"]))
    out = arrays.out(b, o, dtype="f32")
    score, best = arrays.out(b, bests, dtype="f32"), arrays.out(b, bests, dtype="i32")
    decode_head(arrays.dev, out, score, best, arrays.read(x, "f32"), arrays.read(matrix), arrays.read(weight),
                arrays.read(np.array([vocab, 0, 0, 0, 0]), "i64"), eps=EPS)
    return out, score, best, int(baked["ROWS"])


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("vocab", [1, 300, 307])
def test_decode_head_matches_reference_and_reports_the_best_of_each_block(arrays, rng, b, vocab):
    x, matrix, weight = inputs(arrays, rng, b, 307, 96)
    matrix[7] = matrix[3]  # equal scores: the first counts
    out, score, best, rows = head(arrays, x, matrix, weight, vocab)
    x_, m_, w_ = f64(x, matrix, weight)
    arrays.judge("out", out, linear_forward(rmsnorm_forward(x_, w_, EPS)[0], m_), gate("decode_linear"))
    scores, best_id = arrays.get(out), arrays.dev.download(best)
    for row in range(b):
        for block in range(best_id.shape[1]):
            ids = np.arange(block * rows, min((block + 1) * rows, vocab))
            expected = ids[scores[row, ids].argmax()] if ids.size else -1
            assert best_id[row, block] == expected
            assert expected < 0 or arrays.dev.download(score)[row, block] == scores[row, expected]


def test_decode_head_says_where_a_score_is_not_a_number(f32, rng):
    x, matrix, weight = inputs(f32, rng, 1, 307, 96)
    matrix[100] = np.nan
    _, _, best, rows = head(f32, x, matrix, weight, 307)
    ids = f32.dev.download(best)[0]
    assert ids[100 // rows] == -2 and (np.delete(ids, 100 // rows) >= 0).all()


@pytest.mark.parametrize("shape", [(1152, 896), (307, 5120)])
def test_decode_linear_gives_a_row_the_same_bits_alone_and_in_a_batch(arrays, rng, shape):
    o, i = shape
    x, matrix, weight = inputs(arrays, rng, 8, o, i)
    m, w, results = arrays.read(matrix), arrays.read(weight), {}
    for b in BATCHES:
        out = arrays.out(b, o, dtype="f32")
        decode_qkv(arrays.dev, out, arrays.read(x[:b], "f32"), m, w, None, eps=EPS, first=False)
        results[b] = arrays.bits(out)
    for b in BATCHES:
        assert (results[8][:b] == results[b]).all(), f"batch {b} differs from batch 8"
