"""Every known fault of the forward ops, planted: the cause is named, with its number, in float32 and in bfloat16."""

import math

import numpy as np
import pytest
from planted import BF16, FP32, FP32_PRODUCTS, bf16, cause_of, normal

from apr.config import IGNORE, RopeScaling

F = np.float32
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
SHORT = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)


def both(op, args, got, kind, value=None, rel=1e-4, tolerance=FP32_PRODUCTS, in_bf16=True, **more):
    """Demand the kind and the value of a float32 result, and of the same in bfloat16 where that can be told."""
    assert got.dtype == F
    for result, allowed in ((got, tolerance), (bf16(got), BF16))[:2 if in_bf16 else 1]:
        cause = cause_of(op, args, result, allowed, **more)
        assert (cause.kind, cause.op) == (kind, op), cause
        assert cause.explains <= allowed
        if value is not None:
            assert cause.value == pytest.approx(value, rel=rel if allowed is not BF16 else 0.2, abs=1e-12), cause


def norm(x, eps, mean=True):
    square = (x * x).mean(-1, keepdims=True) if mean else (x * x).sum(-1, keepdims=True)
    return (x / np.sqrt(square + F(eps))).astype(F)


@pytest.mark.parametrize("shape", [(2, 16, 96), (1, 32, 896)])
@pytest.mark.parametrize(("eps", "wrong"), [(1e-6, 1e-5), (1e-5, 1e-6), (1e-6, 0.0), (1e-6, 2e-4)])
def test_eps(rng, shape, eps, wrong):
    x, weight = normal(rng, *shape, size=0.02), normal(rng, shape[-1])
    got = norm(x, wrong) * weight
    both("rmsnorm", {"x": x, "weight": weight, "eps": eps}, got, "eps", wrong, in_bf16=abs(wrong - eps) > 5e-6,
         rel=2e-3)


def test_eps_where_activations_are_large(rng):
    """The effect is five in a million, the tolerance one; a constant factor would explain it nearly as well."""
    x, weight = normal(rng, 2, 32, 896), normal(rng, 896)
    cause = cause_of("rmsnorm", {"x": x, "weight": weight, "eps": 1e-6}, norm(x, 1e-5) * weight, FP32)
    assert cause.kind == "eps" and cause.value == pytest.approx(1e-5, rel=0.05)


def test_the_sentence_names_both_numbers(rng):
    x, weight = normal(rng, 32, 64, size=0.02), normal(rng, 64)
    cause = cause_of("rmsnorm", {"x": x, "weight": weight, "eps": 1e-6}, norm(x, 1e-5) * weight)
    assert cause.text == "RMSNorm's eps is 1e-05, the configuration says 1e-06"


@pytest.mark.parametrize(("kind", "fault"), [
    ("gain_missing", lambda x, w: norm(x, 1e-6)), ("gain_plus_one", lambda x, w: norm(x, 1e-6) * (w + 1)),
    ("mean_subtracted", lambda x, w: norm(x - x.mean(-1, keepdims=True), 1e-6) * w),
    ("sum_not_mean", lambda x, w: norm(x, 1e-6, mean=False) * w)])
@pytest.mark.parametrize("shape", [(2, 7, 64), (2, 16, 4, 32)])
def test_rmsnorm(rng, kind, fault, shape):
    x, weight = normal(rng, *shape) + F(0.3), normal(rng, shape[-1])
    both("rmsnorm", {"x": x, "weight": weight, "eps": 1e-6}, fault(x, weight), kind)


