"""Token ids to rows of the embedding table, and the gradient summed into those rows.

MATH   out[n] = weight[ids[n]]        dweight[v] += sum over n with ids[n] = v of dout[n]
"""

import numpy as np


def embedding_forward(ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Rows of the table.

    ids (B, T) int, 0 <= id < V; weight (V, C) float. Returns (B, T, C), a copy. Raises IndexError for an id out of
    range, negative ones included: NumPy would wrap them silently.
    """
    if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < weight.shape[0]):
        raise IndexError(f"token id outside [0, {weight.shape[0]}): min {ids.min()}, max {ids.max()}")
    return weight[ids]


def embedding_backward(dweight: np.ndarray, dout: np.ndarray, ids: np.ndarray) -> None:
    """Gradient of embedding_forward.

    dweight (V, C) accumulated; dout (B, T, C); ids (B, T). Rows are summed in the order of their positions, so the
    result is the same bits every time.
    """
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    unique, starts = np.unique(flat[order], return_index=True)
    dweight[unique] += np.add.reduceat(dout.reshape(flat.size, -1)[order], starts, axis=0)
