"""Every known fault of attention, of the gradients and of AdamW, planted: the cause is named, with its number."""

import math

import numpy as np
import pytest
from planted import BF16, FP32_PRODUCTS, bf16, cause_of, normal

from apr.config import IGNORE

F = np.float32


def both(op, args, got, kind, value=None, rel=1e-3, tolerance=FP32_PRODUCTS, in_bf16=True, **more):
    """Demand the kind and the value of a float32 result, and of the same in bfloat16 where that can be told."""
    got = np.asarray(got, F)
    for result, allowed in ((got, tolerance), (bf16(got), BF16))[:2 if in_bf16 else 1]:
        cause = cause_of(op, args, result, allowed, **more)
        assert (cause.kind, cause.op) == (kind, op), cause
        if value is not None:
            assert cause.value == pytest.approx(value, rel=rel if allowed is not BF16 else 0.2), cause


def attend(a, seen=lambda i, j: j <= i, read=lambda h, g, n: h // g, divide=True, scale=None):
    """Attention by loops, T = S: out (B, T, NH, HS) and the probabilities by [b][h]."""
    q, k, v, (b, t, nh, hs), nkv = a["q"], a["k"], a["v"], a["q"].shape, a["k"].shape[2]
    out, probs = np.zeros((b, t, nh, hs), F), {}
    mask = np.array([[seen(i, j) or (j == 0 and not any(seen(i, m) for m in range(t))) for j in range(t)]
                     for i in range(t)])
    for n in range(b):
        for h in range(nh):
            head = read(h, nh // nkv, nkv)
            score = np.where(mask, (a["scale"] if scale is None else scale) * (q[n, :, h] @ k[n, :, head].T), -np.inf)
            p = np.exp(score - score.max(-1, keepdims=True))
            probs[n, h] = p / p.sum(-1, keepdims=True) if divide else p
            out[n, :, h] = probs[n, h] @ v[n, :, head]
    return out.reshape(b, t, -1), probs


def gradients(a, mean=True, scaled=True, add=lambda h, g, n: h // g, **how):
    """dq, dk, dv of `attend`, by loops."""
    q, k, v, nh, nkv = a["q"], a["k"], a["v"], a["q"].shape[2], a["k"].shape[2]
    read, scale = how.get("read", lambda h, g, n: h // g), a["scale"] if how.get("scale") is None else how["scale"]
    _, probs = attend(a, **how)
    dq, dk, dv = np.zeros(q.shape, F), np.zeros(k.shape, F), np.zeros(v.shape, F)
    for (n, h), p in probs.items():
        dout, head, to = a["dout"].reshape(q.shape)[n, :, h], read(h, nh // nkv, nkv), add(h, nh // nkv, nkv)
        dp = dout @ v[n, :, head].T
        ds = p * (dp - (dp * p).sum(-1, keepdims=True) if mean else dp) * F(scale if scaled else 1.0)
        dq[n, :, h] = ds @ k[n, :, head]
        if to is not None:
            dk[n, :, to] += ds.T @ q[n, :, h]
            dv[n, :, to] += p.T @ dout
    return {"q": dq, "k": dk, "v": dv}


def inputs(rng, b=2, t=12, nh=14, nkv=2, hs=16, dout=False):
    args = {"q": normal(rng, b, t, nh, hs), "k": normal(rng, b, t, nkv, hs), "v": normal(rng, b, t, nkv, hs),
            "scale": hs ** -0.5}
    return args | ({"dout": normal(rng, b, t, nh * hs)} if dout else {})


MASKS = [("mask_missing", None, {"seen": lambda i, j: True}), ("mask_ahead", None, {"seen": lambda i, j: j <= i + 1}),
         ("mask_behind", None, {"seen": lambda i, j: j < i}), ("scale", 1.0, {"scale": 1.0}),
         ("scale", 1 / 16, {"scale": 1 / 16}), ("scale", 0.2, {"scale": 0.2})]
HEADS = {"read": lambda h, g, n: h % n}
SIZES = [{}, {"nh": 4, "nkv": 2, "t": 33}]


@pytest.mark.parametrize("size", SIZES, ids=["7 to 1", "2 to 1"])
@pytest.mark.parametrize(("kind", "value", "fault"), [*MASKS, ("head_map", None, HEADS),
                                                      ("not_normalised", None, {"divide": False})])
def test_attention(rng, size, kind, value, fault):
    args = inputs(rng, **size)
    both("attention", args, attend(args, **fault)[0], kind, value)


def test_attention_of_exchanged_or_missing_keys(rng):
    args = inputs(rng)
    both("attention", args, attend(args | {"k": args["v"], "v": args["k"]})[0], "exchanged")
    both("attention", args, attend(args, seen=lambda i, j: j <= i and j < 9)[0], "keys_ignored", 9)
    small = args | {"q": args["q"] * F(0.2)}  # the exponential alone overflows for scores that are large
    got = np.stack([[sum(np.exp(small["scale"] * (small["q"][b, t] * small["k"][b, j].repeat(7, 0)).sum(-1))[:, None]
                         * small["v"][b, j].repeat(7, 0) for j in range(t + 1)).reshape(-1) for t in range(12)]
                    for b in range(2)])
    both("attention", small, got, "not_normalised")


def test_the_last_query_over_kept_keys(rng):
    args = inputs(rng, t=40)
    last = args | {"q": args["q"][:, -1:]}
    for kind, fault in (("scale", {"scale": 0.1}), ("head_map", HEADS), ("mask_behind", {"seen": lambda i, j: j < i})):
        both("attention", last, attend(args, **fault)[0][:, -1:], kind)


@pytest.mark.parametrize("size", SIZES, ids=["7 to 1", "2 to 1"])
@pytest.mark.parametrize("which", "qkv")
@pytest.mark.parametrize(("kind", "value", "fault"), [
    *MASKS, ("head_map", None, HEADS | {"add": lambda h, g, n: h % n}), ("mean_term_missing", None, {"mean": False}),
    ("scale", None, {"scaled": False}), ("group_sum", None, {"add": lambda h, g, n: h % n}),
    ("group_sum", None, {"add": lambda h, g, n: h // g if h % g == 0 else None})])
def test_attention_gradients(rng, size, which, kind, value, fault):
    if (which == "v" and ("mean" in fault or "scaled" in fault)) or (which == "q" and kind == "group_sum"):
        return  # this gradient has no such part
    args = inputs(rng, dout=True, **size)
    both(f"attention_d{which}", args, gradients(args, **fault)[which], kind, value)


@pytest.mark.parametrize(("which", "is_"), ["kv", "vk"])
def test_exchanged_gradients(rng, which, is_):
    args = inputs(rng, dout=True)
    both(f"attention_d{which}", args, gradients(args)[is_], "exchanged")


@pytest.mark.parametrize(("kind", "value", "fault"), [
    ("target_row", 1, lambda p, t: (p - np.eye(50, dtype=F)[np.roll(t, -1)]) / 40),
    ("target_row", -1, lambda p, t: (p - np.eye(50, dtype=F)[np.roll(t, 1)]) / 40),
    ("logits_row", 1, lambda p, t: (np.roll(p, -1, 0) - np.eye(50, dtype=F)[t]) / 40),
    ("one_hot_missing", None, lambda p, t: p / 40), ("factor", 1.0, lambda p, t: p - np.eye(50, dtype=F)[t]),
    ("factor", 0.0213, lambda p, t: F(0.0213) * (p - np.eye(50, dtype=F)[t]))])
def test_dlogits(rng, kind, value, fault):
    logits, targets = normal(rng, 40, 50, size=2.0), rng.integers(0, 50, 40)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    got = fault(p / p.sum(-1, keepdims=True), targets)
    both("dlogits", {"logits": logits, "targets": targets, "dloss": 1 / 40}, got, kind, value)


def test_dlogits_of_ignored_targets(rng):
    logits, targets = normal(rng, 40, 50), rng.integers(0, 50, 40)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    targets[:7] = IGNORE
    got = (p / p.sum(-1, keepdims=True) - np.eye(50, dtype=F)[np.maximum(targets, 0)]) / 33
    both("dlogits", {"logits": logits, "targets": targets, "dloss": 1 / 33}, got, "ignored_counted")


@pytest.mark.parametrize(("op", "shape", "kind", "value", "fault"), [
    ("linear_dinp", (64, 64), "transposed", None, lambda d, x, w: d @ w.T),
    ("linear_dinp", (96, 48), "transposed", None, lambda d, x, w: d @ w.reshape(48, 96).T),
    ("linear_dweight", (96, 48), "transposed", None, lambda d, x, w: (x.T @ d).reshape(96, 48)),
    ("linear_dweight", (64, 64), "transposed", None, lambda d, x, w: x.T @ d),
    ("linear_dweight", (96, 48), "row_missing", None, lambda d, x, w: d[:-1].T @ x[:-1]),
    ("linear_dweight", (96, 48), "twice", None, lambda d, x, w: 2 * (d.T @ x)),
    ("linear_dweight", (96, 48), "displaced", 1, lambda d, x, w: d[:-1].T @ x[1:]),
    ("bias_dbias", (96, 48), "row_missing", None, lambda d, x, w: d[:-1].sum(0)),
    ("bias_dbias", (96, 48), "twice", None, lambda d, x, w: 2 * d.sum(0)),
    ("bias_dbias", (96, 48), "sum_not_mean", None, lambda d, x, w: d.mean(0))])
def test_linear_gradients(rng, op, shape, kind, value, fault):
    dout, x, weight = normal(rng, 20, shape[0]), normal(rng, 20, shape[1]), normal(rng, *shape)
    args = {"linear_dinp": {"weight": weight}, "linear_dweight": {"x": x}, "bias_dbias": {}}[op]
    both(op, {"dout": dout.reshape(2, 10, -1)} | args, fault(dout, x, weight), kind, value)


@pytest.mark.parametrize("bits", [10, 7])
@pytest.mark.parametrize("op", ["linear_dinp", "linear_dweight"])
@pytest.mark.parametrize("add", [0, 1])
def test_products_of_cut_or_rounded_operands(rng, op, bits, add):
    """add 0: the last bits are cut off; 1: half a unit is added first."""
    dout, x, weight = normal(rng, 20, 96), normal(rng, 20, 48), normal(rng, 96, 48)
    low = lambda a: (a.view(np.uint32) + np.uint32(add << 22 - bits) >> 23 - bits << 23 - bits).view(F)  # noqa: E731
    got = low(dout) @ low(weight) if op == "linear_dinp" else low(dout).T @ low(x)
    args = {"dout": dout} | ({"weight": weight} if op == "linear_dinp" else {"x": x})
    both(op, args, got, "precision", bits, in_bf16=False)
    assert ("cut off" in cause_of(op, args, got).text) is (add == 0)


def norm_gradient(d, x, w, eps=1e-6, term=1.0, less=0):
    rstd = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + F(eps))
    norm, dnorm = x * rstd, d * w
    return rstd * (dnorm - F(term) * norm * ((dnorm * norm).sum(-1, keepdims=True) / F(x.shape[-1] - less)))


@pytest.mark.parametrize("shape", [(2, 9, 64), (2, 16, 4, 32)])
@pytest.mark.parametrize(("kind", "value", "fault", "told"), [
    ("norm_term_missing", None, lambda d, x, w: norm_gradient(d, x, w, term=0), True),
    ("wrong_divisor", None, lambda d, x, w: norm_gradient(d, x, w, less=1), False),
    ("gain_missing", None, lambda d, x, w: norm_gradient(d, x, np.ones_like(w)), True),
    ("eps", 1e-5, lambda d, x, w: norm_gradient(d, x, w, eps=1e-5), True)])
def test_rmsnorm_dinp(rng, shape, kind, value, fault, told):
    dout, x, weight = normal(rng, *shape), normal(rng, *shape, size=0.02), normal(rng, shape[-1])
    x += F(0.02)
    both("rmsnorm_dinp", {"dout": dout, "x": x, "weight": weight, "eps": 1e-6}, fault(dout, x, weight), kind, value,
         in_bf16=told)


@pytest.mark.parametrize(("kind", "value", "fault"), [
    ("norm_term_missing", None, lambda d, x, n: (d * x).sum(0)),
    ("row_missing", None, lambda d, x, n: (d * n)[:-1].sum(0)),
    ("twice", None, lambda d, x, n: 2 * (d * n).sum(0)),
    ("eps", 1e-4, lambda d, x, n: (d * x / np.sqrt((x * x).mean(-1, keepdims=True) + F(1e-4))).sum(0))])
def test_rmsnorm_dweight(rng, kind, value, fault):
    dout, x = normal(rng, 20, 256), normal(rng, 20, 256, size=0.02)
    n = x / np.sqrt((x * x).mean(-1, keepdims=True) + F(1e-6))
    both("rmsnorm_dweight", {"dout": dout, "x": x, "eps": 1e-6}, fault(dout, x, n), kind, value)


@pytest.mark.parametrize(("op", "kind", "fault"), [
    ("swiglu_dgate", "exchanged", lambda d, g, u, s: d * g * s),
    ("swiglu_dup", "exchanged", lambda d, g, u, s: d * u * s * (1 + g * (1 - s))),
    ("swiglu_dgate", "slope_missing", lambda d, g, u, s: d * u * s),
    ("swiglu_dgate", "operand", lambda d, g, u, s: d * s * (1 + g * (1 - s))),
    ("swiglu_dgate", "exchanged", lambda d, g, u, s: d * g / (1 + np.exp(-u)) * (1 + u * (1 - 1 / (1 + np.exp(-u))))),
    ("swiglu_dgate", "activation", lambda d, g, u, s: d * u * (g > 0)),
    ("swiglu_dup", "activation", lambda d, g, u, s: d * np.maximum(g, 0)),
    ("swiglu_dup", "activation", lambda d, g, u, s: d * g / (1 + np.exp(F(-1.702) * g))),
    ("swiglu_dup", "activation_missing", lambda d, g, u, s: d * g), ("silu_d", "operand", lambda d, g, u, s: d.copy())])
def test_swiglu(rng, op, kind, fault):
    dact, gate, up = (normal(rng, 2, 9, 64) for _ in range(3))
    args = {"dact": dact, "gate": gate, "up": up}
    got = fault(dact, gate, up, 1 / (1 + np.exp(-gate)))
    both(op, {"dact": dact, "up": up} if op == "silu_d" else args, got, kind)


@pytest.mark.parametrize("name", ["gelu,", "tanh", "1.702", "is sigmoid,"])
def test_gradients_of_another_activation(rng, name):
    """The slopes by central differences of the activations that the forward test has."""
    gate, up, dact = (normal(rng, 2, 9, 64) for _ in range(3))
    f = {"gelu,": lambda x: x * np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2, "tanh": lambda x: x / 2 * (
        1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))), "1.702": lambda x: x / (1 + np.exp(
            -1.702 * x)), "is sigmoid,": lambda x: 1 / (1 + np.exp(-x))}[name]
    wide, args = gate.astype(float), {"dact": dact, "gate": gate, "up": up}
    slope = (f(wide + 1e-5) - f(wide - 1e-5)) / 2e-5
    for op, got in (("swiglu_dgate", dact * up * slope), ("swiglu_dup", dact * f(wide))):
        both(op, args, got, "activation")
        assert name in cause_of(op, args, got.astype(F)).text


def scatter(ids, rows, n):
    out = np.zeros((n, rows.shape[1]), F)
    np.add.at(out, ids, rows)
    return out


@pytest.mark.parametrize(("kind", "value", "fault"), [
    ("repeats_lost", None, lambda i, d: {int(k): r for k, r in zip(i, d, strict=True)}),
    ("repeats_lost", None, lambda i, d: {int(k): r for k, r in zip(i[::-1], d[::-1], strict=True)}),
    ("row_missing", None, lambda i, d: scatter(i[:-1], d[:-1], 30)),
    ("twice", None, lambda i, d: 2 * scatter(i, d, 30)), ("id", 1, lambda i, d: scatter(i + 1, d, 30))])
def test_embedding_dtable(rng, kind, value, fault):
    ids, dout = rng.integers(0, 9, 18), normal(rng, 18, 16)
    got = fault(ids, dout)
    if isinstance(got, dict):
        got = np.stack([got.get(i, np.zeros(16, F)) for i in range(30)])
    both("embedding_dtable", {"dout": dout.reshape(2, 9, 16), "ids": ids.reshape(2, 9), "rows": 30}, got, kind, value)


def test_wrong_heads_under_the_sums_of_a_right_forward_pass(rng):
    """As kernels do it: the softmax's sums and mean terms were saved, the keys are those of other heads."""
    b, t, nh, nkv, hs = 1, 21, 6, 2, 16
    q, dout = normal(rng, b, t, nh, hs), normal(rng, b, t, nh * hs)
    k, v = normal(rng, b, t, nkv, hs), normal(rng, b, t, nkv, hs)
    args = {"q": q, "k": k, "v": v, "dout": dout, "scale": hs ** -0.5}
    dk, seen, g = np.zeros((b, t, nkv, hs)), np.tri(t, dtype=bool), dout.astype(float).reshape(b, t, nh, hs)
    for head in range(nh):
        right, wrong = k[0, :, head // 3].astype(float), k[0, :, head % nkv].astype(float)
        score = np.where(seen, hs ** -0.5 * q[0, :, head].astype(float) @ right.T, -np.inf)
        lse = np.log(np.exp(score).sum(-1))
        mean = (np.exp(score - lse[:, None]) * (g[0, :, head] @ v[0, :, head // 3].astype(float).T)).sum(-1)
        prob = np.where(seen, np.exp(hs ** -0.5 * q[0, :, head].astype(float) @ wrong.T - lse[:, None]), 0)
        ds = prob * (g[0, :, head] @ v[0, :, head % nkv].astype(float).T - mean[:, None]) * hs ** -0.5
        dk[0, :, head % nkv] += ds.T @ q[0, :, head]
    assert cause_of("attention_dk", args, dk.astype(np.float32)).kind == "head_map"
