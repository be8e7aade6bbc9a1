"""A linear layer whole, products and bias, and the kernels of the bias's gradient; test_gemm.py has the products."""

import numpy as np
import pytest
from harness import TENSOR_CORES, Arrays, f64, gate, rounded, same_bits

from apr.buffers import PARTS
from apr.ops.linear import bias_backward, linear_backward, linear_forward
from apr.reference import linear as reference

SHAPES = [(1, 64, 48), (17, 123, 37), (127, 1152, 896), (129, 37, 123), (33, 64, 64)]  # N, O, I; one square weight


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_forward_matches_reference(arrays, gemm, rng, shape):
    n, o, i = shape
    inp, weight, bias = (arrays.round(rng.standard_normal(s)) for s in ((n, i), (o, i), (o,)))
    out = arrays.out(n, o)
    linear_forward(gemm, out, arrays.read(inp), arrays.read(weight), arrays.read(bias))
    x, w, b = f64(inp, weight, bias)
    arrays.judge("out", out, reference.bias_forward(reference.linear_forward(x, w), b), gate("linear"),
                 lambda: rounded(reference.bias_forward(rounded(reference.linear_forward(inp, weight)), bias)))


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_backward_matches_reference(arrays, gemm, rng, shape):
    n, o, i = shape
    inp, weight, dout = (arrays.round(rng.standard_normal(s)) for s in ((n, i), (o, i), (n, o)))
    start = rng.standard_normal((o, i)).astype(np.float32)
    dinp, dweight = arrays.out(n, i), arrays.update(start, "f32")
    linear_backward(gemm, dinp, dweight, arrays.read(dout), arrays.read(inp), arrays.read(weight), add=True)
    truth_dweight = f64(start)[0]
    truth = reference.linear_backward(truth_dweight, *f64(dout, inp, weight))
    arrays.judge("dinp", dinp, truth, gate("linear"), lambda: rounded(dout @ weight))
    arrays.judge("dweight", dweight, truth_dweight, gate("linear") if arrays.storage == "f32" else TENSOR_CORES)


def bias_gradient(arrays, rng, n, o, parts):
    """dbias, where it started, dout."""
    dout, start = arrays.round(rng.standard_normal((n, o))), rng.standard_normal(o).astype(np.float32)
    dbias = arrays.update(start, "f32")
    bias_backward(arrays.dev, dbias, arrays.out(parts, o, dtype="f32"), arrays.read(dout))
    return dbias, start, dout


@pytest.mark.parametrize("parts", [3, PARTS])
@pytest.mark.parametrize("shape", [*SHAPES, (1030, 64, 1)])
def test_linear_bias_backward_matches_reference(arrays, rng, shape, parts):
    dbias, start, dout = bias_gradient(arrays, rng, *shape[:2], parts)
    truth = f64(start)[0]
    reference.bias_backward(truth, f64(dout)[0])
    arrays.judge("dbias", dbias, truth, gate("linear"))


@pytest.mark.parametrize("storage", ["f32", "bf16"])
def test_linear_bias_backward_gives_the_same_bits_twice(dev, storage):
    def run():
        arrays = Arrays(dev, storage)
        return {"dbias": arrays.bits(bias_gradient(arrays, np.random.default_rng(1), 1030, 123, PARTS)[0])}
    same_bits(run)
