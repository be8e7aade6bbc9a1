"""What silu is mistaken for: name to the activation and its slope, both of float64 arrays of any shape."""

import math

import numpy as np

from apr.reference.swiglu import sigmoid

CUBIC = 0.044715  # of gelu's tanh approximation
ROOT = math.sqrt(2.0 / math.pi)
FAST = 1.702  # of gelu's approximation by a sigmoid
ERF = np.vectorize(math.erf, otypes=[np.float64])


def normal_below(x: np.ndarray) -> np.ndarray:
    """The standard normal distribution's probability below x."""
    return 0.5 * (1.0 + ERF(x / math.sqrt(2.0)))


def bend(x: np.ndarray) -> np.ndarray:
    """The tanh in gelu's approximation."""
    return np.tanh(ROOT * (x + CUBIC * x ** 3))


ACTIVATIONS = {
    "gelu": (lambda x: x * normal_below(x),
             lambda x: normal_below(x) + x * np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)),
    "gelu's tanh approximation": (
        lambda x: 0.5 * x * (1.0 + bend(x)),
        lambda x: 0.5 * (1.0 + bend(x)) + 0.5 * x * (1.0 - bend(x) ** 2) * ROOT * (1.0 + 3.0 * CUBIC * x * x)),
    "x sigmoid(1.702 x)": (
        lambda x: x * sigmoid(FAST * x),
        lambda x: sigmoid(FAST * x) * (1.0 + FAST * x * (1.0 - sigmoid(FAST * x)))),
    "relu": (lambda x: np.maximum(x, 0.0), lambda x: (x > 0.0).astype(np.float64)),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * (1.0 - sigmoid(x))),
}
