"""The search for causes: what explains is claimed, what does not is not; patterns, parts of a result, fused steps."""

from pathlib import Path

import numpy as np
import pytest
from planted import BF16, FP32, FP32_PRODUCTS, bf16, cause_of, check_of, normal

from apr.tools.causes import (
    FITTED,
    OPERAND,
    PATTERN,
    PLAIN,
    VARIANTS,
    Cause,
    Found,
    contract_of,
    explain,
    search,
    simplest,
)
from apr.tools.checks import Check, Step, run_steps
from apr.tools.fit import Case, Score
from apr.tools.formulas import FORMULAS
from apr.tools.patterns import spans
from apr.tools.variants import KINDS

F = np.float32


def projection(rng, rows=(2, 16), inputs=48, outputs=64):
    """Arguments of a linear layer and its right result, float32."""
    args = {"x": normal(rng, *rows, inputs), "weight": normal(rng, outputs, inputs)}
    return args, (args["x"] @ args["weight"].T).astype(F)


def of_every_op(rng):
    """Arguments and tolerance for a check of most ops, by op."""
    b, t, n, hs, f = 2, 12, 4, 16, 64
    x, gate, up, dout = (normal(rng, b, t, f) for _ in range(4))
    heads = {"q": normal(rng, b, t, n, hs), "k": normal(rng, b, t, 2, hs), "v": normal(rng, b, t, 2, hs)}
    rope = {"positions": np.arange(t), "theta": 1e4, "scaling": None}
    attention = heads | {"scale": 0.25}
    ids, gain = rng.integers(0, 20, (b, t)), normal(rng, f)
    scores = {"logits": normal(rng, b * t, 40), "targets": rng.integers(0, 40, b * t)}
    p = [normal(rng, 500) for _ in range(3)]
    return {
        "embedding": {"ids": ids, "table": normal(rng, 20, f)}, "rmsnorm": {"x": x, "weight": gain, "eps": 1e-6},
        "linear": {"x": x, "weight": normal(rng, f, f)}, "bias": {"x": x, "bias": gain},
        "rope": {"x": heads["q"]} | rope, "attention": attention, "residual": {"a": x, "b": up},
        "silu": {"gate": gate}, "swiglu": {"gate": gate, "up": up}, "cross_entropy": scores,
        "dlogits": scores | {"dloss": 0.1}, "linear_dinp": {"dout": dout, "weight": normal(rng, f, 48)},
        "linear_dweight": {"dout": dout, "x": x}, "bias_dbias": {"dout": dout},
        "rmsnorm_dinp": {"dout": dout, "x": x, "weight": gain, "eps": 1e-6},
        "rmsnorm_dweight": {"dout": dout, "x": x, "eps": 1e-6}, "rope_dinp": {"dout": heads["q"]} | rope,
        **{f"attention_d{w}": attention | {"dout": dout} for w in "qkv"},
        "swiglu_dgate": {"dact": dout, "gate": gate, "up": up}, "swiglu_dup": {"dact": dout, "gate": gate, "up": up},
        "silu_d": {"dact": dout, "up": up}, "embedding_dtable": {"dout": dout, "ids": ids, "rows": 20},
        "add": {"a": x, "b": up}, "adamw_m": {"m": p[0], "grad": p[1], "beta1": 0.9, "grad_scale": 1.0},
        "adamw_v": {"v": p[0] ** 2, "grad": p[1], "beta2": 0.99, "grad_scale": 1.0},
        "adamw_param": {"param": p[0], "m": p[1], "v": p[2] ** 2, "lr": 0.01, "eps": 1e-8, "weight_decay": 0.1,
                        "step": 2, "beta1": 0.9, "beta2": 0.99}, "identity": {"x": x}}


@pytest.mark.parametrize("op", list(of_every_op(np.random.default_rng(0))))
def test_noise_is_never_given_a_cause_and_health_none(rng, op):
    args = of_every_op(rng)[op]
    check = check_of(op, args, np.zeros(1))
    truth = run_steps(check, FORMULAS)
    assert explain(check_of(op, args, truth.astype(F)), FP32) is None
    assert explain(check_of(op, args, bf16(truth)), BF16) is None
    for size, tolerance in ((0.1, FP32), (0.1, BF16), (1e-4, FP32), (1.5 * BF16, BF16)):
        for noise in (truth, np.sqrt(np.mean(truth ** 2))):  # in proportion to each value, and the same for all
            got = (truth + size * noise * rng.standard_normal(truth.shape)).astype(F)
            cause = explain(check_of(op, args, got), tolerance)
            assert cause.kind == "unknown" or (op, cause.kind) == ("embedding_dtable", "rows"), (size, tolerance, cause)
            assert 0.1 * size < cause.explains < 10 * size and f"{cause.explains:.2e}" in cause.text


