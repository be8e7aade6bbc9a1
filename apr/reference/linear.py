"""Matrix product with a weight stored [out, in], as Hugging Face stores it, and an optional bias.

MATH   out = inp · weightᵀ + bias        dinp = dout · weight        dweight += doutᵀ · inp        dbias += sum_n dout_n
"""

import numpy as np


def linear_forward(inp: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """inp (..., I); weight (O, I). Returns (..., O)."""
    rows = inp.reshape(-1, inp.shape[-1])  # one product over all rows: NumPy would make one per sequence
    return np.matmul(rows, weight.T).reshape(*inp.shape[:-1], weight.shape[0])


def bias_forward(out: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """out (..., O); bias (O,). Returns their sum (..., O)."""
    return out + bias


def linear_backward(dweight: np.ndarray, dout: np.ndarray, inp: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Gradient of linear_forward.

    dweight (O, I) accumulated; dout (..., O); inp (..., I); weight (O, I). Returns dinp (..., I).
    """
    rows = dout.reshape(-1, dout.shape[-1])
    dweight += np.matmul(rows.T, inp.reshape(-1, inp.shape[-1]))
    return np.matmul(rows, weight).reshape(inp.shape)


def bias_backward(dbias: np.ndarray, dout: np.ndarray) -> None:
    """Gradient of bias_forward: dbias (O,) accumulated; dout (..., O)."""
    dbias += dout.reshape(-1, dout.shape[-1]).sum(axis=0)
