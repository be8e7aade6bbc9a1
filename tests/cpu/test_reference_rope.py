"""The reference's rotary positions: split-half pairs, the config's theta, Llama 3's scaling, the inverse rotation."""

import math

import numpy as np
import pytest
from compare import assert_close, finite_difference_error

from apr.config import RopeScaling
from apr.reference.rope import inverse_frequencies, rope_backward, rope_forward, rope_tables

FINITE_DIFFERENCE = 1e-7  # the project's gate; linear, so only rounding remains; measured worst 5e-11
FLOAT32 = 1e-6  # relative L2 of float32: elementwise; measured worst 5e-8
EXACT = 1e-12  # float64, the same mathematics in another order
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
CASES = [(16, 1e4, None), (2, 1e4, None), (6, 1e6, None), (64, 5e5, LLAMA3)]  # HS, theta, scaling


def tables(t, hs, theta, scaling, dtype=np.float64):
    return rope_tables(np.arange(t), hs, theta, scaling, np.dtype(dtype))


@pytest.mark.parametrize(("hs", "theta", "scaling"), CASES)
@pytest.mark.parametrize("t", [1, 7, 33])
def test_rope_backward_matches_finite_differences(rng, t, hs, theta, scaling):
    x, dout = rng.standard_normal((2, 2, t, 3, hs))
    angles = tables(t, hs, theta, scaling)
    dx = rope_backward(dout, *angles)
    error = finite_difference_error(lambda: float((rope_forward(x, *angles) * dout).sum()), x, dx, rng, h=1e-4)
    assert error <= FINITE_DIFFERENCE
    assert_close(rope_backward(rope_forward(x, *angles), *angles), x, EXACT, "turned and turned back")


def test_rope_float32_matches_float64(rng):
    x = rng.standard_normal((2, 129, 3, 64))
    ours = rope_forward(x.astype(np.float32), *tables(129, 64, 1e6, None, np.float32))
    assert ours.dtype == np.float32
    assert_close(ours, rope_forward(x, *tables(129, 64, 1e6, None)), FLOAT32, "out")


def test_rope_tables_stay_exact_at_far_positions():
    """Angles of tens of thousands of radians lose four digits in float32, so they are float64 whatever the dtype."""
    positions = [0, 1, 4095, 131071]
    ours = rope_tables(np.array(positions), 64, 5e5, None, np.dtype(np.float32))
    for table, function in zip(ours, (math.cos, math.sin), strict=True):
        truth = [[[function(t * 5e5 ** (-i / 32)) for i in range(32)]] for t in positions]
        assert table.dtype == np.float32
        assert np.abs(table - np.array(truth)).max() <= 2**-24, "float32 rounding of a number up to 1"


@pytest.mark.parametrize(("hs", "theta", "scaling"), CASES)
def test_rope_preserves_norms_and_leaves_position_0(rng, hs, theta, scaling):
    x = rng.standard_normal((2, 9, 3, hs))
    out, half = rope_forward(x, *tables(9, hs, theta, scaling)), hs // 2
    assert (out[:, 0] == x[:, 0]).all()
    assert not np.isclose(out[:, 1:], x[:, 1:]).all()
    pairs = [np.hypot(a[..., :half], a[..., half:]) for a in (out, x)]
    assert_close(pairs[0], pairs[1], EXACT, "length of every pair (i, i + HS/2)")


@pytest.mark.parametrize(("hs", "theta", "scaling"), CASES)
def test_rope_dot_products_depend_on_the_distance_only(rng, hs, theta, scaling):
    q, k = rng.standard_normal((2, hs))
    angles = tables(20, hs, theta, scaling)
    q, k = (rope_forward(np.broadcast_to(a, (1, 20, 1, hs)), *angles)[0, :, 0] for a in (q, k))
    scores = q @ k.T
    for distance in range(5):
        diagonal = np.diagonal(scores, -distance)
        assert_close(diagonal, np.full(20 - distance, diagonal[0]), EXACT, f"q·k at distance {distance}")
    assert not np.isclose(scores[0, 0], scores[3, 0]), "the distance must matter"


def test_rope_pairs_split_halves_by_hand():
    """Channel 1 of 4 turns with channel 3 (not with 0 or 2), by theta^(-2/4) radians per position."""
    x = np.zeros((1, 3, 1, 4))
    x[..., 1] = 1.0
    out = rope_forward(x, *tables(3, 4, 1e4, None))[0, :, 0]
    expected = [[0, math.cos(t / 100), 0, math.sin(t / 100)] for t in range(3)]
    assert_close(out, np.array(expected), EXACT, "one channel")


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_rope_frequencies_follow_theta(theta):
    expected = np.array([theta ** (-2 * i / 10) for i in range(5)])
    assert_close(inverse_frequencies(10, theta, None), expected, EXACT, "radians per position")


def test_rope_llama3_scaling_by_hand():
    """Wavelength over 64/1: slowed by 8. Under 64/4: left alone. Between: blended by its turns in 64 positions."""
    plain, scaled = inverse_frequencies(64, 5e5, None), inverse_frequencies(64, 5e5, LLAMA3)
    expected = []
    for frequency in plain:
        turns = 64 * frequency / (2 * math.pi)
        blend = 1 if turns > 4 else 0 if turns < 1 else (turns - 1) / 3
        expected.append((1 - blend) * frequency / 8 + blend * frequency)
    assert_close(scaled, np.array(expected), EXACT, "radians per position")
    ratio = scaled / plain
    assert ratio[0] == 1
    assert np.isclose(ratio[-1], 1 / 8)
    assert ((ratio > 0.126) & (ratio < 0.999)).any(), "some wave must lie in the blend"
