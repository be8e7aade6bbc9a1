"""The embedding kernels: rows are copied to the bit; the gradient of a token is summed over all its occurrences."""

from itertools import pairwise

import numpy as np
import pytest
from harness import Arrays, f64, gate, same_bits

from apr.ops.embedding import embedding_backward, embedding_forward, sort_ids
from apr.reference import embedding as reference

V = 50
SHAPES = [(1, 64), (17, 123), (127, 96), (129, 37), (1030, 896)]  # N, C


def some_ids(rng, n):
    """Token 3 in every third place, the table's first and last row, and rows that no id names."""
    ids = rng.integers(5, V - 5, n).astype(np.int32)
    ids[::3] = 3
    ids[1:3] = [0, V - 1][:len(ids[1:3])]
    return ids


@pytest.mark.parametrize("shape", SHAPES)
def test_embedding_forward_matches_reference(arrays, rng, shape):
    n, c = shape
    ids, weight = some_ids(rng, n), arrays.round(rng.standard_normal((V, c)))
    out = arrays.out(n, c)
    embedding_forward(arrays.dev, out, arrays.read(weight), arrays.read(ids, "i32"))
    assert (arrays.get(out) == reference.embedding_forward(ids[None], weight)[0]).all()


def backward(arrays, rng, shape):
    """The gradient array, where it started, dout and ids."""
    n, c = shape
    ids, dout, start = some_ids(rng, n), arrays.round(rng.standard_normal((n, c))), rng.standard_normal((V, c))
    order, runs = sort_ids(ids)
    dweight = arrays.update(start, "f32")
    embedding_backward(arrays.dev, dweight, arrays.read(dout), *(arrays.read(x, "i32") for x in (ids, order, runs)))
    return dweight, start.astype(np.float32), dout, ids


@pytest.mark.parametrize("shape", SHAPES)
def test_embedding_backward_matches_reference(arrays, rng, shape):
    dweight, start, dout, ids = backward(arrays, rng, shape)
    truth = f64(start)[0]
    reference.embedding_backward(truth, f64(dout)[0][None], ids[None])
    arrays.judge("dweight", dweight, truth, gate("embedding"))
    unused = np.setdiff1d(np.arange(V), ids)
    assert (arrays.get(dweight)[unused] == start[unused]).all(), "a row that no id names was touched"


@pytest.mark.parametrize("shape", [(129, 37), (1030, 896)])
def test_embedding_backward_gives_the_same_bits_twice(dev, shape):
    def run():
        arrays = Arrays(dev, "bf16")
        return {"dweight": arrays.bits(backward(arrays, np.random.default_rng(1), shape)[0])}
    same_bits(run)


def test_embedding_sort_ids_lists_every_position_once(rng):
    ids = some_ids(rng, 100)
    order, runs = sort_ids(ids)
    assert sorted(order) == list(range(100)) and (np.diff(ids[order]) >= 0).all()
    used = np.unique(ids).size
    assert (np.diff(runs)[:used] > 0).all() and (runs[used:] == 100).all()
    for begin, end in pairwise(runs[:used + 1]):
        assert np.unique(ids[order[begin:end]]).size == 1 and (np.diff(order[begin:end]) > 0).all()
