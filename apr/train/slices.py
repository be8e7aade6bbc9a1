"""A batch cut into slices that run on several cores, with bits that do not depend on how many cores there are.

NumPy's elementwise operations use one core, and BLAS threads waiting for each other are very slow on a machine that has
other work (measured in docs/log.md). So each slice of a batch runs in a thread of its own with BLAS on one core, into a
gradient buffer of its own, and the buffers are added in slice order. The cut depends on the batch alone.
"""

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from apr.data.batch import LMBatch

SLICES = 4  # at most; each costs a gradient buffer
SLICE_TOKENS = 512  # at least, where the batch has them: threads of small operations wait for the interpreter
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
T = TypeVar("T")
R = TypeVar("R")


class SliceRunner:
    """Threads for the slices of a batch, one per usable core up to SLICES."""

    def __init__(self) -> None:
        keep_freed_memory()
        self.blas = ThreadpoolController().select(user_api="blas")
        self.pool = ThreadPoolExecutor(min(SLICES, len(os.sched_getaffinity(0))), thread_name_prefix="slice")

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """function of each item, in the items' order; an overflow is no warning here, since results are checked."""
        def quietly(item: T) -> R:
            with np.errstate(all="ignore"):
                return function(item)

        with self.blas.limit(limits=1):
            return list(self.pool.map(quietly, items))


def keep_freed_memory() -> None:
    """Let glibc keep freed arrays: given back to the system, every temporary costs its page faults again.

    One arena, no mmap below 32 MiB (the largest threshold that glibc takes), no trimming: 1.24x on the demo. Where the
    C library has no mallopt, nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            mallopt(option, value)


def cut(batch: LMBatch) -> list[LMBatch]:
    """The batch as at most SLICES batches of whole sequences, sizes as equal as they can be, in order."""
    count = max(1, min(SLICES, batch.batch_size, batch.inputs.size // SLICE_TOKENS))
    bounds = [i * batch.batch_size // count for i in range(count + 1)]
    return [LMBatch(batch.inputs[a:b], batch.targets[a:b]) for a, b in pairwise(bounds)]


def ranges(start: int, stop: int) -> list[slice]:
    """[start, stop) of flat memory in SLICES pieces, for work that is element by element."""
    edges = [start + i * (stop - start) // SLICES for i in range(SLICES + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def add_in_order(total: np.ndarray, parts: Sequence[np.ndarray], runner: SliceRunner) -> None:
    """total += parts[0]; += parts[1]; …, element by element in that order; (P,) float32 each."""
    def add(piece: slice) -> None:
        for part in parts:
            total[piece] += part[piece]

    runner.map(add, ranges(0, total.size))
