"""The gated activation of the feed-forward layer.

MATH    out = silu(gate) * up        silu(x) = x * sigmoid(x)
        dup = dout * silu(gate)      dgate = dout * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
SOURCE  Shazeer 2020, arXiv:2002.05202
"""

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), any shape. exp may overflow to inf for very negative x; the quotient is then 0, rightly."""
    with np.errstate(over="ignore"):
        out = np.exp(-x)
    out += 1.0
    return np.reciprocal(out, out=out)


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), any shape."""
    out = sigmoid(x)
    out *= x
    return out


def swiglu_forward(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """gate, up (..., F). Returns silu(gate) * up."""
    out = silu(gate)
    out *= up
    return out


def swiglu_backward(dout: np.ndarray, gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradient of swiglu_forward: dout, gate, up (..., F). Returns dgate, dup."""
    s = sigmoid(gate)
    dup = s * gate
    slope = 1.0 - s
    slope *= gate
    slope += 1.0
    slope *= s
    slope *= up
    slope *= dout
    dup *= dout
    return slope, dup