def pair_rows(w, hs, back=False):
    out = np.empty_like(w)
    for head in range(w.shape[0] // hs):
        for i in range(hs // 2):
            for half in (0, 1):
                a, b = head * hs + 2 * i + half, head * hs + i + half * hs // 2
                out[b if back else a] = w[a if back else b]
    return out


@pytest.mark.parametrize(("shape", "kind", "fault"), [
    ((64, 64), "transposed", lambda x, w: x @ w), ((96, 48), "transposed", lambda x, w: x @ w.reshape(48, 96)),
    ((96, 48), "half", lambda x, w: x @ np.concatenate([w[48:], w[:48]]).T),
    ((96, 48), "half", lambda x, w: np.concatenate([x[..., 24:], x[..., :24]], -1) @ w.T),
    ((96, 48), "pair_order", lambda x, w: x @ pair_rows(w, 32).T),
    ((96, 48), "pair_order", lambda x, w: x @ pair_rows(w, 16, back=True).T)])
def test_linear(rng, shape, kind, fault):
    x, weight = normal(rng, 2, 9, shape[1]), normal(rng, *shape)
    both("linear", {"x": x, "weight": weight}, fault(x, weight), kind)


def test_linear_with_tf32_operands(rng):
    x, weight = normal(rng, 2, 9, 512), normal(rng, 64, 512)
    tf32 = lambda a: ((a.view(np.uint32) + 0x1000) & 0xFFFFE000).astype(np.uint32).view(F)  # noqa: E731
    cause = cause_of("linear", {"x": x, "weight": weight}, tf32(x) @ tf32(weight).T)
    assert (cause.kind, cause.value) == ("precision", 10)
    cause = cause_of("linear", {"x": x, "weight": weight}, bf16(x) @ bf16(weight).T)
    assert (cause.kind, cause.value) == ("precision", 7)


@pytest.mark.parametrize(("kind", "value", "fault"), [
    ("bias_missing", None, lambda x, b: x.copy()), ("bias_twice", None, lambda x, b: x + b + b),
    ("bias_displaced", 1, lambda x, b: x + np.roll(b, -1)), ("bias_displaced", -32, lambda x, b: x + np.roll(b, 32))])
def test_bias(rng, kind, value, fault):
    x, bias = normal(rng, 2, 9, 128), normal(rng, 128)
    both("bias", {"x": x, "bias": bias}, fault(x, bias), kind, value, tolerance=FP32)


def test_the_bias_of_a_neighbour_is_named(rng):
    x, bias, other = normal(rng, 2, 9, 128), normal(rng, 128), normal(rng, 128)
    cause = cause_of("bias", {"x": x, "bias": bias}, x + other, k_bias=other)
    assert cause.kind == "operand" and "k_bias" in cause.text


def turn(x, angles, pairs=False):
    """x (B, T, n, HS) by angles (B, T, HS/2), pair by pair."""
    cos, sin = (f(angles).astype(F)[:, :, None] for f in (np.cos, np.sin))
    half, out = x.shape[-1] // 2, np.empty_like(x)
    a, b = (slice(0, None, 2), slice(1, None, 2)) if pairs else (slice(0, half), slice(half, None))
    out[..., a], out[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., b] * cos + x[..., a] * sin
    return out


def angles(positions, hs, theta, scaling=None):
    inverse = np.array([theta ** (-2 * i / hs) for i in range(hs // 2)])
    if scaling is not None:
        for i, f in enumerate(inverse):
            length = 2 * math.pi / f
            low = scaling.original_max_position_embeddings / scaling.low_freq_factor
            high = scaling.original_max_position_embeddings / scaling.high_freq_factor
            blend = min(1.0, max(0.0, (scaling.original_max_position_embeddings / length - scaling.low_freq_factor)
                                 / (scaling.high_freq_factor - scaling.low_freq_factor)))
            inverse[i] = f if length < high else f / scaling.factor if length > low else (
                (1 - blend) * f / scaling.factor + blend * f)
    return np.broadcast_to(np.asarray(positions)[..., None] * inverse, (2, *np.shape(positions)[-1:], hs // 2))


@pytest.mark.parametrize(("T", "start"), [(17, 0), (130, 0), (2, 5000)])
@pytest.mark.parametrize(("theta", "wrong"), [(1e6, 1e4), (1e6, 5e5), (1e4, 1e6), (1e4, 123456.0)])
def test_theta(rng, T, start, theta, wrong):
    x, positions = normal(rng, 2, T, 3, 64), start + np.arange(T)
    got = turn(x, angles(positions, 64, wrong))
    args = {"x": x, "positions": positions, "theta": theta, "scaling": None}
    both("rope", args, got, "theta", wrong, rel=1e-3, in_bf16=start == 0)
    back = {"dout" if name == "x" else name: value for name, value in args.items()}
    both("rope_dinp", back, turn(x, -angles(positions, 64, wrong)), "theta", wrong, rel=1e-3, in_bf16=start == 0)


@pytest.mark.parametrize("wrong", [777.0, 4.1e7])
def test_theta_of_a_long_sequence(rng, wrong):
    """Late positions turn many times within a step of the grid: the early ones say where to look."""
    x, positions = normal(rng, 2, 3000, 1, 32), np.arange(3000)
    cause = cause_of("rope", {"x": x, "positions": positions, "theta": 1e6, "scaling": None},
                     turn(x, angles(positions, 32, wrong)))
    assert cause.kind == "theta" and cause.value == pytest.approx(wrong, rel=1e-4), cause


P = np.arange(9)
ROTATIONS = [
    ("not_rotated", None, P, lambda x, s: x.copy()),
    ("direction", None, P, lambda x, s: turn(x, -s * angles(P, 32, 1e4))),
    ("pairs", None, P, lambda x, s: turn(x, s * angles(P, 32, 1e4), pairs=True)),
    *(("position", k, P + 5, lambda x, s, k=k: turn(x, s * angles(P + 5 + k, 32, 1e4))) for k in (-2, -1, 1, 2)),
    ("position", None, P, lambda x, s: turn(x, s * angles(np.arange(18).reshape(2, 9), 32, 1e4))),
    ("position", None, P + 5, lambda x, s: turn(x, s * angles(P, 32, 1e4)))]


@pytest.mark.parametrize(("kind", "value", "positions", "fault"), ROTATIONS)
@pytest.mark.parametrize(("op", "given", "sign"), [("rope", "x", 1), ("rope_dinp", "dout", -1)])
def test_rotation(rng, kind, value, positions, fault, op, given, sign):
    x = normal(rng, 2, 9, 3, 32)
    both(op, {given: x, "positions": positions, "theta": 1e4, "scaling": None}, fault(x, sign), kind, value)


@pytest.mark.parametrize(("scaling", "wrong"), [(SHORT, None), (None, SCALING)])
def test_rope_scaling(rng, scaling, wrong):
    x, positions = normal(rng, 2, 60, 2, 32), np.arange(60) + 100
    both("rope", {"x": x, "positions": positions, "theta": 5e5, "scaling": scaling},
         turn(x, angles(positions, 32, 5e5, wrong)), "scaling")
    both("rope_dinp", {"dout": x, "positions": positions, "theta": 5e5, "scaling": scaling},
         turn(x, -angles(positions, 32, 5e5, wrong)), "scaling")


@pytest.mark.parametrize(("kind", "fault"), [
    ("addend_missing", lambda a, b: b.copy()), ("addend_missing", lambda a, b: a.copy()),
    ("addend_twice", lambda a, b: a + a + b), ("addend_twice", lambda a, b: a + b + b)])
@pytest.mark.parametrize("op", ["residual", "add"])
def test_residual(rng, kind, fault, op):
    a, b = normal(rng, 2, 9, 64), normal(rng, 2, 9, 64)
    both(op, {"a": a, "b": b}, fault(a, b), kind, tolerance=FP32)


def erf(x):
    return np.array([math.erf(v) for v in x.reshape(-1)]).reshape(x.shape).astype(F)


def sigmoid(x):
    return (1 / (1 + np.exp(-x))).astype(F)


FAKES = {"gelu,": lambda x: F(0.5) * x * (1 + erf(x / F(math.sqrt(2)))),
         "tanh": lambda x: F(0.5) * x * (1 + np.tanh(F(math.sqrt(2 / math.pi)) * (x + F(0.044715) * x ** 3))),
         "1.702": lambda x: x * sigmoid(F(1.702) * x), "relu": lambda x: np.maximum(x, 0), "is sigmoid,": sigmoid}


@pytest.mark.parametrize("name", FAKES)
def test_activation(rng, name):
    gate, up = normal(rng, 2, 9, 128), normal(rng, 2, 9, 128)
    for op, args, got in (("silu", {"gate": gate}, FAKES[name](gate)),
                          ("swiglu", {"gate": gate, "up": up}, FAKES[name](gate) * up)):
        both(op, args, got, "activation")
        assert name in cause_of(op, args, got).text


@pytest.mark.parametrize(("kind", "fault"), [
    ("exchanged", lambda g, u: u * sigmoid(u) * g), ("activation_missing", lambda g, u: g * u),
    ("operand", lambda g, u: g * sigmoid(g)), ("operand", lambda g, u: u * sigmoid(u))])
def test_swiglu(rng, kind, fault):
    gate, up = normal(rng, 2, 9, 128), normal(rng, 2, 9, 128)
    both("swiglu", {"gate": gate, "up": up}, fault(gate, up), kind)


def test_silu_missing(rng):
    gate = normal(rng, 2, 9, 128)
    both("silu", {"gate": gate}, gate.copy(), "activation_missing")


def losses(logits, targets):
    out = np.zeros(targets.size, F)
    for n, target in enumerate(targets.reshape(-1)):
        row = logits.reshape(targets.size, -1)[n]
        out[n] = 0 if target == IGNORE else np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
    return out


def next_row(array, by):
    """As a kernel that is off by a row reads it: what lies beyond is someone else's."""
    return np.roll(array, -by, axis=0)


@pytest.mark.parametrize(("kind", "value", "fault"), [
    ("log_base", None, lambda x, t: losses(x, t) / F(math.log(2))),
    ("logits_row", 1, lambda x, t: losses(next_row(x, 1), t)),
    ("logits_row", -1, lambda x, t: losses(next_row(x, -1), t)),
    ("target_row", 1, lambda x, t: losses(x, next_row(t, 1))),
    ("target_row", -1, lambda x, t: losses(x, next_row(t, -1))),
    ("ignored_counted", None, lambda x, t: losses(x, np.where(t == IGNORE, 0, t))),
    ("row_missing", None, lambda x, t: np.append(losses(x, t)[:-1], F(0))),
    ("displaced", 1, lambda x, t: next_row(losses(x, t), 1))])
def test_cross_entropy(rng, kind, value, fault):
    logits, targets = normal(rng, 40, 50, size=3.0), rng.integers(0, 50, 40)
    targets[[3, 17]] = IGNORE
    both("cross_entropy", {"logits": logits, "targets": targets}, fault(logits, targets), kind, value, in_bf16=False)


@pytest.mark.parametrize(("kind", "fault"), [
    ("sum_not_mean", lambda x: x.sum() / x.size), ("sum_not_mean", lambda x: x.sum() / (x > 0).sum()),
    ("row_missing", lambda x: x[:-1].sum())])
def test_loss_sum(rng, kind, fault):
    x = np.abs(normal(rng, 40))
    x[5] = 0
    both("loss_sum", {"losses": x}, np.array([fault(x)], F), kind, in_bf16=False)


def test_embedding_of_other_ids(rng):
    table, ids = normal(rng, 30, 16), rng.integers(1, 29, (2, 9))
    both("embedding", {"ids": ids, "table": table}, table[ids + 1], "id", 1)
    both("embedding", {"ids": ids, "table": table}, table[ids - 1], "id", -1)


def test_a_mask_one_too_far_within_tiles(rng):
    """The last row of a tile of 32 is right, since the next key is in the next tile; the last of all sees zeros."""
    t, hs = 70, 16
    q, k, v = (normal(rng, 1, t, 1, hs) for _ in range(3))
    padded = [np.concatenate([x[0, :, 0].astype(float), np.zeros((1, hs))]) for x in (k, v)]
    score = hs ** -0.5 * q[0, :, 0].astype(float) @ padded[0].T
    ahead = np.where(np.isin(np.arange(t), (31, 63)), 0, 1)
    score[np.arange(t + 1) > (np.arange(t) + ahead)[:, None]] = -np.inf
    prob = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    cause = cause_of("attention", {"q": q, "k": k, "v": v, "scale": hs ** -0.5}, (prob @ padded[1])[None].astype("f4"))
    assert cause.kind == "mask_ahead" and "rows 0..30, 32..62, 64..69 of 70" in cause.text
