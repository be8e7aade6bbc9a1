"""Every op as one function of named values, in float64: what a check's steps are made of (apr/tools/checks.py).

The mathematics is apr.reference's; here it is one result per formula, from arrays of any float type and any leading
dimensions, since a tool compares one array at a time. NaN and infinity pass through without a warning.

    (…, C)         rows of channels, whatever lies before the last axis
    (B, T, n, HS)  heads; attention's queries are the last T of S >= T positions
"""

from typing import Any

import numpy as np

from apr.config import RopeScaling
from apr.reference import attention as attention_op
from apr.reference import rope as rope_op
from apr.reference import swiglu as swiglu_op
from apr.reference.cross_entropy import cross_entropy_forward_backward
from apr.reference.embedding import embedding_backward
from apr.reference.embedding import embedding_forward as embedding_op
from apr.reference.global_norm import clip_factor
from apr.reference.rmsnorm import rmsnorm_backward, rmsnorm_forward
from apr.tools.checks import Formula

OUTPUTS = 8192  # outputs of a linear layer computed in one go: the head's weight takes gigabytes as float64

Array = np.ndarray


def wide(array: Any) -> Array:
    """As float64; a float64 array itself, so nothing here writes into what it is given."""
    return np.asarray(array, np.float64)


def rows_of(array: Any) -> Array:
    """(N, last axis) float64."""
    return wide(array).reshape(-1, np.shape(array)[-1])


def embedding(ids: Array, table: Array) -> Array:
    """ids (…) int; table (V, C). Returns (…, C). Raises IndexError for an id out of range."""
    return wide(embedding_op(ids, table))


def rmsnorm(x: Array, weight: Array, eps: float) -> Array:
    """x (…, C); weight (C,). Returns (…, C)."""
    return rmsnorm_forward(wide(x), wide(weight), eps)[0]


def linear(x: Array, weight: Array) -> Array:
    """x (…, I); weight (O, I). Returns (…, O)."""
    rows, out = rows_of(x), np.empty((*np.shape(x)[:-1], weight.shape[0]))
    flat = out.reshape(-1, weight.shape[0])
    for start in range(0, weight.shape[0], OUTPUTS):
        part = slice(start, start + OUTPUTS)
        np.matmul(rows, wide(weight[part]).T, out=flat[:, part])
    return out


def bias(x: Array, bias: Array) -> Array:
    """x (…, O), or (B, T, n, HS) where the bias (O,) is of all heads. Returns x's shape."""
    whole, own = wide(x), wide(bias)
    return whole + (own if own.size == whole.shape[-1] else own.reshape(whole.shape[-2:]))


def heads(x: Array, HS: int) -> Array:
    """x (…, n*HS) to (…, n, HS)."""
    return wide(x).reshape(*x.shape[:-1], -1, HS)


def flat(x: Array) -> Array:
    """x (…, n, HS) to (…, n*HS)."""
    return wide(x).reshape(*x.shape[:-2], -1)


def tables(positions: Array, head_size: int, theta: float, scaling: RopeScaling | None) -> tuple[Array, Array]:
    """cos, sin for heads (B, T, n, HS), from positions (T,) or (B, T)."""
    cos, sin = rope_op.rope_tables(np.asarray(positions).reshape(-1), head_size, theta, scaling, np.dtype(np.float64))
    return cos.reshape(*np.shape(positions), 1, -1), sin.reshape(*np.shape(positions), 1, -1)


def rope(x: Array, positions: Array, theta: float, scaling: RopeScaling | None) -> Array:
    """x (B, T, n, HS); positions (T,) or (B, T) int. Returns the rotated heads."""
    return rope_op.rope_forward(wide(x), *tables(positions, x.shape[-1], theta, scaling))


def attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """q (B, T, NH, HS); k, v (B, S, NKV, HS), S >= T. Returns (B, T, NH*HS)."""
    return flat(attention_op.attention_forward(wide(q), wide(k), wide(v), scale)[0])


def residual(a: Array, b: Array) -> Array:
    """a, b of one shape. Returns their sum."""
    return wide(a) + wide(b)


def silu(gate: Array) -> Array:
    """gate (…). Returns gate * sigmoid(gate)."""
    return swiglu_op.silu(wide(gate))


def swiglu(gate: Array, up: Array) -> Array:
    """gate, up (…, F). Returns silu(gate) * up."""
    return swiglu_op.swiglu_forward(wide(gate), wide(up))


def cross_entropy(logits: Array, targets: Array) -> Array:
    """logits (…, V); targets (…) int, in [0, V) or IGNORE. Returns losses (N,), nats; 0 where ignored."""
    return cross_entropy_forward_backward(rows_of(logits), targets.reshape(-1), None)


def loss_sum(losses: Array) -> Array:
    """losses (N,). Returns their sum (1,)."""
    return wide(losses).sum(keepdims=True).reshape(1)


def dlogits(logits: Array, targets: Array, dloss: float) -> Array:
    """Gradient of dloss * loss_sum, in logits' shape (…, V)."""
    out = rows_of(logits).copy()
    cross_entropy_forward_backward(out, targets.reshape(-1), float(dloss))
    return out.reshape(logits.shape)


def linear_dinp(dout: Array, weight: Array) -> Array:
    """dout (…, O); weight (O, I). Returns (…, I)."""
    rows, out = rows_of(dout), np.zeros((*dout.shape[:-1], weight.shape[1]))
    flat_out = out.reshape(-1, weight.shape[1])
    for start in range(0, weight.shape[0], OUTPUTS):
        part = slice(start, start + OUTPUTS)
        flat_out += rows[:, part] @ wide(weight[part])
    return out


