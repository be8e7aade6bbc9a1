"""Divide each row by its root mean square and scale by a learned weight; and the gradient.

MATH    rstd_n = 1 / sqrt(mean_c inp_nc^2 + eps)            norm_nc = inp_nc * rstd_n        out_nc = norm_nc * weight_c
        dnorm_nc = dout_nc * weight_c                        dweight_c += sum_n dout_nc * norm_nc
        dinp_nc = rstd_n * (dnorm_nc - norm_nc * mean_c(dnorm_nc * norm_nc))
SOURCE  Zhang & Sennrich 2019, arXiv:1910.07467
"""

import numpy as np


def rmsnorm_forward(inp: np.ndarray, weight: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """RMSNorm over the last axis.

    inp (..., C); weight (C,). Returns out (..., C) and rstd (..., 1), unit 1/|inp|, which backward needs.
    """
    mean_square = np.einsum("...c,...c->...", inp, inp)[..., None] / inp.shape[-1]
    rstd = 1.0 / np.sqrt(mean_square + inp.dtype.type(eps))
    out = inp * rstd
    out *= weight
    return out, rstd


def rmsnorm_backward(dweight: np.ndarray, dout: np.ndarray, inp: np.ndarray, weight: np.ndarray,
                     rstd: np.ndarray) -> np.ndarray:
    """Gradient of rmsnorm_forward.

    dweight (C,) accumulated; dout (..., C); inp, weight, rstd as in forward. Returns dinp (..., C).
    """
    channels = inp.shape[-1]
    norm = inp * rstd
    dweight += np.einsum("nc,nc->c", dout.reshape(-1, channels), norm.reshape(-1, channels))
    dinp = dout * weight
    mean = np.einsum("...c,...c->...", dinp, norm)[..., None] / channels
    norm *= mean
    dinp -= norm
    dinp *= rstd
    return dinp
