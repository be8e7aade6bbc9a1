"""The residual stream: what a sub-layer computed is added to what it was given.

MATH   out = inp + update        dinp = dout        dupdate = dout
The gradient at a join has two parts, the identity's and the sub-layer's; `residual_backward` is where they meet.
(Upstream lost the second part for the first join of each block.)
"""

import numpy as np


def residual_forward(inp: np.ndarray, update: np.ndarray) -> np.ndarray:
    """inp, update (B, T, C). Returns their sum."""
    return inp + update


def residual_backward(dout: np.ndarray, dinp_through_update: np.ndarray) -> np.ndarray:
    """Gradient with respect to `inp`, which reaches the sum both directly and through the sub-layer.

    dout (B, T, C), the gradient of the sum; dinp_through_update (B, T, C), the sub-layer's share. Returns their sum.
    """
    return dout + dinp_through_update
