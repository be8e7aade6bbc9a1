"""Choosing a token from scores: the truth that a GPU matches token for token.

Every sum is of integers: a weight is a probability in units of 2^-30 of the largest, so sums are exact whatever the
order, and a block of threads that adds in any order chooses the same token. Random bits come from a counter, not from a
state: the draw of a position does not depend on which others were made, nor on who is in the batch.

MATH    z_i = (score_i - max score) / temperature        w_i = floor(2^30 exp(z_i)), all in float32
        top k: those with a score of at least the k-th largest; all that are equal to it stay
        top p: those above which (strictly) lie weights of less than ceil(top_p * sum of w)
        token = the first id at which the running sum of kept w exceeds floor(u * sum of kept w / 2^64)
        u = the first two words of Philox(key = seed, counter = position, sequence, 0, 0), the first one high
SOURCE  Holtzman et al. 2020, arXiv:1904.09751 (top p); Salmon et al. 2011, doi:10.1145/2063384.2063405 (Philox4x32-10)
"""

import math

import numpy as np

from apr.config import Sampling
from apr.errors import InferenceError, ShapeError

WORD = 2**32 - 1
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
UNIT = np.float32(2**30)  # the largest score's weight
MAX_FLOAT = float(np.finfo(np.float32).max)


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Four random words of 32 bits, a pure function of the key and counter, of 32 bits a word too."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(ROUNDS):
        a, b = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & WORD, (a >> 32) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def choose(scores: np.ndarray, sampling: Sampling, sequence: int, position: int) -> int:
    """The token at `position` of a sequence: scores (V,) float32 to an id below sampling.vocab.

    sequence is sampling.first + the row in the batch; position counts from the sequence's first token, so that the one
    that follows a prompt of n tokens is at n. Raises ShapeError for other shapes, InferenceError for a score that is
    NaN and where the largest is infinite.
    """
    if scores.ndim != 1 or scores.dtype != np.float32 or not 1 <= sampling.vocab <= scores.size:
        raise ShapeError("scores (V,)", f"float32, V at least the vocabulary of {sampling.vocab}",
                         f"{scores.dtype} {list(scores.shape)}", "give one position's scores")
    real = scores[:sampling.vocab]
    best = int(real.argmax())  # NaN counts as the largest here
    if not math.isfinite(real[best]):
        raise InferenceError(f"scores at position {position}", "numbers, the largest of them finite",
                         f"{real[best]} at id {best}", "the model is damaged: see 'apr inspect'")
    if sampling.temperature == 0:
        return best
    weights = _weights(real, real[best], sampling.temperature)
    if 0 < sampling.top_k < real.size:
        weights[real < np.partition(real, -sampling.top_k)[-sampling.top_k]] = 0
    if sampling.top_p < 1:
        _keep_top_p(weights, real, sampling.top_p)
    high, low, _, _ = philox((sampling.seed & WORD, sampling.seed >> 32), (position, sequence, 0, 0))
    sums = np.cumsum(weights)
    return int(np.searchsorted(sums, ((high << 32 | low) * int(sums[-1])) >> 64, side="right"))


def _weights(scores: np.ndarray, largest: np.float32, temperature: float) -> np.ndarray:
    """w (V,) int64: below 2^51 in sum. exp is rounded from float64, to be the same float32 on every machine."""
    inverse = np.float32(min(1 / temperature, MAX_FLOAT))
    with np.errstate(over="ignore", under="ignore"):  # -inf, whose weight is 0
        z = (scores - largest) * inverse
        return np.floor(np.exp(z.astype(np.float64)).astype(np.float32) * UNIT).astype(np.int64)


def _keep_top_p(weights: np.ndarray, scores: np.ndarray, top_p: float) -> None:
    """Set to 0 the weights of ids above which, by score, lies at least top_p of the sum."""
    order = np.argsort(-scores, kind="stable")
    falling = -scores[order]
    sums = np.concatenate(([0], np.cumsum(weights[order])))
    target = max(1, math.ceil(top_p * float(sums[-1])))
    above = sums[np.searchsorted(falling, falling, side="left")]
    weights[order[above >= target]] = 0
