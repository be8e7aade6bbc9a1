"""The reference's AdamW: against the formula, one step by hand, decay that is decoupled, blocks that do not show."""

import math

import numpy as np
import pytest
from compare import assert_close

from apr.reference.adamw import BLOCK, adamw_update

EXACT = 1e-14  # float64, the formula's operations in another order
FLOAT32 = 1e-6  # relative L2 of float32: elementwise, ten steps; measured worst 2e-7
# An eps that shows.
SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1, "grad_scale": 0.3}


def some(rng, size, kind=np.float64):
    """param, m, v, grad in mid-run; some gradients are zero or tiny."""
    grad = rng.standard_normal(size) * 10.0 ** rng.integers(-6, 2, size)
    grad[::5] = 0
    m, v = 0.1 * rng.standard_normal(size), 0.01 * rng.random(size)
    return [a.astype(kind) for a in (rng.standard_normal(size), m, v, grad)]


def formula(p, m, v, grad, *, lr, beta1, beta2, eps, weight_decay, step, grad_scale):
    """Loshchilov & Hutter's algorithm 2, one line per line."""
    g = grad_scale * grad
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return p - lr * m_hat / (np.sqrt(v_hat) + eps) - lr * weight_decay * p, m, v


@pytest.mark.parametrize("size", [1, 7, BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_adamw_matches_its_formula(rng, size, step):
    state = some(rng, size)
    expected = formula(*state, **SETTINGS, step=step)
    adamw_update(*state, **SETTINGS, step=step)
    for ours, truth, name in zip(state, expected, "pmv", strict=False):
        assert_close(ours, truth, EXACT, name)


def test_adamw_float32_stays_with_float64_for_ten_steps(rng):
    ours, truth = some(rng, 999, np.float32), some(np.random.default_rng(20261120), 999)
    for step in range(1, 11):
        for state in (ours, truth):
            adamw_update(*state, **SETTINGS, step=step)
    for a, b, name in zip(ours, truth, "pmvg", strict=True):
        assert a.dtype == np.float32
        assert_close(a, b, FLOAT32, name)


def test_adamw_first_step_by_hand():
    """m and v start at zero, which the correction undoes: the step is lr * g / (|g| + eps), whatever the betas."""
    param, m, v, grad = np.array([1.0, 1.0]), np.zeros(2), np.zeros(2), np.array([0.5, -4.0])
    adamw_update(param, m, v, grad, lr=0.1, beta1=0.9, beta2=0.999, eps=0.5, weight_decay=0.2, step=1, grad_scale=1.0)
    assert_close(param, np.array([0.98 - 0.1 * 0.5 / 1.0, 0.98 + 0.1 * 4.0 / 4.5]), EXACT, "param")
    assert_close(m, np.array([0.05, -0.4]), EXACT, "m")
    assert_close(v, np.array([0.00025, 0.016]), 1e-12, "v")  # 1 - 0.999 itself is rounded
    assert grad.tolist() == [0.5, -4.0], "gradients are read only"


def test_adamw_decay_is_decoupled(rng):
    """Decay shrinks the weight by lr * weight_decay and enters neither m nor v; without decay nothing moves here."""
    param, m, v, grad = rng.standard_normal(9), np.zeros(9), np.zeros(9), np.zeros(9)
    kept = param.copy()
    adamw_update(param, m, v, grad, **{**SETTINGS, "weight_decay": 0.0}, step=1)
    assert (param == kept).all()
    adamw_update(param, m, v, grad, **SETTINGS, step=2)
    assert_close(param, kept * (1 - 1e-2 * 0.1), EXACT, "param")
    assert not m.any()
    assert not v.any()


def test_adamw_clip_factor_scales_the_gradient(rng):
    scaled, given = some(rng, 99), some(np.random.default_rng(20261120), 99)
    given[3] *= 0.3
    adamw_update(*scaled, **SETTINGS, step=3)
    adamw_update(*given, **{**SETTINGS, "grad_scale": 1.0}, step=3)
    for a, b in zip(scaled[:3], given[:3], strict=True):
        assert_close(a, b, EXACT, "state")


def test_adamw_of_parts_equals_the_whole_to_the_bit(rng):
    """Decayed and undecayed parameters are two ranges of one flat memory: where it is cut must not show."""
    whole, parts = some(rng, BLOCK + 100, np.float32), some(np.random.default_rng(20261120), BLOCK + 100, np.float32)
    adamw_update(*whole, **SETTINGS, step=5)
    for part in (slice(0, 77), slice(77, None)):
        adamw_update(*(a[part] for a in parts), **SETTINGS, step=5)
    for a, b in zip(whole, parts, strict=True):
        assert (a == b).all()


def test_adamw_walks_downhill():
    """A quadratic with its minimum at 3: the sign of the step, seen from far away."""
    state = [np.zeros(1) for _ in range(4)]
    for step in range(1, 400):
        state[3][:] = state[0] - 3
        adamw_update(*state, lr=0.05, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, step=step, grad_scale=1.0)
    assert math.isclose(state[0][0], 3, rel_tol=1e-3)
