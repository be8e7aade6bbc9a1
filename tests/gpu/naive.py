"""Naive bf16: the reference in float32 with every op's result, and what an op keeps in between, rounded to bf16.

What a bf16 kernel is allowed is twice the error of this (harness.judge). Attention needs a version of its own, since
its intermediate results are inside; the others are the reference's functions with their results rounded.
"""

import numpy as np
from harness import rounded

import apr.reference.block
import apr.reference.model
from apr.reference.attention import _by_head, _by_token

OPS = ("linear_forward", "linear_backward", "bias_forward", "residual_forward", "residual_backward", "rmsnorm_backward",
       "rope_forward", "rope_backward", "swiglu_forward", "swiglu_backward")


def attention_forward(q, k, v, scale):
    """As the reference's: out and prob, scores and both of these rounded."""
    t, num_kv = q.shape[1], k.shape[2]
    score = rounded(np.matmul(_by_head(q, num_kv), _by_head(k, num_kv).swapaxes(-1, -2)) * np.float32(scale))
    future = np.triu(np.full((t, t), -np.inf, np.float32), k=1)
    score.reshape(q.shape[0], q.shape[2], t, t)[...] += future
    prob = np.exp(score - score.max(axis=-1, keepdims=True))
    prob = rounded(prob / prob.sum(axis=-1, keepdims=True))
    return rounded(_by_token(np.matmul(prob, _by_head(v, num_kv)), t)), prob


def attention_backward(dout, q, k, v, prob, scale):
    """As the reference's: dq, dk, dv; dprob, its mean and dscore are rounded too."""
    t, num_kv = q.shape[1], k.shape[2]
    dout_h = _by_head(dout, num_kv)
    dprob = rounded(np.matmul(dout_h, _by_head(v, num_kv).swapaxes(-1, -2)))
    mean = rounded(np.einsum("...s,...s->...", dprob, prob))[..., None]
    dscore = rounded(prob * (dprob - mean))
    dq = np.matmul(dscore, _by_head(k, num_kv)) * np.float32(scale)
    dk = np.matmul(dscore.swapaxes(-1, -2), _by_head(q, num_kv)) * np.float32(scale)
    dv = np.matmul(prob.swapaxes(-1, -2), dout_h)
    return tuple(rounded(_by_token(x, t)) for x in (dq, dk, dv))


def round_reference(patch) -> None:
    """Make the reference's layer and model naive bf16 computations; `patch` is pytest's MonkeyPatch."""
    for module in (apr.reference.block, apr.reference.model):
        for name in OPS:
            if hasattr(module, name):
                patch.setattr(module, name, _rounding(getattr(module, name)))
        patch.setattr(module, "rmsnorm_forward", _norm(module.rmsnorm_forward))
    patch.setattr(apr.reference.block, "attention_forward", attention_forward)
    patch.setattr(apr.reference.block, "attention_backward", attention_backward)
    patch.setattr(apr.reference.model, "cross_entropy_forward_backward",
                  _in_place(apr.reference.model.cross_entropy_forward_backward))


def _rounding(function):
    """All results rounded; gradients of weights are added in float32, as on the GPU."""
    def call(*arguments):
        out = function(*arguments)
        return tuple(map(rounded, out)) if isinstance(out, tuple) else rounded(out)
    return call


def _norm(function):
    """The output rounded, the reciprocal norm not: it is float32 everywhere."""
    def call(*arguments):
        out, rstd = function(*arguments)
        return rounded(out), rstd
    return call


def _in_place(function):
    """The gradient over the scores rounded."""
    def call(logits, targets, dloss):
        losses = function(logits, targets, dloss)
        logits[...] = rounded(logits)
        return losses
    return call
