"""The reference's embedding: rows of the table, and gradients summed into the rows that were used."""

import numpy as np
import pytest
from compare import assert_close, finite_difference_error

from apr.reference.embedding import embedding_backward, embedding_forward

FINITE_DIFFERENCE = 1e-7  # the project's gate; linear, so only rounding remains; measured worst 3e-10
FLOAT32 = 1e-6  # relative L2 of float32: a sum of a few rows; measured worst 8e-8
EXACT = 1e-14  # float64, another order of the same sums
V, C = 7, 5
SHAPES = [(1, 1), (2, 6), (3, 17)]  # T = 1, odd sizes, more tokens than rows


def some(rng, shape):
    """Token ids where one token repeats and (when there are several) one of the table's rows stays unused; and dout."""
    ids = rng.integers(1, V, shape)
    ids[:, ::3] = 4
    return ids, rng.standard_normal((*shape, C))


@pytest.mark.parametrize("shape", SHAPES)
def test_embedding_backward_matches_finite_differences(rng, shape):
    weight, (ids, dout) = rng.standard_normal((V, C)), some(rng, shape)
    dweight = np.zeros_like(weight)
    embedding_backward(dweight, dout, ids)
    error = finite_difference_error(lambda: float((embedding_forward(ids, weight) * dout).sum()), weight, dweight, rng)
    assert error <= FINITE_DIFFERENCE


@pytest.mark.parametrize("shape", SHAPES)
def test_embedding_float32_matches_float64(rng, shape):
    weight, (ids, dout) = rng.standard_normal((V, C)), some(rng, shape)
    small, ours, truth = weight.astype(np.float32), np.zeros((V, C), np.float32), np.zeros((V, C))
    out = embedding_forward(ids, small)
    assert out.dtype == np.float32
    assert (out == small[ids]).all(), "a gather rounds nothing"
    embedding_backward(ours, dout.astype(np.float32), ids)
    embedding_backward(truth, dout, ids)
    assert_close(ours, truth, FLOAT32, "dweight")


def test_embedding_forward_is_a_copy(rng):
    weight = rng.standard_normal((V, C))
    kept = weight.copy()
    embedding_forward(np.array([[0, 1]]), weight)[...] = 9.0
    assert (weight == kept).all()


def test_embedding_backward_sums_a_repeated_token_and_leaves_unused_rows(rng):
    ids, dout = np.array([[2, 5, 2], [2, 0, 5]]), rng.standard_normal((2, 3, C))
    dweight = np.zeros((V, C))
    embedding_backward(dweight, dout, ids)
    assert_close(dweight[2], dout[0, 0] + dout[0, 2] + dout[1, 0], EXACT, "the thrice repeated token")
    assert_close(dweight[5], dout[0, 1] + dout[1, 2], EXACT, "the twice repeated token")
    assert (dweight[0] == dout[1, 1]).all()
    assert not dweight[[1, 3, 4, 6]].any()


def test_embedding_backward_accumulates_and_micro_batches_add_up(rng):
    ids, dout = some(rng, (4, 9))
    start = rng.standard_normal((V, C))
    whole, halves = start.copy(), start.copy()
    embedding_backward(whole, dout, ids)
    for half in (slice(0, 2), slice(2, 4)):
        embedding_backward(halves, dout[half], ids[half])
    expected = start.copy()
    np.add.at(expected, ids, dout)
    assert_close(whole, expected, EXACT, "what was there plus the sum")
    assert_close(halves, whole, EXACT, "two micro-batches")


@pytest.mark.parametrize("bad", [-1, V, V + 100])
def test_embedding_refuses_ids_out_of_range(rng, bad):
    with pytest.raises(IndexError, match=rf"outside \[0, {V}\)"):
        embedding_forward(np.array([[0, bad]]), rng.standard_normal((V, C)))
