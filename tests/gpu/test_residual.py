"""The residual addition, which is part of the RMSNorm kernels: forward begins with it, backward ends with it."""

import numpy as np
import pytest
from harness import Arrays, f64, gate, rounded, same_bits
from test_rmsnorm import kinds, some_rows

from apr.buffers import PARTS
from apr.ops.rmsnorm import rmsnorm_backward, rmsnorm_forward
from apr.reference.residual import residual_backward, residual_forward
from apr.reference.rmsnorm import rmsnorm_backward as norm_backward
from apr.reference.rmsnorm import rmsnorm_forward as norm_forward

CASES = [(1, 64, PARTS), (17, 123, 3), (127, 896, PARTS), (129, 37, 5), (7, 4096, PARTS)]  # N, C, parts
EPS = 1e-6


def some(arrays, rng, case):
    """inp, update, weight as stored; a sub-layer of zeros in the last row."""
    n, c, _ = case
    inp, update = some_rows(rng, n, c), 0.5 * some_rows(rng, n, c)
    update[n - 1] = 0 if n > 1 else update[0]
    return arrays.round(inp), arrays.round(update), arrays.round(1 + 0.3 * rng.standard_normal(c))


@pytest.mark.parametrize("case", CASES)
def test_residual_forward_matches_reference(arrays, rng, case):
    n, c, _ = case
    inp, update, weight = some(arrays, rng, case)
    out, rstd, residual = arrays.out(n, c), arrays.out(n, dtype="f32"), arrays.out(n, c)
    rmsnorm_forward(arrays.dev, out, rstd, residual, arrays.read(inp), arrays.read(update), arrays.read(weight),
                    eps=EPS)
    stream = residual_forward(*f64(inp, update))
    truth, truth_rstd = norm_forward(stream, *f64(weight), EPS)
    stored = rounded(residual_forward(inp, update))  # the norm is of the sum as stored
    naive, naive_rstd = norm_forward(stored, weight, EPS)
    for rows in kinds(n):
        arrays.judge("residual", residual, stream, gate("residual"), lambda: stored, rows)
        arrays.judge("out", out, truth, gate("rmsnorm"), lambda: rounded(naive), rows)
        arrays.judge("rstd", rstd, truth_rstd[:, 0], gate("rmsnorm"), lambda: naive_rstd[:, 0], rows)


def backward(arrays, rng, case, in_place):
    """dinp, dweight; and what the reference needs."""
    n, c, parts = case
    inp, _, weight = some(arrays, rng, case)
    dout, skip = arrays.round(rng.standard_normal((n, c))), arrays.round(3 * rng.standard_normal((n, c)))
    rstd, start = norm_forward(*f64(inp, weight), EPS)[1], rng.standard_normal(c).astype(np.float32)
    dresidual = arrays.update(skip) if in_place else arrays.read(skip)
    dinp, dweight = dresidual if in_place else arrays.out(n, c), arrays.update(start, "f32")
    rmsnorm_backward(arrays.dev, dinp, dweight, arrays.out(n, c), arrays.out(parts, c, dtype="f32"), arrays.read(dout),
                     dresidual, arrays.read(inp), arrays.read(weight), arrays.read(rstd[:, 0], "f32"), eps=EPS)
    return (dinp, dweight), (inp, weight, dout, skip, rstd, start)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_residual_backward_matches_reference(arrays, rng, case, in_place):
    n, c, _ = case
    (dinp, dweight), (inp, weight, dout, skip, rstd, start) = backward(arrays, rng, case, in_place)
    truth_dweight = f64(start)[0]
    truth = residual_backward(*f64(skip), norm_backward(truth_dweight, *f64(dout, inp, weight), rstd))

    def naive():
        through = norm_backward(np.zeros(c, np.float32), dout, inp, weight, rstd.astype(np.float32))
        return rounded(residual_backward(skip, rounded(through)))

    for rows in kinds(n):
        arrays.judge("dinp", dinp, truth, gate("rmsnorm"), naive, rows)
    arrays.judge("dweight", dweight, truth_dweight, gate("rmsnorm"))


def test_residual_gradient_keeps_both_paths(f32, rng):
    """With no gradient through the norm what arrives is what came, to the bit; upstream lost one of the two."""
    skip, inp = rng.standard_normal((2, 5, 64)).astype(np.float32)
    dinp = f32.out(5, 64)
    rmsnorm_backward(f32.dev, dinp, f32.update(np.zeros(64), "f32"), f32.out(5, 64), f32.out(3, 64, dtype="f32"),
                     f32.read(np.zeros((5, 64))), f32.read(skip), f32.read(inp), f32.read(np.ones(64)),
                     f32.read(np.ones(5), "f32"), eps=EPS)
    assert (f32.get(dinp) == skip).all()


@pytest.mark.parametrize("storage", ["f32", "bf16"])
def test_residual_backward_gives_the_same_bits_twice(dev, storage):
    def run():
        arrays = Arrays(dev, storage)
        results, _ = backward(arrays, np.random.default_rng(1), (129, 896, 7), True)
        return dict(zip(("dinp", "dweight"), map(arrays.bits, results), strict=True))
    same_bits(run)
