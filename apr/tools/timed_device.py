"""A Device that times each launch, and the milliseconds of a training step by group of kernels.

Launched kernel by kernel, the host is slower than a small kernel: so before the first launch after an upload the GPU is
given something to do for longer than the host needs to hand it the whole step. What is timed is the GPU's.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from apr.device import Device

GROUPS = {"embedding": "embedding", "rmsnorm": "norm + residual", "rope": "rope", "linear": "bias", "swiglu": "swiglu",
          "cross_entropy": "cross-entropy", "adamw": "AdamW", "global_norm": "gradient norm"}
PASSES = {"TN": "products forward", "NN": "products dinput", "NT": "products dweight"}  # as gemm.py hands them over
START, MEMSET = "", "memset"  # names beside those of launches
HOLD = 1 << 30  # bytes of the array whose filling holds the GPU
MOST_HOLDS = 400


class TimedDevice(Device):
    """A Device that, while `timing`, puts an event after every launch and around every memset.

    `hold`: seconds for which the GPU is kept busy before the first launch after an upload.
    """

    def __init__(self, ordinal: int = 0, warn: Callable[[str], None] | None = None) -> None:
        super().__init__(ordinal, warn=warn)
        self.timing, self.hold, self.begins = False, 0.0, True
        self.marks: list[tuple[str, Any]] = []
        self.busy: tuple[Any, float] | None = None  # an array, and the seconds that filling it takes

    def launch(self, *arguments: Any, **options: Any) -> None:
        """See Device.launch."""
        if self.timing and self.begins:
            self.begins = False
            self.wait_for_host()
            self.stamp(START)
        super().launch(*arguments, **options)

    def launched(self, name: str) -> None:
        """See Device.launched."""
        super().launched(name)
        if self.timing:
            self.stamp(name)

    def fill(self, array: Any, byte: int) -> None:
        """See Device.fill."""
        if self.timing:
            self.stamp(START)
        super().fill(array, byte)
        if self.timing:
            self.stamp(MEMSET)

    def upload(self, array: Any, host: Any) -> None:
        """See Device.upload: it may wait for the stream, so what was queued before it is gone."""
        super().upload(array, host)
        self.begins = True

    def send(self, array: Any, pinned: Any) -> None:
        """See Device.send."""
        super().send(array, pinned)
        self.begins = True

    def stamp(self, name: str) -> None:
        """An event on the stream."""
        event = self.cupy.cuda.Event()
        event.record(self.stream)
        self.marks.append((name, event))

    def wait_for_host(self) -> None:
        """Work for the GPU that takes `hold` seconds."""
        if self.hold <= 0:
            return
        if self.busy is None:
            array, seconds = self.empty((HOLD,), "u8"), []
            for _ in range(3):
                self.synchronize()
                start = time.perf_counter()
                super().fill(array, 0)
                self.synchronize()
                seconds.append(time.perf_counter() - start)
            self.busy = array, min(seconds)
        array, each = self.busy
        for _ in range(min(MOST_HOLDS, 1 + int(self.hold / each))):
            super().fill(array, 0)

    def times(self) -> list[tuple[str, float]]:
        """(name, milliseconds) of every launch and memset since the last call: from the event before it to its own."""
        self.synchronize()
        elapsed = self.cupy.cuda.get_elapsed_time
        out = [(name, elapsed(before, after)) for (_, before), (name, after)
               in zip(self.marks, self.marks[1:], strict=False) if name != START]
        self.marks.clear()
        self.begins = True
        return out


def group_of(name: str) -> str:
    """The group of a launch: of a kernel by the op that its source is of, of a product by which of the three it is.

    A source that belongs to no op of training is a group by itself.
    """
    if name == MEMSET:
        return MEMSET
    entry, of, key = name.partition(" of ")
    stem = key.split("-")[0]
    if not of:  # "1152x16384x896-TN-bf16-bf16-0"
        return PASSES.get([*name.split("-"), ""][1], name)
    if stem.startswith("attention"):
        return "attention backward" if "backward" in entry else "attention forward"
    return next((group for op, group in GROUPS.items() if stem == op or stem.startswith(op + "_")), stem)


def step_times(dev: TimedDevice, trainer: Any, batches: list[Any], rounds: int = 4) -> list[list[tuple[str, float]]]:
    """`times` of each of `rounds` steps on `batches` in turn, kernel by kernel; the first steps are not counted.

    `trainer` is a CudaTransformerTrainer on `dev`.
    """
    graphs, trainer.graphs = trainer.graphs, False
    try:
        trainer.train_batch(batches[0])
        start = time.perf_counter()
        dev.timing = True
        trainer.train_batch(batches[0])
        dev.hold = 1.2 * (time.perf_counter() - start)
        out = []
        for i in range(rounds):
            dev.times()
            trainer.train_batch(batches[i % len(batches)])
            out.append(dev.times())
    finally:
        trainer.graphs, dev.timing, dev.hold, dev.busy = graphs, False, 0.0, None
        dev.marks.clear()
    return out


def by_name(rounds: list[list[tuple[str, float]]], name_of: Callable[[str], str]) -> dict[str, tuple[float, float]]:
    """(milliseconds, launches) of a step by name_of(launch): medians over rounds, the largest first."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(rounds))
    counts: dict[str, int] = defaultdict(int)
    for i, launches in enumerate(rounds):
        for name, ms in launches:
            sums[name_of(name)][i] += ms
            counts[name_of(name)] += 1
    found = {name: (statistics.median(values), counts[name] / len(rounds)) for name, values in sums.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
