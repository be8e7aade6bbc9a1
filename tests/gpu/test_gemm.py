"""Matrix products by cuBLASLt: exact float32 (no TF32), odd shapes, accumulation, choices kept and reused."""

import numpy as np
import pytest
from harness import TENSOR_CORES, Arrays, f64, gate, rounded, same_bits

from apr.buffers import WORKSPACE
from apr.errors import AprError, KernelError, LaunchError
from apr.gemm import R_16BF, R_32F, Gemm, Shape
from apr.gemm_table import table_path

# N, O, I: one row; every size odd; a layer of qwen2_0_5b; one output; a sum longer than 4096
SHAPES = [(1, 64, 64), (17, 123, 37), (127, 1152, 896), (129, 96, 5), (33, 64, 8192), (256, 128, 128)]
LONG = 1e-5  # float32 products of K > 4096: the error grows with sqrt(K) where the sum is sequential


def some(arrays, rng, shape):
    """inp, weight and dout as stored."""
    n, o, i = shape
    return (arrays.round(rng.standard_normal(s)) for s in ((n, i), (o, i), (n, o)))


def tolerance(k):
    """Relative L2 of a float32 product over k; TF32 would be 3e-4."""
    return gate("linear") if k <= 4096 else LONG


@pytest.mark.parametrize("shape", SHAPES)
def test_gemm_linear_forward_matches_reference(arrays, gemm, rng, shape):
    n, o, i = shape
    inp, weight, _ = some(arrays, rng, shape)
    out = arrays.out(n, o)
    gemm.linear(out, arrays.read(inp), arrays.read(weight))
    x, w = f64(inp, weight)
    arrays.judge("out", out, x @ w.T, tolerance(i), lambda: rounded(inp @ weight.T))


@pytest.mark.parametrize("shape", SHAPES)
def test_gemm_linear_with_bias_matches_reference(arrays, gemm, rng, shape):
    """Rounded once: no worse than a product and a bias that are added before they are rounded."""
    n, o, i = shape
    inp, weight, _ = some(arrays, rng, shape)
    bias, out = arrays.round(10 * rng.standard_normal(o)), arrays.out(n, o)
    gemm.linear(out, arrays.read(inp), arrays.read(weight), arrays.read(bias))
    x, w, b = f64(inp, weight, bias)
    arrays.judge("out", out, x @ w.T + b, tolerance(i), lambda: rounded(inp @ weight.T + bias))


@pytest.mark.parametrize("storage", ["f32", "bf16"])
def test_gemm_adds_the_bias_of_each_call_in_a_graph_too(dev, gemm, storage):
    """One product, three biases: called in turns, then recorded, and replayed after another call."""
    arrays, ones, zeros = Arrays(dev, storage), np.ones((128, 64), np.float32), np.zeros((256, 64), np.float32)
    inp, weight = arrays.read(ones), arrays.read(zeros)
    biases = [arrays.read(np.full(256, value, np.float32)) for value in (1.0, 2.0, 4.0)]
    outs, graphs = [arrays.out(128, 256) for _ in biases], []

    def call():
        for out, bias in zip(outs, biases, strict=True):
            gemm.linear(out, inp, weight, bias)

    def found():
        return [sorted(set(arrays.get(out).reshape(-1).tolist())) for out in outs]
    call()
    assert found() == [[1.0], [2.0], [4.0]]
    with dev.capture(graphs):
        call()
    for out in outs:
        dev.fill(out, 0)
    other = arrays.out(128, 256)
    gemm.linear(other, inp, weight, biases[0])
    dev.replay(graphs[0], "biases")
    assert found() == [[1.0], [2.0], [4.0]]


def test_gemm_refuses_a_bias_that_does_not_fit(bf16, gemm):
    inp, weight, out = bf16.read(np.ones((8, 64))), bf16.read(np.ones((32, 64))), bf16.out(8, 32)
    for bias in (bf16.read(np.ones(31)), bf16.read(np.ones(32), "f32")):
        with pytest.raises(LaunchError, match="32x8x64-TN-bf16-bf16-0-bias: bias"):
            gemm.linear(out, inp, weight, bias)
    gemm.linear(out, inp, weight, bf16.read(np.ones(32)))


