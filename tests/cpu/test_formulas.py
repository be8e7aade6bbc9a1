"""Every formula against the reference's own op, or against finite differences of its forward."""

import inspect

import numpy as np
import pytest
from compare import assert_close, finite_difference_error

from apr.config import IGNORE, RopeScaling
from apr.reference.adamw import adamw_update
from apr.reference.attention import attention_forward
from apr.reference.rope import rope_forward, rope_tables
from apr.tools.checks import Check, Step, run_steps
from apr.tools.formulas import FORMULAS, OUTPUTS

EXACT = 1e-13  # the same mathematics in float64, in another order
FINITE_DIFFERENCE = 1e-7  # the project's gate for a float64 formula
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
B, T, NH, NKV, HS = 2, 7, 6, 2, 8
ARGUMENTS = """embedding ids table|rmsnorm x weight eps|linear x weight|bias x bias|heads x HS|flat x
rope x positions theta scaling|attention q k v scale|residual a b|silu gate|swiglu gate up|cross_entropy logits targets
loss_sum losses|dlogits logits targets dloss|linear_dinp dout weight|linear_dweight dout x|bias_dbias dout
rmsnorm_dinp dout x weight eps|rmsnorm_dweight dout x eps|rope_dinp dout positions theta scaling
attention_dq dout q k v scale|attention_dk dout q k v scale|attention_dv dout q k v scale|swiglu_dgate dact gate up
swiglu_dup dact gate up|silu_d dact up|embedding_dtable dout ids rows|add a b|global_norm grad|clip norm max_norm
adamw_m m grad beta1 grad_scale|adamw_v v grad beta2 grad_scale
adamw_param param m v lr eps weight_decay step beta1 beta2|identity x"""


def test_ops_and_arguments_are_those_that_checks_are_made_of():
    expected = {line.split()[0]: line.split()[1:] for line in ARGUMENTS.replace("\n", "|").split("|")}
    assert {op: list(inspect.signature(f).parameters) for op, f in FORMULAS.items()} == expected


def values(rng, dtype=np.float64):
    """A value for every argument name, shaped so that every formula that takes rows takes these."""
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    c = NH * HS
    return {
        "ids": rng.integers(0, 5, (B, T)), "table": normal(9, c), "x": normal(B, T, c), "weight": normal(c, c),
        "gain": normal(c), "bias": normal(c), "eps": 1e-3, "HS": HS, "positions": np.arange(T), "theta": 100.0,
        "scaling": None, "q": normal(B, T, NH, HS), "k": normal(B, T, NKV, HS), "v": normal(B, T, NKV, HS),
        "scale": HS ** -0.5, "a": normal(B, T, c), "b": normal(B, T, c), "gate": normal(B, T, c),
        "up": normal(B, T, c), "logits": normal(B, T, 11), "targets": rng.integers(0, 11, (B, T)), "dloss": 0.25,
        "dout": normal(B, T, c), "dact": normal(B, T, c), "dheads": normal(B, T, NH, HS), "rows": 9}


# op of the gradient, its forward op, the argument that is differentiated; the others carry over by name
GRADIENTS = [
    ("linear_dinp", "linear", "x"), ("linear_dweight", "linear", "weight"), ("bias_dbias", "bias", "bias"),
    ("rmsnorm_dinp", "rmsnorm", "x"), ("rmsnorm_dweight", "rmsnorm", "weight"), ("rope_dinp", "rope", "x"),
    ("attention_dq", "attention", "q"), ("attention_dk", "attention", "k"), ("attention_dv", "attention", "v"),
    ("swiglu_dgate", "swiglu", "gate"), ("swiglu_dup", "swiglu", "up"), ("embedding_dtable", "embedding", "table")]


@pytest.mark.parametrize(("op", "forward", "of"), GRADIENTS, ids=lambda x: x)
def test_a_gradient_is_the_slope_of_its_forward(rng, op, forward, of):
    v = values(rng)
    if "rmsnorm" in op:
        v["weight"] = v["gain"]
    if "rope" in op:
        v |= {"x": v["q"], "dout": v["dheads"], "scaling": SCALING}
    take = lambda name: {a: v[a] for a in inspect.signature(FORMULAS[name]).parameters}  # noqa: E731
    upstream = v["dact"] if "swiglu" in op else v["dout"]

    def loss():
        return float((FORMULAS[forward](**take(forward)) * upstream).sum())

    gradient = FORMULAS[op](**take(op))
    assert gradient.shape == v[of].shape and gradient.dtype == np.float64
    assert finite_difference_error(loss, v[of], gradient, rng, h=1e-5) <= FINITE_DIFFERENCE


def test_dlogits_is_the_slope_of_the_scaled_sum_of_losses(rng):
    v = values(rng)
    v["targets"][0, :3] = IGNORE

    def loss():
        losses = FORMULAS["cross_entropy"](v["logits"], v["targets"])
        assert losses.shape == (B * T,) and not losses[:3].any()
        return 0.25 * float(FORMULAS["loss_sum"](losses)[0])

    gradient = FORMULAS["dlogits"](v["logits"], v["targets"], 0.25)
    assert finite_difference_error(loss, v["logits"], gradient, rng, h=1e-5) <= FINITE_DIFFERENCE
    assert not gradient[0, :3].any()


