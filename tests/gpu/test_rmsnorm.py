"""The RMSNorm kernels without a residual (test_residual.py has it): rows of every size, each size judged by itself."""

import numpy as np
import pytest
from harness import Arrays, f64, gate, rounded, same_bits

from apr.buffers import PARTS
from apr.ops.rmsnorm import rmsnorm_backward, rmsnorm_forward
from apr.reference import rmsnorm as reference

# N, C, blocks of the sum over rows, eps: one row; tails; more rows than blocks; each BLOCK of the launcher; both eps
CASES = [(1, 64, PARTS, 1e-6), (17, 123, 3, 1e-6), (127, 896, PARTS, 1e-6), (129, 37, 5, 1e-5), (1030, 64, PARTS, 1e-5),
         (5, 4096, PARTS, 1e-6), (11, 5120, 4, 1e-5)]
SIZES = (0.02, 1.0, 1e-3, 0.0, 1e3)  # of the rows, in turn; 0.02 and 1e-3 (as a norm) are where eps shows


def some_rows(rng, n, c):
    """Rows of all SIZES."""
    size = np.resize(np.array([s / np.sqrt(c) if s == 1e-3 else s for s in SIZES]), n)
    return size[:, None] * rng.standard_normal((n, c))


def kinds(n):
    """The rows of each size: a gradient of small rows is so large that beside it no other row would be seen."""
    return [slice(i, None, len(SIZES)) for i in range(min(n, len(SIZES)))]


def some(arrays, rng, case):
    """inp, weight, dout as stored, the reciprocal norms in float64."""
    n, c, _, eps = case
    inp, weight, dout = (arrays.round(x) for x in (some_rows(rng, n, c), 1 + 0.3 * rng.standard_normal(c),
                                                   rng.standard_normal((n, c))))
    return inp, weight, dout, reference.rmsnorm_forward(*f64(inp, weight), eps)[1]


@pytest.mark.parametrize("case", CASES)
def test_rmsnorm_forward_matches_reference(arrays, rng, case):
    n, c, _, eps = case
    inp, weight, _, _ = some(arrays, rng, case)
    out, rstd = arrays.out(n, c), arrays.out(n, dtype="f32")
    rmsnorm_forward(arrays.dev, out, rstd, None, arrays.read(inp), None, arrays.read(weight), eps=eps)
    truth, truth_rstd = reference.rmsnorm_forward(*f64(inp, weight), eps)
    for rows in kinds(n):
        arrays.judge("out", out, truth, gate("rmsnorm"),
                     lambda: rounded(reference.rmsnorm_forward(inp, weight, eps)[0]), rows)
        arrays.judge("rstd", rstd, truth_rstd[:, 0], gate("rmsnorm"), part=rows)


def backward(arrays, rng, case):
    """dinp, dweight, the output written again; and what the reference needs."""
    n, c, parts, eps = case
    inp, weight, dout, rstd = some(arrays, rng, case)
    start = rng.standard_normal(c).astype(np.float32)
    dinp, out, dweight = arrays.out(n, c), arrays.out(n, c), arrays.update(start, "f32")
    rmsnorm_backward(arrays.dev, dinp, dweight, out, arrays.out(parts, c, dtype="f32"), arrays.read(dout), None,
                     arrays.read(inp), arrays.read(weight), arrays.read(rstd[:, 0], "f32"), eps=eps)
    return (dinp, dweight, out), (inp, weight, dout, rstd, start)


@pytest.mark.parametrize("case", CASES)
def test_rmsnorm_backward_matches_reference(arrays, rng, case):
    n, eps = case[0], case[3]
    (dinp, dweight, out), (inp, weight, dout, rstd, start) = backward(arrays, rng, case)
    truth_dweight = f64(start)[0]
    truth = reference.rmsnorm_backward(truth_dweight, *f64(dout, inp, weight), rstd)
    for rows in kinds(n):
        arrays.judge("dinp", dinp, truth, gate("rmsnorm"), lambda: rounded(reference.rmsnorm_backward(
            np.zeros(case[1], np.float32), dout, inp, weight, rstd.astype(np.float32))), rows)
        arrays.judge("out", out, reference.rmsnorm_forward(*f64(inp, weight), eps)[0], gate("rmsnorm"),
                     lambda: rounded(reference.rmsnorm_forward(inp, weight, eps)[0]), rows)
    arrays.judge("dweight", dweight, truth_dweight, gate("rmsnorm"))


@pytest.mark.parametrize("case", CASES)
def test_rmsnorm_backward_writes_what_forward_wrote(arrays, rng, case):
    """To the bit, from forward's own reciprocal norms: the weight gradients of the layer use it in forward's place."""
    n, c, parts, eps = case
    inp, weight, dout, _ = some(arrays, rng, case)
    out, rstd, again = arrays.out(n, c), arrays.out(n, dtype="f32"), arrays.out(n, c)
    x, w = arrays.read(inp), arrays.read(weight)
    rmsnorm_forward(arrays.dev, out, rstd, None, x, None, w, eps=eps)
    rmsnorm_backward(arrays.dev, arrays.out(n, c), arrays.update(np.zeros(c), "f32"), again,
                     arrays.out(parts, c, dtype="f32"), arrays.read(dout), None, x, w, rstd, eps=eps)
    assert (arrays.bits(out) == arrays.bits(again)).all()


@pytest.mark.parametrize("storage", ["f32", "bf16"])
def test_rmsnorm_backward_gives_the_same_bits_twice(dev, storage):
    def run():
        arrays = Arrays(dev, storage)
        results, _ = backward(arrays, np.random.default_rng(1), (1030, 64, PARTS, 1e-6))
        return dict(zip(("dinp", "dweight", "out"), map(arrays.bits, results), strict=True))
    same_bits(run)
