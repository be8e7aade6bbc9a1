"""AdamW: Adam with decoupled weight decay, over flat memory.

MATH    g = grad * grad_scale        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        param = param - lr * weight_decay * param - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
SOURCE  Loshchilov & Hutter 2019, arXiv:1711.05101; operations in torch.optim.AdamW's order
"""

import numpy as np

BLOCK = 1 << 15  # elements updated in one go, so that the five arrays stay in the cache


def adamw_update(param: np.ndarray, m: np.ndarray, v: np.ndarray, grad: np.ndarray, *, lr: float, beta1: float,
                 beta2: float, eps: float, weight_decay: float, step: int, grad_scale: float) -> None:
    """One step of AdamW.

    param, m, v (P,) float, updated in place; grad (P,) float, read; step counts from 1; grad_scale is the clip factor.
    """
    kind = param.dtype.type
    correction2 = np.sqrt(1.0 - beta2 ** step)
    step_size = kind(lr / (1.0 - beta1 ** step))
    keep = kind(1.0 - lr * weight_decay)
    for start in range(0, param.size, BLOCK):
        block = slice(start, start + BLOCK)
        p, m_b, v_b = param[block], m[block], v[block]
        g = grad[block] * kind(grad_scale)
        p *= keep
        m_b *= kind(beta1)
        m_b += kind(1.0 - beta1) * g
        v_b *= kind(beta2)
        g *= g
        g *= kind(1.0 - beta2)
        v_b += g
        denominator = np.sqrt(v_b)
        denominator /= kind(correction2)
        denominator += kind(eps)
        np.divide(m_b, denominator, out=denominator)
        denominator *= step_size
        p -= denominator