@pytest.mark.parametrize("shape", SHAPES)
def test_gemm_linear_dinp_backward_matches_reference(arrays, gemm, rng, shape):
    n, o, i = shape
    _, weight, dout = some(arrays, rng, shape)
    dinp = arrays.out(n, i)
    gemm.linear_dinp(dinp, arrays.read(dout), arrays.read(weight))
    d, w = f64(dout, weight)
    arrays.judge("dinp", dinp, d @ w, tolerance(o), lambda: rounded(dout @ weight))


@pytest.mark.parametrize("shape", [*SHAPES, (8192, 64, 33)])
def test_gemm_linear_dweight_backward_matches_reference(arrays, gemm, rng, shape):
    n, o, i = shape
    inp, _, dout = some(arrays, rng, shape)
    start = rng.standard_normal((o, i)).astype(np.float32)
    dweight = arrays.update(start, "f32")
    gemm.linear_dweight(dweight, arrays.read(dout), arrays.read(inp), add=True)
    d, x, begin = f64(dout, inp, start)
    arrays.judge("dweight", dweight, begin + d.T @ x, tolerance(n) if arrays.storage == "f32" else TENSOR_CORES)


@pytest.mark.parametrize("shape", SHAPES)
def test_gemm_linear_dweight_backward_sets_what_is_not_to_be_added_to(arrays, gemm, rng, shape):
    """What was there is NaN, and is not read."""
    n, o, i = shape
    inp, _, dout = some(arrays, rng, shape)
    dweight = arrays.out(o, i, dtype="f32")
    gemm.linear_dweight(dweight, arrays.read(dout), arrays.read(inp), add=False)
    d, x = f64(dout, inp)
    arrays.judge("dweight", dweight, d.T @ x, tolerance(n) if arrays.storage == "f32" else TENSOR_CORES)


def test_gemm_is_not_tf32(f32, gemm, rng):
    """Numbers with bits that TF32 drops: 1 + 2^-12 is 1 there, and the sum of differences would be 0."""
    inp, weight = np.full((64, 512), 1 + 2.0**-12, np.float32), np.ones((64, 512), np.float32)
    out = f32.out(64, 64)
    gemm.linear(out, f32.read(inp), f32.read(weight))
    assert (f32.get(out) == 512 + 0.125).all()


@pytest.mark.parametrize("storage", ["f32", "bf16"])
def test_gemm_gives_the_same_bits_twice(dev, gemm, storage):
    def run():
        arrays, rng = Arrays(dev, storage), np.random.default_rng(1)
        inp, weight, dout = (arrays.read(x) for x in some(arrays, rng, (127, 1152, 896)))
        out, dinp, dweight = arrays.out(127, 1152), arrays.out(127, 896), arrays.update(np.zeros((1152, 896)), "f32")
        gemm.linear(out, inp, weight)
        gemm.linear_dinp(dinp, dout, weight)
        gemm.linear_dweight(dweight, dout, inp, add=True)
        return {"out": arrays.bits(out), "dinp": arrays.bits(dinp), "dweight": arrays.bits(dweight)}
    same_bits(run)


def product(dev, gemm, storage="bf16"):
    """The bits of one product, and its name."""
    arrays, rng = Arrays(dev, storage), np.random.default_rng(2)
    inp, weight, _ = some(arrays, rng, (256, 128, 128))
    out = arrays.out(256, 128)
    gemm.linear(out, arrays.read(inp), arrays.read(weight))
    kind = R_16BF if storage == "bf16" else R_32F
    return arrays.bits(out), Shape(128, 256, 128, True, False, kind, kind)


