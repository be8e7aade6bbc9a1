"""Keys and values of earlier positions, kept so that a new token costs one pass over the weights and not all before it.

The layer is the reference's own: only where attention takes its keys and values differs. Sequences of a batch need not
be equally long: each has its length, its positions and its part of the cache.

MATH    cached_forward of tokens n..n+T-1 after those of 0..n-1 = rows n..n+T-1 of model_forward of all n+T
"""

import numpy as np

from apr.config import TransformerConfig
from apr.errors import ShapeError
from apr.params import EMBED, NORM
from apr.reference.attention import attention_forward
from apr.reference.block import Arrays, Attend, block_forward
from apr.reference.embedding import embedding_forward
from apr.reference.linear import linear_forward
from apr.reference.model import head_name
from apr.reference.rmsnorm import rmsnorm_forward
from apr.reference.rope import rope_tables
from apr.taps import Tap, layer_tap


class KVCache:
    """Rotated keys, and values, of B sequences of up to S tokens: k, v (L, B, S, NKV, HS).

    `lengths` is how many tokens each sequence has; what lies beyond is old or never written, and never read. A page of
    memory is taken when it is first written.
    """

    def __init__(self, config: TransformerConfig, B: int, S: int, dtype: np.dtype) -> None:
        self.k, self.v = (np.empty((config.L, B, S, config.NKV, config.HS), dtype) for _ in range(2))
        self.lengths = [0] * B

    def attend(self, layer: int, rows: list[int]) -> Attend:
        """Attention of new tokens of the sequences `rows` over those kept and themselves; it keeps theirs.

        It takes q (B, T, NH, HS), k, v (B, T, NKV, HS), the scale; returns out (B, T, NH, HS) and no probabilities.
        """
        def cached(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
            out = np.empty_like(q)
            for i, row in enumerate(rows):
                start, end = self.lengths[row], self.lengths[row] + q.shape[1]
                keys, values = self.k[layer, row], self.v[layer, row]
                keys[start:end], values[start:end] = k[i], v[i]
                out[i], _ = attention_forward(q[i:i + 1], keys[None, :end], values[None, :end], scale)
            return out, np.empty(0, q.dtype)

        return cached


def cached_forward(params: Arrays, config: TransformerConfig, ids: np.ndarray, cache: KVCache, rows: list[int],
                   tap: Tap | None = None, last: bool = False) -> np.ndarray:
    """Next-token scores of tokens that follow what the cache holds of their sequences; they are added to it.

    params as model_forward's; ids (B, T) int, one row for each sequence number in `rows`. Returns logits (B, T, V), or
    with `last` (B, 1, V), those of the last token alone. Raises ShapeError when a sequence would exceed S.
    """
    (b, t), size = ids.shape, cache.k.shape[2]
    starts = np.array([cache.lengths[row] for row in rows])
    if t < 1 or int(starts.max()) + t > size:
        raise ShapeError("ids (B, T)", f"1 or more tokens, to at most S = {size} with those before",
                         f"{t} after {int(starts.max())}", "shorten the sequence")
    x = embedding_forward(ids, params[EMBED])
    if tap is not None:
        tap("embedding", x)
    positions = (starts[:, None] + np.arange(t)).reshape(-1)
    cos, sin = rope_tables(positions, config.HS, config.rope_theta, config.rope_scaling, x.dtype)
    tables = cos.reshape(b, t, 1, -1), sin.reshape(b, t, 1, -1)
    for layer in range(config.L):
        x = block_forward(params, config, layer, x, tables, None, layer_tap(tap, layer), cache.attend(layer, rows))
    for row in rows:
        cache.lengths[row] += t
    if last:
        x = x[:, -1:]
    normed, _ = rmsnorm_forward(x, params[NORM], config.rms_norm_eps)
    logits = linear_forward(normed, params[head_name(config)])
    if tap is not None:
        tap("final_norm", normed)
        tap("logits", logits)
    return logits