def linear_dweight(dout: Array, x: Array) -> Array:
    """dout (…, O); x (…, I). Returns (O, I), the sum over all rows."""
    return rows_of(dout).T @ rows_of(x)


def bias_dbias(dout: Array) -> Array:
    """dout (…, O). Returns (O,), the sum over all rows."""
    return rows_of(dout).sum(axis=0)


def rmsnorm_dinp(dout: Array, x: Array, weight: Array, eps: float) -> Array:
    """dout, x (…, C); weight (C,). Returns (…, C)."""
    _, rstd = rmsnorm_forward(wide(x), wide(weight), eps)
    return rmsnorm_backward(np.zeros(x.shape[-1]), wide(dout), wide(x), wide(weight), rstd)


def rmsnorm_dweight(dout: Array, x: Array, eps: float) -> Array:
    """dout, x (…, C). Returns (C,), the sum over all rows."""
    ones, out = np.ones(x.shape[-1]), np.zeros(x.shape[-1])
    rmsnorm_backward(out, wide(dout), wide(x), ones, rmsnorm_forward(wide(x), ones, eps)[1])
    return out


def rope_dinp(dout: Array, positions: Array, theta: float, scaling: RopeScaling | None) -> Array:
    """dout (B, T, n, HS); positions (T,) or (B, T) int. Returns it turned back."""
    return rope_op.rope_backward(wide(dout), *tables(positions, dout.shape[-1], theta, scaling))


def attention_gradients(dout: Array, q: Array, k: Array, v: Array, scale: float) -> tuple[Array, Array, Array]:
    """dq, dk, dv, shaped as q (B, T, NH, HS) and k, v (B, T, NKV, HS); dout (B, T, NH*HS) or as q."""
    q, k, v = wide(q), wide(k), wide(v)
    _, prob = attention_op.attention_forward(q, k, v, scale)
    return attention_op.attention_backward(wide(dout).reshape(q.shape), q, k, v, prob, scale)


def attention_dq(dout: Array, q: Array, k: Array, v: Array, scale: float) -> Array:
    """The first of attention_gradients."""
    return attention_gradients(dout, q, k, v, scale)[0]


def attention_dk(dout: Array, q: Array, k: Array, v: Array, scale: float) -> Array:
    """The second of attention_gradients."""
    return attention_gradients(dout, q, k, v, scale)[1]


def attention_dv(dout: Array, q: Array, k: Array, v: Array, scale: float) -> Array:
    """The third of attention_gradients."""
    return attention_gradients(dout, q, k, v, scale)[2]


def swiglu_dgate(dact: Array, gate: Array, up: Array) -> Array:
    """dact, gate, up (…, F). Returns (…, F)."""
    return swiglu_op.swiglu_backward(wide(dact), wide(gate), wide(up))[0]


def swiglu_dup(dact: Array, gate: Array, up: Array) -> Array:
    """dact, gate, up (…, F). Returns (…, F)."""
    return swiglu_op.swiglu_backward(wide(dact), wide(gate), wide(up))[1]


def silu_d(dact: Array, up: Array) -> Array:
    """The gradient at silu(gate): dact * up (…, F)."""
    return wide(dact) * wide(up)


def embedding_dtable(dout: Array, ids: Array, rows: int) -> Array:
    """dout (…, C); ids (…) int. Returns (rows, C)."""
    out = np.zeros((rows, dout.shape[-1]))
    embedding_backward(out, wide(dout), ids)
    return out


def global_norm(grad: Array) -> Array:
    """grad (…). Returns its L2 norm, (1,)."""
    return np.array([np.linalg.norm(wide(grad))])


def clip(norm: Any, max_norm: float) -> Array:
    """norm (1,). Returns the factor (1,) that clips gradients to max_norm."""
    return np.array([clip_factor(float(np.asarray(norm).reshape(-1)[0]), max_norm)])


def adamw_m(m: Array, grad: Array, beta1: float, grad_scale: Any) -> Array:
    """The first moment after a step from m and grad (…); grad_scale is the clip factor, a number or (1,)."""
    return beta1 * wide(m) + (1.0 - beta1) * (wide(grad) * wide(grad_scale))


def adamw_v(v: Array, grad: Array, beta2: float, grad_scale: Any) -> Array:
    """The second moment after a step from v and grad (…)."""
    return beta2 * wide(v) + (1.0 - beta2) * np.square(wide(grad) * wide(grad_scale))


def adamw_param(param: Array, m: Array, v: Array, lr: float, eps: float, weight_decay: float, step: int,
                beta1: float, beta2: float) -> Array:
    """The parameter (…) after a step from itself and the NEW moments m, v; step counts from 1."""
    update = wide(m) / (1.0 - beta1 ** step) / (np.sqrt(wide(v) / (1.0 - beta2 ** step)) + eps)
    return (1.0 - lr * weight_decay) * wide(param) - lr * update


def identity(x: Array) -> Array:
    """x itself."""
    return wide(x)


FORMULAS: dict[str, Formula] = {f.__name__: f for f in (
    embedding, rmsnorm, linear, bias, heads, flat, rope, attention, residual, silu, swiglu, cross_entropy, loss_sum,
    dlogits, linear_dinp, linear_dweight, bias_dbias, rmsnorm_dinp, rmsnorm_dweight, rope_dinp, attention_dq,
    attention_dk, attention_dv, swiglu_dgate, swiglu_dup, silu_d, embedding_dtable, global_norm, clip, adamw_m,
    adamw_v, adamw_param, identity)} | {"add": residual}
