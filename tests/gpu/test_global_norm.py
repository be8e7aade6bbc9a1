"""The gradient norm: sums beyond float32's range, NaN and infinity seen, every element counted once."""

import numpy as np
import pytest
from harness import gate

from apr.buffers import PARTS
from apr.ops.global_norm import global_norm
from apr.reference.global_norm import global_norm as reference

SIZES = [4, 1020, 2**20 + 64, 5 * 2**20]


def norm_of(arrays, grads, parts=PARTS):
    """The kernels' norm."""
    norm = arrays.out(1, dtype="f64")
    global_norm(arrays.dev, norm, arrays.out(parts, dtype="f64"), arrays.read(grads, "f32"), arrays.storage)
    return norm


@pytest.mark.parametrize("parts", [PARTS, 3])
@pytest.mark.parametrize("size", SIZES)
def test_global_norm_forward_matches_reference(arrays, rng, size, parts):
    grads = (rng.standard_normal(size) * rng.choice([1e-6, 1e-2, 1.0], size)).astype(np.float32)
    truth = np.array([reference(grads.astype(np.float64))])
    arrays.judge("norm", norm_of(arrays, grads, parts), truth, gate("global_norm"))


@pytest.mark.parametrize("where", [0, 3, 1019])
def test_global_norm_counts_every_element(f32, where):
    grads = np.zeros(1020, np.float32)
    grads[where] = -3
    assert f32.get(norm_of(f32, grads))[0] == 3


def test_global_norm_of_nothing_is_zero(f32):
    norm = f32.bits(norm_of(f32, np.zeros(1020)))
    assert norm[0] == 0


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_global_norm_sums_squares_beyond_float32(f32, size):
    """1e25 squared is no float32: the gradient is finite, and the guard must not take its norm for infinite."""
    norm = f32.get(norm_of(f32, np.full(1024, size, np.float32)))[0]
    assert abs(norm / (32 * np.float32(size).astype(np.float64)) - 1) <= gate("global_norm")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 777, 2**20 + 63])
def test_global_norm_sees_one_bad_gradient(f32, rng, bad, where):
    grads = rng.standard_normal(2**20 + 64).astype(np.float32)
    grads[where] = bad
    norm = f32.dev.download(norm_of(f32, grads))[0]
    assert np.isnan(norm) if np.isnan(bad) else norm == np.inf


def test_global_norm_gives_the_same_bits_twice(f32, rng):
    grads = rng.standard_normal(5 * 2**20).astype(np.float32)
    assert f32.bits(norm_of(f32, grads)) == f32.bits(norm_of(f32, grads))