def test_every_kind_is_documented_and_every_op_has_a_contract():
    kinds = {variant.kind for variants in VARIANTS.values() for variant in variants}
    assert kinds <= set(KINDS)
    assert set(VARIANTS) <= set(FORMULAS)
    stems = {path.stem for path in (Path(__file__).parents[2] / "contracts").glob("*.yaml")}
    for op in FORMULAS:
        assert contract_of(op, "unknown") in stems, op
    assert contract_of("rope", "pairs") == "rope-v1"
    assert contract_of("rope", "theta") == "apr-pretrain-cuda-rope-theta-cache-key-v1"
    assert contract_of("rmsnorm", "eps") == "apr-pretrain-cuda-rmsnorm-eps-parity-v1"
    assert contract_of("adamw_param", "eps") == "adamw-v1"
    assert contract_of("bias", "bias_missing") == "apr-pretrain-cuda-forward-parity-v1"
    assert contract_of("upload", "unknown") == "apr-pretrain-from-init-v1"
    assert contract_of("linear", "stale") == "buffers-v1"


@pytest.mark.parametrize("step", range(4))
def test_a_fault_in_a_fused_kernel_is_that_step_s(rng, step):
    values = {"x": normal(rng, 2, 16, 64, size=0.02), "gain": normal(rng, 64), "w": normal(rng, 96, 64),
              "b": normal(rng, 96), "eps": 1e-6, "HS": 32, "p": np.arange(16), "theta": 1e4, "s": None}
    steps = (Step("rmsnorm", "n", {"x": "x", "weight": "gain", "eps": "eps"}),
             Step("linear", "l", {"x": "n", "weight": "w"}), Step("bias", "y", {"x": "l", "bias": "b"}),
             Step("heads", "h", {"x": "y", "HS": "HS"}),
             Step("rope", "r", {"x": "h", "positions": "p", "theta": "theta", "scaling": "s"}))
    faults = [(0, "rmsnorm", "eps", lambda x, weight, eps: FORMULAS["rmsnorm"](x, weight, 1e-5)),
              (1, "linear", "half", lambda x, weight: FORMULAS["linear"](x, np.roll(weight, 48, 0))),
              (2, "bias", "bias_missing", lambda x, bias: x),
              (4, "rope", "direction", lambda x, positions, **a: FORMULAS["rope"](x, -positions, **a))]
    at, op, kind, formula = faults[step]
    check = Check("L00.q_rope", steps, values, np.zeros(1))
    got = run_steps(check, FORMULAS, {at: formula})
    for result, tolerance in ((got.astype(F), FP32_PRODUCTS), (bf16(got), BF16)):
        cause = explain(Check("L00.q_rope", steps, values, result), tolerance)
        assert (cause.op, cause.kind) == (op, kind)


@pytest.mark.parametrize(("kind", "value", "fault"), [
    ("scaled", 0.5, lambda y: y / 2), ("scaled", -1.0, lambda y: -y), ("scaled", 1.001, lambda y: F(1.001) * y),
    ("displaced", 1, lambda y: np.roll(y.reshape(32, 64), -1, 0)), ("displaced", -2, lambda y: np.roll(
        y.reshape(32, 64), 2, 0)), ("sequences", None, lambda y: y[::-1]),
    ("permuted", None, lambda y: y[:, ::-1]), ("permuted", None, lambda y: y[..., ::-1]),
    ("permuted", None, lambda y: np.roll(y, 5, -1)), ("transposed", None, lambda y: y.transpose(1, 0, 2)),
    ("shifted", None, lambda y: y + np.linspace(-1, 3, 64, dtype=F)),
    ("gains", None, lambda y: y * np.linspace(0.5, 3, 64, dtype=F)),
    ("row_factors", None, lambda y: y * np.linspace(0.5, 3, 16, dtype=F)[:, None])])
