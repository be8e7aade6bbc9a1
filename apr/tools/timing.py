"""Time on a GPU, for `apr bench` and for the benchmarks: events on apr's own stream, a flushed L2, random data.

Data are never zeros: a GPU multiplies zeros faster. `ceilings` is what this GPU does at best, measured when it is
called: the rates of a run are compared with those of the same run.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from apr.buffers import WORKSPACE
from apr.device import Device
from apr.dtypes import BY_NAME
from apr.gemm import Gemm
from apr.kernel import DEVICE_DTYPES

FLUSH = 256 << 20  # bytes written between repetitions: several times any L2
FLUSH_SECONDS = 60e-6  # the least that writing them takes, on the quickest GPU
MOST_FLUSHES, MOST_REPETITIONS = 50, 1000
BLOCK = (1 << 22) + 1000  # random numbers made on the host; longer arrays repeat them
Launch = Callable[[], Any]


class Timing(NamedTuple):
    """Microseconds on the GPU: of half of the repetitions, of a fifth, of four fifths, at most these."""

    median: float
    p20: float
    p80: float


@dataclass
class Lab:
    """A GPU to measure on: device, products, and its arrays of random numbers."""

    dev: Device
    quick: bool = False
    blocks: dict[tuple[str, bool], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gemm = Gemm(self.dev, self.dev.empty((WORKSPACE,), "u8"))

    def empty(self, shape: tuple[int, ...], storage: str) -> Any:
        """An array that a launch writes before anything reads it."""
        return self.dev.empty(shape, storage)

    def put(self, host: np.ndarray) -> Any:
        """A copy of a NumPy array."""
        storage = next(name for name, dtype in DEVICE_DTYPES.items() if dtype == host.dtype)
        array = self.dev.empty(host.shape, storage)
        self.dev.upload(array, host)
        return array

    def random(self, shape: tuple[int, ...], storage: str, positive: bool = False) -> Any:
        """An array of normal numbers, f32 or bf16 (or their absolute values)."""
        if (storage, positive) not in self.blocks:
            numbers = np.random.default_rng(len(self.blocks)).standard_normal(BLOCK, np.float32)
            numbers = np.abs(numbers) if positive else numbers
            bf16 = numbers.astype(BY_NAME["BF16"].numpy).view(np.uint16)
            self.blocks[storage, positive] = self.put(bf16 if storage == "bf16" else numbers)
        array, block = self.dev.empty(shape, storage), self.blocks[storage, positive]
        for start in range(0, array.nbytes, block.nbytes):
            size = min(block.nbytes, array.nbytes - start)
            (array.data + start).copy_from_device_async(block.data, size, self.dev.stream)
        return array

    def copy(self, to: Any, source: Any) -> None:
        """Copy an array."""
        to.data.copy_from_device_async(source.data, source.nbytes, self.dev.stream)


def measure(dev: Device, launch: Launch, flush: bool = True, quick: bool = False) -> Timing:
    """How long what `launch` puts on dev.stream takes there; each repetition is timed by itself.

    Without `flush` the data may lie in L2, and a launch that is shorter than the host's work for it measures the host.
    """
    return measure_in_turns(dev, [launch], flush, quick)[0]


def measure_in_turns(dev: Device, launches: Sequence[Launch], flush: bool = True, quick: bool = False,
                     reset: Launch | None = None) -> list[Timing]:
    """measure() of several launches, one repetition of each at a time; `reset` runs, untimed, before the first."""
    least, seconds = (5, 0.02) if quick else (20, 0.2)
    memory = dev.empty((FLUSH,), "u8") if flush else None
    counts = [flushes(dev, launch) if flush else 0 for launch in launches]
    start, end = dev.cupy.cuda.Event(), dev.cupy.cuda.Event()
    times: list[list[float]] = [[] for _ in launches]
    begin = time.perf_counter()
    while len(times[0]) < least or (time.perf_counter() - begin < seconds * len(launches)
                                    and len(times[0]) < MOST_REPETITIONS):
        for i, launch in enumerate(launches):
            if reset is not None and i == 0:
                reset()
            for _ in range(counts[i]):
                dev.fill(memory, 0)
            start.record(dev.stream)
            launch()
            end.record(dev.stream)
            dev.synchronize()
            times[i].append(1e3 * dev.cupy.cuda.get_elapsed_time(start, end))
    return [Timing(*map(float, np.percentile(t, [50, 20, 80]))) for t in times]


def flushes(dev: Device, launch: Launch) -> int:
    """Warm a launch up; how many flushes keep the GPU busy while the host prepares it: events should see no waiting."""
    for _ in range(3):
        launch()
    dev.synchronize()
    start = time.perf_counter()
    launch()
    host = time.perf_counter() - start
    dev.synchronize()
    return min(MOST_FLUSHES, 1 + math.ceil(1.5 * host / FLUSH_SECONDS))


def ceilings(b: Lab) -> dict[str, float]:
    """What this GPU does at best, per second: "copy" bytes read and written; FLOPs of "bf16" and "f32" products."""
    source, to = b.random((1 << 28,), "f32"), b.empty((1 << 28,), "f32")
    out = {"copy": 2 * source.nbytes / (1e-6 * measure(b.dev, lambda: b.copy(to, source), quick=b.quick).median)}
    for storage, size in (("bf16", 8192), ("f32", 4096)):
        inp, weight, result = (b.random((size, size), storage) for _ in range(3))
        timing = measure(b.dev, partial(b.gemm.linear, result, inp, weight), quick=b.quick)
        out[storage] = 2 * size**3 / (1e-6 * timing.median)
    return out