@pytest.mark.parametrize("scaling", [None, SCALING])
def test_rope_of_positions_by_row_or_for_all(rng, scaling):
    x = rng.standard_normal((B, T, NH, HS))
    same = np.arange(3, 3 + T)
    cos, sin = rope_tables(same, HS, 50.0, scaling, np.dtype(float))
    assert_close(FORMULAS["rope"](x, same, 50.0, scaling), rope_forward(x, cos, sin), EXACT, "rope (T,)")
    apart = np.stack([same, same + 5])
    got = FORMULAS["rope"](x, apart, 50.0, scaling)
    for row in range(B):
        cos, sin = rope_tables(apart[row], HS, 50.0, scaling, np.dtype(float))
        assert_close(got[row], rope_forward(x[row:row + 1], cos, sin)[0], EXACT, "rope (B, T)")
    assert_close(FORMULAS["rope_dinp"](got, apart, 50.0, scaling), x, EXACT, "there and back")


def test_attention_over_kept_keys(rng):
    v = values(rng)
    whole = FORMULAS["attention"](v["q"], v["k"], v["v"], 0.3)
    assert whole.shape == (B, T, NH * HS)
    assert_close(whole, attention_forward(v["q"], v["k"], v["v"], 0.3)[0].reshape(B, T, -1), EXACT, "all positions")
    last = FORMULAS["attention"](v["q"][:, -2:], v["k"], v["v"], 0.3)
    assert_close(last, whole[:, -2:], EXACT, "the last two queries over all keys")


def test_shapes_and_sums(rng):
    v = values(rng)
    by_head = FORMULAS["heads"](v["x"], HS)
    assert by_head.shape == (B, T, NH, HS) and np.array_equal(FORMULAS["flat"](by_head), v["x"])
    assert np.array_equal(FORMULAS["bias"](by_head, v["bias"]), FORMULAS["heads"](v["x"] + v["bias"], HS))
    assert np.array_equal(FORMULAS["bias"](v["x"], v["bias"]), v["x"] + v["bias"])
    for op in ("residual", "add"):
        assert np.array_equal(FORMULAS[op](v["a"], v["b"]), v["a"] + v["b"])
    assert np.array_equal(FORMULAS["silu_d"](v["dact"], v["up"]), v["dact"] * v["up"])
    assert np.allclose(FORMULAS["silu"](v["gate"]) * v["up"], FORMULAS["swiglu"](v["gate"], v["up"]), rtol=1e-14)
    assert np.array_equal(FORMULAS["identity"](v["x"]), v["x"])


def test_a_head_wider_than_a_block_is_computed_whole(rng):
    x, weight = rng.standard_normal((3, 4)), rng.standard_normal((OUTPUTS + 5, 4)).astype(np.float32)
    assert_close(FORMULAS["linear"](x, weight), x @ weight.astype(float).T, EXACT, "linear")
    dout = rng.standard_normal((3, OUTPUTS + 5))
    assert_close(FORMULAS["linear_dinp"](dout, weight), dout @ weight.astype(float), EXACT, "linear_dinp")


def test_a_step_of_adamw_in_three_formulas(rng):
    param, m, grad = (rng.standard_normal(50) for _ in range(3))
    v = rng.standard_normal(50) ** 2
    norm = FORMULAS["global_norm"](grad)
    factor = FORMULAS["clip"](norm, 0.5)
    assert norm.shape == factor.shape == (1,) and norm[0] * factor[0] == pytest.approx(0.5, rel=1e-14)
    assert FORMULAS["clip"](norm, 2 * norm[0])[0] == 1.0
    settings = {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.2, "step": 4, "beta1": 0.8, "beta2": 0.9}
    new_m = FORMULAS["adamw_m"](m, grad, 0.8, factor)
    new_v = FORMULAS["adamw_v"](v, grad, 0.9, factor)
    new_param = FORMULAS["adamw_param"](param, new_m, new_v, **settings)
    adamw_update(param, m, v, grad, grad_scale=float(factor[0]), **settings)
    for name, ours, truth in (("m", new_m, m), ("v", new_v, v), ("param", new_param, param)):
        assert_close(ours, truth, EXACT, name)


def test_float32_values_are_computed_in_float64_and_left_alone(rng):
    v = values(rng, np.float32)
    kept = {name: np.copy(value) for name, value in v.items() if isinstance(value, np.ndarray)}
    v["weight_of_norm"] = v["gain"]
    steps = (Step("rmsnorm", "n", {"x": "x", "weight": "gain", "eps": "eps"}),
             Step("linear", "l", {"x": "n", "weight": "weight"}), Step("bias", "b", {"x": "l", "bias": "bias"}))
    out = run_steps(Check("L00.q_bias", steps, v, v["x"]), FORMULAS)
    v64 = {name: value.astype(float) if isinstance(value, np.ndarray) else value for name, value in v.items()}
    assert out.dtype == np.float64 and np.array_equal(out, run_steps(Check("s", steps, v64, v["x"]), FORMULAS))
    FORMULAS["dlogits"](v["logits"], v["targets"], 1.0)
    FORMULAS["swiglu_dgate"](v["dact"], v["gate"], v["up"])
    assert all(np.array_equal(kept[name], v[name]) for name in kept)
