"""Cross-entropy of next-token scores in nats, and its gradient, in one walk over the rows.

MATH    loss_n = log(sum_v exp(logit_nv)) - logit_n,target        dlogit_nv = (softmax_nv - [v = target_n]) * dloss
        A row whose target is IGNORE has loss 0 and gradient 0 and is not counted.
"""

import numpy as np

from apr.config import IGNORE
from apr.errors import ShapeError

ROWS = 64  # rows per block: a block of logits stays in the cache between the passes over it


def cross_entropy_forward_backward(logits: np.ndarray, targets: np.ndarray, dloss: float | None) -> np.ndarray:
    """Losses of all rows; with `dloss`, the gradient of dloss * (sum of losses) replaces the logits.

    logits (N, V) float, overwritten by dlogits unless dloss is None; targets (N,) int, in [0, V) or IGNORE; dloss is
    1 / (number of counted targets) for the mean. Returns losses (N,) float, nats. Raises ShapeError for a bad target.
    """
    rows, vocab = logits.shape
    valid = targets != IGNORE
    if not bool(np.all((targets >= 0) & (targets < vocab) | ~valid)):
        bad = int(targets[~((targets >= 0) & (targets < vocab)) & valid][0])
        raise ShapeError("cross_entropy targets", f"ids in [0, {vocab}) or {IGNORE}", str(bad), "check the data")
    losses = np.zeros(rows, logits.dtype)
    index = np.where(valid, targets, 0)
    for start in range(0, rows, ROWS):
        block = slice(start, min(start + ROWS, rows))
        x, n = logits[block], np.arange(min(ROWS, rows - start))
        p = x - x.max(axis=-1, keepdims=True)
        target_score = p[n, index[block]]
        np.exp(p, out=p)
        total = p.sum(axis=-1)
        losses[block] = np.where(valid[block], np.log(total) - target_score, 0.0)
        if dloss is not None:
            np.multiply(p, (logits.dtype.type(dloss) / total)[:, None], out=x)
            x[n, index[block]] -= logits.dtype.type(dloss)
            x[~valid[block]] = 0.0
    return losses
