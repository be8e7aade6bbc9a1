"""Causal grouped-query attention; the whole T x T matrix is kept, since this is the truth and not the fast way.

Query head h reads key/value head h // G, G = NH / NKV. The G queries that share a head are stacked as rows of one
product, which also sums their shares of dk and dv.

MATH    score_ij = scale * q_i · k_j for j <= i (else -inf)      prob = softmax_j(score)      out_i = sum_j prob_ij v_j
        dprob = dout · vᵀ      dscore = prob * (dprob - sum_j prob dprob)
        dq = scale * dscore · k      dk = scale * dscoreᵀ · q      dv = probᵀ · dout
SOURCE  Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023 (GQA), arXiv:2305.13245
"""

import numpy as np


def _by_head(x: np.ndarray, num_kv: int) -> np.ndarray:
    """(B, T, H, HS) to (B, NKV, (H/NKV)*T, HS), contiguous."""
    b, t, h, hs = x.shape
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(b, num_kv, h // num_kv * t, hs)


def _by_token(x: np.ndarray, t: int) -> np.ndarray:
    """The inverse: (B, NKV, G*T, HS) to (B, T, NKV*G, HS), contiguous."""
    b, num_kv, rows, hs = x.shape
    return np.ascontiguousarray(x.reshape(b, num_kv * (rows // t), t, hs).transpose(0, 2, 1, 3))


def attention_forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Causal attention of T queries over S >= T keys; the last query sees all, query i sees keys up to i + S - T.

    q (B, T, NH, HS); k, v (B, S, NKV, HS); scale 1/sqrt(HS). Returns out (B, T, NH, HS) and prob (B, NKV, G*T, S).
    """
    b, t, nh, _ = q.shape
    s, num_kv = k.shape[1], k.shape[2]
    prob = np.matmul(_by_head(q, num_kv) * q.dtype.type(scale), _by_head(k, num_kv).swapaxes(-1, -2))
    future = np.triu(np.full((t, s), -np.inf, q.dtype), k=s - t + 1)
    prob.reshape(b, nh, t, s)[...] += future
    prob -= prob.max(axis=-1, keepdims=True)
    np.exp(prob, out=prob)
    prob /= prob.sum(axis=-1, keepdims=True)
    return _by_token(np.matmul(prob, _by_head(v, num_kv)), t), prob


def attention_backward(dout: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, prob: np.ndarray,
                       scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradient of attention_forward, with S = T.

    dout (B, T, NH, HS); q, k, v, scale as in forward; prob its second output. Returns dq, dk, dv, shaped as q, k, v.
    """
    t, num_kv = q.shape[1], k.shape[2]
    dout_h, scaled = _by_head(dout, num_kv), q.dtype.type(scale)
    dv = np.matmul(prob.swapaxes(-1, -2), dout_h)
    dscore = np.matmul(dout_h, _by_head(v, num_kv).swapaxes(-1, -2))
    dscore -= np.einsum("...s,...s->...", dscore, prob)[..., None]
    dscore *= prob
    dq = np.matmul(dscore, _by_head(k, num_kv))
    dk = np.matmul(dscore.swapaxes(-1, -2), _by_head(q, num_kv))
    dq *= scaled
    dk *= scaled
    return _by_token(dq, t), _by_token(dk, t), _by_token(dv, t)