def test_patterns(rng, kind, value, fault):
    args, y = projection(rng)
    got = np.ascontiguousarray(fault(y)).reshape(y.shape)
    told = kind != "scaled" or value != 1.001
    for result, tolerance in ((got, FP32_PRODUCTS), (bf16(got), BF16))[:1 + told]:
        cause = cause_of("linear", args, result, tolerance)
        assert cause.kind == kind and (value is None or cause.value == pytest.approx(value, rel=1e-3)), cause


def test_heads_in_another_order(rng):
    args = {"x": normal(rng, 2, 9, 6, 16), "positions": np.arange(9), "theta": 1e4, "scaling": None}
    y = run_steps(check_of("rope", args, np.zeros(1)), FORMULAS).astype(F)
    cause = cause_of("rope", args, y[:, :, [3, 4, 5, 0, 1, 2]])
    assert cause.kind == "permuted" and "the heads hold those numbered 3, 4, 5, 0, 1, 2" in cause.text
    cause = cause_of("rope", args, np.ascontiguousarray(y.transpose(0, 2, 1, 3)).reshape(y.shape))
    assert cause.kind == "transposed" and "positions and heads" in cause.text


def test_what_the_buffer_held_before(rng):
    args, y = projection(rng)
    before = normal(rng, *y.shape)
    step = (Step("linear", "out", {"x": "x", "weight": "weight"}),)
    for kind, got in (("stale", before), ("not_cleared", y + before)):
        assert explain(Check("s", step, args, got, before), FP32_PRODUCTS).kind == kind
    got = y.copy()
    got[1, 13:] = before[1, 13:]
    cause = explain(Check("s", step, args, got, before), FP32_PRODUCTS)
    assert cause.kind == "stale" and cause.text == "in rows 29..31 of 32 only: it is what the buffer held before"


def test_a_part_of_the_result(rng):
    args, y = projection(rng)
    got = y.copy()
    got[0, 3] = got[1, 15] = 0
    cause = cause_of("linear", args, got)
    assert cause.kind == "zero" and cause.text == "in rows 3, 31 of 32 only: it is zero"
    got = y.copy()
    got[..., 16:32] = normal(rng, 2, 16, 16)
    cause = cause_of("linear", args, got)
    assert cause.kind == "columns" and "only columns 16..31 of 64" in cause.text and cause.value == 16
    got = y.copy()
    got[1] = normal(rng, 16, 64)
    cause = cause_of("linear", args, got, FP32_PRODUCTS)
    assert cause.kind == "rows" and "only rows 16..31 of 32" in cause.text
    got = y.copy()
    got[1, 15] = y[1, 14]
    cause = cause_of("linear", args, got)
    assert cause.kind == "displaced" and cause.text == "in rows 31 of 32 only: row i holds row i -1"


def test_a_part_of_the_heads_or_sequences(rng):
    args = {"x": normal(rng, 2, 9, 3, 32), "positions": np.arange(9), "theta": 1e4, "scaling": None}
    y = run_steps(check_of("rope", args, np.zeros(1)), FORMULAS)
    got = y.copy()
    got[:, :, 1] = args["x"][:, :, 1]
    cause = cause_of("rope", args, got.astype(F))
    assert cause.kind == "not_rotated" and cause.text.startswith("in heads 1 of 3 only: ")
    got = y.copy()
    got[..., 2, 5:9] = 0
    assert cause_of("rope", args, got.astype(F)).text == "in columns 69..72 of 96 only: it is zero"
    got = y.copy()
    got[1] = run_steps(check_of("rope", args | {"positions": np.arange(9) + 1}, y), FORMULAS)[1]
    for result, tolerance in ((got.astype(F), FP32), (bf16(got), BF16)):
        cause = cause_of("rope", args, result, tolerance)
        assert (cause.kind, cause.value) == ("position", 1) and "rows 9..17 of 18 only" in cause.text


def test_values_that_need_no_hypothesis(rng):
    args, y = projection(rng)
    for kind, value in (("zero", 0.0), ("constant", 3.0)):
        cause = cause_of("linear", args, np.full_like(y, value))
        assert (cause.kind, cause.value) == (kind, value)
    assert cause_of("linear", args, np.full_like(y, np.nan)).kind == "never_written"
    y[1, 2:4, 7] = np.nan
    cause = cause_of("linear", args, y)
    assert (cause.kind, cause.value) == ("nan", 2) and "the first at [1, 2, 7]; rows 18..19" in cause.text
    assert cause_of("linear", args, np.where(np.isnan(y), np.inf, y).astype(F)).kind == "infinite"
    assert cause_of("linear", args, y[:1]).kind == "shape"


