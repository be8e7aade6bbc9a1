"""Known faults of the gradients (attention's apart) and of the optimizer."""

from typing import Any

import numpy as np

from apr.reference.swiglu import sigmoid
from apr.tools.activations import ACTIVATIONS
from apr.tools.formulas import FORMULAS, Array, rmsnorm_dinp, rows_of, wide
from apr.tools.variants import Args, Faulty, Variant, changed, low_precision, other, shift_rows, times, without_last
from apr.tools.variants_forward import EPS, off_by_rows, rotation, turned

FACTORS = (-1.0, 0.0, 0.1, 0.5, 2.0, 10.0)

DLOGITS = (
    *off_by_rows("dlogits"),
    Variant("one_hot_missing", "the target's own score is not pushed up: softmax without its one-hot",
            lambda n, a: softmax(a["logits"]) * a["dloss"]),
    Variant("factor", "the gradient's factor is {number:.6g}, 1 / the number of targets is {dloss:.6g}",
            changed("dlogits", dloss=lambda n, a: n), (1.0,), refine=True),
)


def softmax(logits: Array) -> Array:
    """Over the last axis, float64."""
    p = np.exp(wide(logits) - np.max(logits, axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


LINEAR_DINP = (
    Variant("transposed", "the weight is used as in forward, not transposed",
            changed("linear_dinp", weight=lambda n, a: turned(a["weight"]))),
    *low_precision("linear_dinp", "dout", "weight"),
)


def moved(name: str) -> Faulty:
    """linear_dweight with the rows of one operand `number` further on, without the rows that then lack one."""
    def formula(number: float, args: Args) -> Array:
        rows = np.nan_to_num(shift_rows(rows_of(args[name]), int(number)))
        return FORMULAS["linear_dweight"](**(args | {name: rows}))
    return formula


LINEAR_DWEIGHT = (
    Variant("row_missing", "the last row is not counted", changed("linear_dweight", dout=lambda n, a: without_last(
        a["dout"]))),
    Variant("transposed", "the gradient is transposed",
            lambda n, a: np.ascontiguousarray(FORMULAS["linear_dweight"](**a).T).reshape(
                a["dout"].shape[-1], a["x"].shape[-1])),
    Variant("twice", "the gradient is accumulated twice", times("linear_dweight", 2.0)),
    Variant("displaced", "the input is read {number:+.0f} rows off the gradient's", moved("x"), (1, -1)),
    *low_precision("linear_dweight", "dout", "x"),
)
BIAS_DBIAS = (
    Variant("row_missing", "the last row is not counted", changed("bias_dbias", dout=lambda n, a: without_last(
        a["dout"]))),
    Variant("twice", "the gradient is accumulated twice", times("bias_dbias", 2.0)),
    Variant("sum_not_mean", "the mean over the rows, not their sum",
            lambda n, a: FORMULAS["bias_dbias"](**a) / rows_of(a["dout"]).shape[0]),
)


def norm_parts(args: Args) -> tuple[Array, Array, Array]:
    """dout * weight, the normalised x, and 1 / its root mean square, of rmsnorm_dinp's arguments."""
    x = wide(args["x"])
    rstd = 1.0 / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + args["eps"])
    return wide(args["dout"]) * wide(args["weight"]), x * rstd, rstd


def through_norm(args: Args, divisor: int) -> Array:
    """rmsnorm_dinp with the mean's divisor changed by `divisor`."""
    dnorm, norm, rstd = norm_parts(args)
    mean = (dnorm * norm).sum(axis=-1, keepdims=True) / max(1, dnorm.shape[-1] + divisor)
    return rstd * (dnorm - norm * mean)


RMSNORM_DINP = (
    Variant("norm_term_missing", "the gradient lacks the term through the norm",
            lambda n, a: norm_parts(a)[0] * norm_parts(a)[2]),
    Variant("wrong_divisor", "the mean of the term through the norm is over C - 1 channels",
            lambda n, a: through_norm(a, -1)),
    Variant("gain_missing", "RMSNorm's weight is not applied to the gradient",
            changed("rmsnorm_dinp", weight=lambda n, a: np.ones(a["x"].shape[-1]))),
    Variant("eps", "RMSNorm's eps is {number:.3g}, the configuration says {eps:.3g}",
            lambda n, a: rmsnorm_dinp(**(a | {"eps": n})), EPS, refine=True),
)
RMSNORM_DWEIGHT = (
    Variant("norm_term_missing", "the sum is of dout * x, not of dout * the normalised x",
            lambda n, a: (wide(a["dout"]) * wide(a["x"])).reshape(-1, a["x"].shape[-1]).sum(axis=0)),
    Variant("row_missing", "the last row is not counted", changed("rmsnorm_dweight", dout=lambda n, a: without_last(
        a["dout"]))),
    Variant("twice", "the gradient is accumulated twice", times("rmsnorm_dweight", 2.0)),
    Variant("eps", "RMSNorm's eps is {number:.3g}, the configuration says {eps:.3g}",
            changed("rmsnorm_dweight", eps=lambda n, a: n), EPS, refine=True),
)


def with_slope(slope: Any) -> Faulty:
    """dgate with another slope of the activation."""
    return lambda _number, args: wide(args["dact"]) * wide(args["up"]) * slope(wide(args["gate"]))


def with_activation(activation: Any) -> Faulty:
    """dup with another activation."""
    return lambda _number, args: wide(args["dact"]) * activation(wide(args["gate"]))


SWIGLU_DGATE = (
    Variant("exchanged", "this is dup, not dgate", other("swiglu_dup", dact="dact", gate="gate", up="up")),
    Variant("slope_missing", "the gradient lacks the slope of the sigmoid: sigmoid(gate) alone", with_slope(sigmoid)),
    *(Variant("activation", f"the activation is {name}, not silu", with_slope(slope))
      for name, (_, slope) in ACTIVATIONS.items()),
    Variant("operand", "the gradient lacks the factor up", changed("swiglu_dgate", up=lambda n, a: np.ones(
        a["up"].shape))),
    Variant("exchanged", "gate and up are exchanged", changed("swiglu_dgate", gate=lambda n, a: a["up"],
                                                              up=lambda n, a: a["gate"])),
)
SWIGLU_DUP = (
    Variant("exchanged", "this is dgate, not dup", other("swiglu_dgate", dact="dact", gate="gate", up="up")),
    *(Variant("activation", f"the activation is {name}, not silu", with_activation(f))
      for name, (f, _) in ACTIVATIONS.items()),
    Variant("activation_missing", "dact * gate without silu", with_activation(lambda x: x)),
)
SILU_D = (
    Variant("operand", "the gradient lacks the factor up", lambda n, a: wide(a["dact"])),
)


def last_of_each(args: Args, first: bool) -> Array:
    """embedding_dtable where a repeated id's rows overwrite each other: the last, or the first, is what stays."""
    ids, dout, out = args["ids"].reshape(-1), rows_of(args["dout"]), np.zeros((args["rows"], args["dout"].shape[-1]))
    for row in range(ids.size - 1, -1, -1) if first else range(ids.size):
        out[ids[row]] = dout[row]
    return out


EMBEDDING_DTABLE = (
    Variant("repeats_lost", "repeated ids are counted once: the last one's row stays", lambda n, a: last_of_each(
        a, False)),
    Variant("repeats_lost", "repeated ids are counted once: the first one's row stays", lambda n, a: last_of_each(
        a, True)),
    Variant("row_missing", "the last row is not counted", changed("embedding_dtable", dout=lambda n, a: without_last(
        a["dout"]))),
    Variant("twice", "the gradient is accumulated twice", times("embedding_dtable", 2.0)),
    Variant("id", "the rows are added to ids {number:+.0f} further on",
            changed("embedding_dtable", ids=lambda n, a: (a["ids"] + int(n)) % a["rows"]), (1, -1)),
)
GLOBAL_NORM = (
    Variant("root_missing", "the sum of squares without its square root",
            lambda n, a: np.square(FORMULAS["global_norm"](**a))),
)
CLIP = (
    Variant("clip_missing", "the gradients are not clipped", lambda n, a: np.ones(1)),
    Variant("clip_square", "the clip factor divides by the square of the norm",
            lambda n, a: np.minimum(1.0, a["max_norm"] / np.square(wide(a["norm"]).reshape(-1)[:1]))),
)
CLIP_MISSING = "the gradients are not clipped"
ADAMW_M = (
    Variant("clip_missing", CLIP_MISSING, changed("adamw_m", grad_scale=lambda n, a: 1.0)),
    Variant("beta", "the first moment's decay is beta2", changed("adamw_m", beta1=lambda n, a: a["beta2"]),
            needs=("beta2",)),
    Variant("decay_l2", "weight decay is added to the gradient (L2), not decoupled",
            lambda n, a: FORMULAS["adamw_m"](a["m"], wide(a["grad"]) * a["grad_scale"] + a["weight_decay"] * wide(
                a["param"]), a["beta1"], 1.0), needs=("param", "weight_decay")),
    Variant("beta", "the first moment's decay is {number:.6g}, beta1 is {beta1:.6g}",
            changed("adamw_m", beta1=lambda n, a: n), (0.9, 0.95, 0.999, 0.0), refine=True),
)
ADAMW_V = (
    Variant("clip_missing", CLIP_MISSING, changed("adamw_v", grad_scale=lambda n, a: 1.0)),
    Variant("square_missing", "the second moment is of the gradient, not of its square",
            lambda n, a: FORMULAS["adamw_m"](a["v"], a["grad"], a["beta2"], a["grad_scale"])),
    Variant("beta", "the second moment's decay is beta1", changed("adamw_v", beta2=lambda n, a: a["beta1"]),
            needs=("beta1",)),
    Variant("beta", "the second moment's decay is {number:.6g}, beta2 is {beta2:.6g}",
            changed("adamw_v", beta2=lambda n, a: n), (0.999, 0.95, 0.99, 0.9), refine=True),
)


def adamw(m: bool = True, v: bool = True, inside: bool = False, root: bool = True) -> Faulty:
    """The update with its parts changed: bias correction of m and of v, eps inside the root, no root."""
    def formula(_number: float, a: Args) -> Array:
        top = wide(a["m"]) / (1.0 - a["beta1"] ** a["step"] if m else 1.0)
        square = wide(a["v"]) / (1.0 - a["beta2"] ** a["step"] if v else 1.0)
        size = np.sqrt(square + a["eps"]) if inside else (np.sqrt(square) if root else square) + a["eps"]
        return (1.0 - a["lr"] * a["weight_decay"]) * wide(a["param"]) - a["lr"] * top / size
    return formula


def times_update(number: float, args: Args) -> Array:
    """The update, decay apart, times a number: the learning rate that was used, over the one that was asked for."""
    keep = (1.0 - args["lr"] * args["weight_decay"]) * wide(args["param"])
    return keep + number * (FORMULAS["adamw_param"](**args) - keep)


ADAMW_PARAM = (
    Variant("correction", "the first moment's bias correction is dropped", adamw(m=False)),
    Variant("correction", "the second moment's bias correction is dropped", adamw(v=False)),
    Variant("correction", "the bias correction of both moments is dropped", adamw(m=False, v=False)),
    Variant("decay_missing", "weight decay is not applied", changed("adamw_param", weight_decay=lambda n, a: 0.0)),
    Variant("eps_inside", "eps is added inside the square root", adamw(inside=True)),
    Variant("root_missing", "the second moment's square root is missing", adamw(root=False)),
    Variant("step", "the bias correction is that of step {number:+.0f} from this one",
            changed("adamw_param", step=lambda n, a: max(1, a["step"] + int(n))), (1, -1)),
    Variant("eps", "AdamW's eps is {number:.3g}, the configuration says {eps:.3g}",
            changed("adamw_param", eps=lambda n, a: n), EPS, refine=True),
    Variant("decay", "weight decay is {number:.4g}, the configuration says {weight_decay:.4g}",
            changed("adamw_param", weight_decay=lambda n, a: n), (0.0, 0.01, 0.1, 1.0), refine=True),
    Variant("learning_rate", "the update is {number:.4g} times what the learning rate gives", times_update, FACTORS,
            refine=True),
)
BACKWARD = {"dlogits": DLOGITS, "linear_dinp": LINEAR_DINP, "linear_dweight": LINEAR_DWEIGHT,
            "bias_dbias": BIAS_DBIAS, "rmsnorm_dinp": RMSNORM_DINP, "rmsnorm_dweight": RMSNORM_DWEIGHT,
            "rope_dinp": rotation("rope_dinp", "dout", -1.0), "swiglu_dgate": SWIGLU_DGATE,
            "swiglu_dup": SWIGLU_DUP, "silu_d": SILU_D, "embedding_dtable": EMBEDDING_DTABLE,
            "global_norm": GLOBAL_NORM, "clip": CLIP, "adamw_m": ADAMW_M, "adamw_v": ADAMW_V,
            "adamw_param": ADAMW_PARAM}
