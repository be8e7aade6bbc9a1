"""Every known fault of the gradient's norm, its clipping and AdamW, planted."""

import numpy as np
import pytest
from planted import FP32, cause_of, normal

F = np.float32
SETTINGS = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1, "step": 3, "beta1": 0.9, "beta2": 0.999}


def state(rng, size=400):
    """param, grad, m and v before the step."""
    return (normal(rng, size, size=0.02), normal(rng, size, size=1e-3), normal(rng, size, size=1e-3),
            np.square(normal(rng, size, size=1e-3)))


@pytest.mark.parametrize(("kind", "value", "fault"), [
    ("clip_missing", None, lambda m, g, p: F(0.9) * m + F(0.1) * g),
    ("beta", None, lambda m, g, p: F(0.999) * m + F(0.001) * (g * F(0.5))),
    ("beta", 0.7, lambda m, g, p: F(0.7) * m + F(0.3) * (g * F(0.5))),
    ("decay_l2", None, lambda m, g, p: F(0.9) * m + F(0.1) * (g * F(0.5) + F(0.1) * p)),
    ("scaled", -1.0, lambda m, g, p: -(F(0.9) * m + F(0.1) * (g * F(0.5))))])
def test_first_moment(rng, kind, value, fault):
    param, grad, m, _ = state(rng)
    args = {"m": m, "grad": grad, "beta1": 0.9, "grad_scale": np.array([0.5])}
    cause = cause_of("adamw_m", args, fault(m, grad, param), FP32, beta2=0.999, param=param, weight_decay=0.1)
    assert cause.kind == kind and (value is None or cause.value == pytest.approx(value, rel=1e-4)), cause


@pytest.mark.parametrize(("kind", "value", "fault"), [
    ("clip_missing", None, lambda v, g: F(0.999) * v + F(0.001) * g * g),
    ("square_missing", None, lambda v, g: F(0.999) * v + F(0.001) * (g * F(0.5))),
    ("beta", None, lambda v, g: F(0.9) * v + F(0.1) * np.square(g * F(0.5))),
    ("beta", 0.95, lambda v, g: F(0.95) * v + F(0.05) * np.square(g * F(0.5)))])
def test_second_moment(rng, kind, value, fault):
    _, grad, _, v = state(rng)
    args = {"v": v, "grad": grad, "beta2": 0.999, "grad_scale": 0.5}
    cause = cause_of("adamw_v", args, fault(v, grad), FP32, beta1=0.9)
    assert cause.kind == kind and (value is None or cause.value == pytest.approx(value, rel=1e-4)), cause


def update(p, m, v, c1=True, c2=True, eps=1e-8, inside=False, decay=0.1, lr=1.0, root=True, step=3):
    m_hat = m / F(1 - 0.9 ** step) if c1 else m
    v_hat = v / F(1 - 0.999 ** step) if c2 else v
    below = np.sqrt(v_hat + F(eps)) if inside else (np.sqrt(v_hat) if root else v_hat) + F(eps)
    return p * F(1 - 1e-2 * decay) - F(lr * 1e-2) * m_hat / below


@pytest.mark.parametrize(("kind", "value", "fault"), [
    ("correction", None, {"c1": False}), ("correction", None, {"c2": False}),
    ("correction", None, {"c1": False, "c2": False}), ("decay_missing", None, {"decay": 0.0}),
    ("eps_inside", None, {"inside": True}), ("root_missing", None, {"root": False}), ("step", 1, {"step": 4}),
    ("step", -1, {"step": 2}), ("eps", 1e-5, {"eps": 1e-5}), ("eps", 0.0, {"eps": 0.0}),
    ("decay", 0.03, {"decay": 0.03}),
    ("learning_rate", 0.5, {"lr": 0.5}), ("learning_rate", -1.0, {"lr": -1.0}), ("learning_rate", 3.7, {"lr": 3.7}),])
def test_parameter(rng, kind, value, fault):
    param, _, m, v = state(rng)
    cause = cause_of("adamw_param", {"param": param, "m": m, "v": v} | SETTINGS, update(param, m, v, **fault), FP32)
    assert cause.kind == kind, cause
    assert value is None or cause.value == pytest.approx(value, rel=1e-3, abs=1e-9), cause


def test_decay_where_there_should_be_none(rng):
    param, _, m, v = state(rng)
    args = {"param": param, "m": m, "v": v} | SETTINGS | {"weight_decay": 0.0}
    cause = cause_of("adamw_param", args, update(param, m, v, decay=0.01), FP32)
    assert (cause.kind, cause.value) == ("decay", pytest.approx(0.01, rel=1e-2)), cause


def test_norm_and_clip(rng):
    grad = normal(rng, 400)
    cause = cause_of("global_norm", {"grad": grad}, np.array([np.square(grad).sum()]), FP32)
    assert cause.kind == "root_missing"
    norm = np.array([5.0], F)
    for kind, got in (("clip_missing", 1.0), ("clip_square", 0.04)):
        assert cause_of("clip", {"norm": norm, "max_norm": 1.0}, np.array([got], F), FP32).kind == kind