def test_another_array_is_named(rng):
    args, _ = projection(rng)
    weight = normal(rng, *args["weight"].shape)
    cause = cause_of("linear", args, args["x"] @ weight.T, k_weight=weight, HS=16)
    assert (cause.kind, cause.text) == ("operand", "linear reads k_weight where it should read weight")
    cause = cause_of("linear", args, bf16(args["x"] @ weight.T), BF16, k_weight=weight)
    assert cause.kind == "operand"


def test_another_array_that_the_op_refuses_is_no_cause(rng):
    """Targets have the shape of ids, and an ignored one is no id."""
    args = {"ids": rng.integers(1, 29, (2, 9)), "table": normal(rng, 30, 16)}
    got = args["table"][args["ids"] - 1]
    assert cause_of("embedding", args, got, targets=np.full((2, 9), -100)).kind == "id"


def test_half_an_order_is_no_order(rng):
    args, y = projection(rng)
    got = np.roll(y.reshape(32, 64), 7, 0)
    got[19:] = normal(rng, 13, 64)
    assert cause_of("linear", args, got).kind == "unknown"


def test_a_number_is_not_fitted_to_a_few_values(rng):
    args = {"x": normal(rng, 1, 6), "weight": normal(rng, 6), "eps": 1e-6}
    truth = run_steps(check_of("rmsnorm", args, np.zeros(1)), FORMULAS)
    assert cause_of("rmsnorm", args, F(0.9) * truth.astype(F)).kind == "scaled"


def test_fewer_bits_are_a_fault_only_where_float32_is_asked_for(rng):
    args = {"x": F(50) + normal(rng, 20, 64), "weight": normal(rng, 32, 64)}
    args["weight"] -= args["weight"].mean(1, keepdims=True)
    got = bf16(args["x"]) @ bf16(args["weight"]).T
    assert cause_of("linear", args, got).kind == "precision"
    assert cause_of("linear", args, got, BF16).kind == "unknown"


def test_what_needs_no_number_is_simpler_than_what_was_fitted(rng):
    args = {"x": normal(rng, 20, 64, size=0.02), "weight": normal(rng, 64), "eps": 1e-6}
    check = check_of("rmsnorm", args, np.zeros(1))
    truth, got = run_steps(check, FORMULAS), FORMULAS["rmsnorm"](args["x"], args["weight"], 1e-5)
    case = Case(got, truth, np.isfinite(truth), FP32)
    assert {(f.cause.kind, f.rank) for f in search(check, case)} == {("eps", FITTED), ("row_factors", PATTERN)}
    score = Score(1e-7, 1.0, 100)
    found = [Found(Cause(kind, "", None, 1e-7, "x"), score, rank) for kind, rank in (
        ("a", PATTERN), ("b", FITTED), ("c", PLAIN), ("d", OPERAND))]
    assert simplest(iter(found), FP32).cause.kind == "c"


def test_a_result_rounded_to_bfloat16(rng):
    args, y = projection(rng)
    assert cause_of("linear", args, bf16(y)).kind == "precision"


def test_scores_and_spans():
    assert Score(1e-3, 1e-1, 10).accepted(1e-3) and not Score(1e-3, 9e-3, 10).accepted(9e-4)
    assert not Score(4e-3, 1.0, 10**6).accepted(1e-3)
    assert Score(3e-3, 6.5e-3, 1000).accepted(6e-3) and not Score(3e-3, 6.5e-3, 20).accepted(6e-3)
    truth, everywhere = np.ones(4), np.ones(4, bool)
    case = Case(2 * truth, truth, everywhere, 1e-6)
    assert case.score(np.array([2, 2, np.nan, 4.0])) == Score(pytest.approx(2 / 24 ** 0.5), 1.0, 3)
    assert case.score(np.array([2, np.nan, np.nan, np.nan])) is None
    assert spans(np.array([3, 17, 18, 19])) == "3, 17..19"
    assert spans(np.arange(0, 40, 2)).endswith("… (20 in all)")
