"""The SwiGLU kernels: gates of 0 and of ±100, odd widths, and backward in place, as the layer uses it."""

import numpy as np
import pytest
from harness import Arrays, f64, gate, rounded, same_bits

from apr.ops.swiglu import swiglu_backward, swiglu_forward
from apr.reference import swiglu as reference

SHAPES = [(1, 64), (17, 123), (127, 37), (129, 4864), (3, 2)]  # N, F


def some(arrays, rng, shape):
    """gate, up and dact as stored; gates of 100, -100 and 0 in each row."""
    gates, up, dact = (arrays.round(rng.standard_normal(shape) * s) for s in (3, 1, 1))
    gates[:, :2] = [100, -100]
    gates[:, 2:3] = 0
    return gates, up, dact


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_forward_matches_reference(arrays, rng, shape):
    gates, up, _ = some(arrays, rng, shape)
    act = arrays.out(*shape)
    swiglu_forward(arrays.dev, act, arrays.read(np.concatenate([gates, up], axis=1)))
    truth = reference.swiglu_forward(*f64(gates, up))
    naive = rounded(reference.swiglu_forward(gates, up))
    arrays.judge("act", act, truth, gate("swiglu"), lambda: naive)
    usual = (slice(None), slice(2, None))  # without the two huge ones, which would hide the rest
    if shape[1] > 3:
        arrays.judge("act of usual gates", act, truth, gate("swiglu"), lambda: naive, usual)


def backward(arrays, rng, shape, in_place):
    """dgate_up, the activation written again; gate, up and dact."""
    gates, up, dact = some(arrays, rng, shape)
    both = np.concatenate([gates, up], axis=1)
    gate_up, d = (arrays.update(both), arrays.update(dact)) if in_place else (arrays.read(both), arrays.read(dact))
    dgate_up, act = (gate_up, d) if in_place else (arrays.out(shape[0], 2 * shape[1]), arrays.out(*shape))
    swiglu_backward(arrays.dev, dgate_up, act, d, gate_up)
    return dgate_up, act, (gates, up, dact)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_backward_matches_reference(arrays, rng, shape, in_place):
    f = shape[1]
    dgate_up, act, (gates, up, dact) = backward(arrays, rng, shape, in_place)
    dgate, dup = reference.swiglu_backward(*f64(dact, gates, up))
    truth = np.concatenate([dgate, dup], axis=1)
    naive = rounded(np.concatenate(reference.swiglu_backward(dact, gates, up), axis=1))
    parts = {"dgate": slice(0, f), "dup": slice(f, None)}
    if f > 3:
        parts["dup of usual gates"] = slice(f + 2, None)
    for name, part in parts.items():
        arrays.judge(name, dgate_up, truth, gate("swiglu"), lambda: naive, (slice(None), part))
    arrays.judge("act", act, reference.swiglu_forward(*f64(gates, up)), gate("swiglu"),
                 lambda: rounded(reference.swiglu_forward(gates, up)))


@pytest.mark.parametrize("storage", ["f32", "bf16"])
def test_swiglu_gives_the_same_bits_twice(dev, storage):
    def run():
        arrays = Arrays(dev, storage)
        dgate_up, act, _ = backward(arrays, np.random.default_rng(1), (129, 123), False)
        return {"dgate_up": arrays.bits(dgate_up), "act": arrays.bits(act)}
    same_bits(run)