@pytest.mark.parametrize("storage", ["f32", "bf16"])
def test_gemm_uses_the_choices_that_it_is_given(dev, storage):
    workspace = dev.empty((WORKSPACE,), "u8")
    first = Gemm(dev, workspace)
    bits, shape = product(dev, first, storage)
    name = shape.name(0.0)
    assert list(first.choices) == [name]
    others = first.algorithms(shape, 0.0, 16)
    other = next(o for o in others if o != first.choices[name])
    given = Gemm(dev, workspace, {**first.record(), "algorithms": {name: other}})
    product(dev, given, storage)
    assert given.choices == {name: other}, "the choice given was not used"
    again = Gemm(dev, workspace, first.record())
    assert (product(dev, again, storage)[0] == bits).all() and again.record() == first.record()


@pytest.mark.parametrize("foreign", [{"gpu": "another GPU"}, {"cublaslt": 1}])
def test_gemm_does_not_use_the_choices_of_another_gpu_or_library(dev, foreign):
    """They mean nothing here, so not even nonsense among them matters."""
    workspace = dev.empty((WORKSPACE,), "u8")
    record = {**Gemm(dev, workspace).record(), "algorithms": {"128x256x128-TN-bf16-bf16-0": "ff" * 64}, **foreign}
    product(dev, Gemm(dev, workspace, record))


def test_gemm_takes_the_algorithm_of_the_sum_for_the_product_alone(dev):
    """A table has one of the two: an algorithm does not depend on what is added."""
    workspace, arrays = dev.empty((WORKSPACE,), "u8"), Arrays(dev, "bf16")
    shape, dweight = Shape(128, 128, 256, False, True, R_16BF, R_32F), arrays.update(np.zeros((128, 128)), "f32")
    first = Gemm(dev, workspace)
    others = first.algorithms(shape, 1.0, 16)
    given = Gemm(dev, workspace, {**first.record(), "algorithms": {shape.name(1.0): others[-1]}})
    inp, dout = (arrays.read(np.ones((256, 128), np.float32)) for _ in range(2))
    given.linear_dweight(dweight, dout, inp, add=False)
    assert given.choices == {shape.name(0.0): others[-1]} and others[-1] != others[0]
    both = {shape.name(1.0): "00" * 64, shape.name(0.0): others[0]}
    own = Gemm(dev, workspace, {**first.record(), "algorithms": both})
    own.linear_dweight(dweight, dout, inp, add=False)
    assert own.choices == {shape.name(0.0): others[0]}, "a product's own entry comes first"


@pytest.mark.parametrize("damaged", ["ff" * 64, "00" * 3, "not hex"], ids=["nonsense", "short", "no_hex"])
def test_gemm_refuses_a_damaged_choice(dev, damaged):
    workspace = dev.empty((WORKSPACE,), "u8")
    record = {**Gemm(dev, workspace).record(), "algorithms": {"128x256x128-TN-bf16-bf16-0": damaged}}
    gemm = Gemm(dev, workspace, record)
    with pytest.raises(AprError, match="128x256x128-TN-bf16-bf16-0"):
        product(dev, gemm)


def test_gemm_refuses_a_damaged_table(dev, tmp_path, monkeypatch):
    version = Gemm(dev, dev.empty((WORKSPACE,), "u8")).version
    monkeypatch.setattr("apr.gemm_table.TABLES", tmp_path)
    table_path(dev.name, version).write_text('{"algorithms": 5}')
    with pytest.raises(AprError, match="a table of algorithms"):
        Gemm(dev, dev.empty((WORKSPACE,), "u8"))


def test_gemm_names_the_product_that_it_has_no_algorithm_for(dev):
    """No split sums, no workspace and an output of another type than the library has for these inputs."""
    gemm = Gemm(dev, dev.empty((16,), "u8"))
    shape = Shape(64, 64, 64, True, False, R_32F, R_16BF)
    with pytest.raises(KernelError, match="64x64x64-TN-f32-bf16-0"):
        gemm.algorithms(shape, 0.0, 1)
