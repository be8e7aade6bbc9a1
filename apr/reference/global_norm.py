"""The L2 norm over every gradient of the model, and the factor that clips it.

MATH    norm = sqrt(sum over all parameters of grad^2)        factor = min(1, max_norm / norm)
SOURCE  Pascanu et al. 2013, arXiv:1211.5063
"""

import numpy as np

BLOCK = 1 << 16  # elements summed in one go; partial sums are added in float64, in order


def global_norm(grads: np.ndarray) -> float:
    """grads (P,) float, flat. Returns the norm; NaN or inf if a gradient is."""
    total = 0.0
    for start in range(0, grads.size, BLOCK):
        squares = np.square(grads[start:start + BLOCK].astype(np.float64))
        total += float(squares.sum())  # pairwise; the error of a BLAS dot would grow with the length, by processor
    return float(np.sqrt(total))


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients by so that their norm is at most max_norm; 1 when it already is, NaN for NaN."""
    return 1.0 if norm <= max_norm else max_norm / norm
