"""Counter-based random numbers: every draw is a pure function of a seed and of what it is for.

Nothing here has state that would have to be saved: the numbers of step 1000 do not depend on steps 0 to 999 having run.
"""

import hashlib

import numpy as np


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """A Philox generator keyed by the seed and by what the numbers are for, such as ("init", "lm_head.weight")."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return np.random.Generator(np.random.Philox(key=[seed, int.from_bytes(digest[:8], "little")]))


def permutation(n: int, seed: int, *purpose: str | int) -> np.ndarray:
    """An order of range(n), (n,) int64, from raw 64-bit draws: NumPy promises their stream for good, not shuffle's."""
    raw = generator(seed, *purpose).bit_generator.random_raw(n)
    return np.argsort(raw, kind="stable")
