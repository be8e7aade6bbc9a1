"""What a step leaves on a GPU: StepView over the arena, without a kernel and without an allocation there."""

from collections.abc import Callable, Sequence

import numpy as np

from apr.arena import Arena
from apr.block import stored
from apr.data.batch import LMBatch
from apr.device import Device
from apr.model import Model
from apr.params import ParamSpec


class CudaStepView:
    """StepView of a GPU trainer: each read is one copy of memory that lies together."""

    def __init__(self, dev: Device, arena: Arena, net: Model, fitting: Callable[[LMBatch], list[LMBatch]]) -> None:
        self.dev, self.arena, self.net, self.fitting = dev, arena, net, fitting
        self.precision = arena.plan.precision

    def parts(self, micro: Sequence[LMBatch]) -> list[LMBatch]:
        """As the trainer cuts them: at most the planned sequences each."""
        return [part for batch in micro for part in self.fitting(batch)]

    def stored(self, spec: ParamSpec) -> np.ndarray:
        """As Model.stored. Raises DeviceFault."""
        return self.net.stored(spec)

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> np.ndarray:
        """A batch smaller than planned lies at the beginning. Raises DeviceFault."""
        array = self.arena[name] if layer is None else self.arena[name][layer]
        return stored(self.dev, array[start:stop])

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Raises DeviceFault."""
        return stored(self.dev, self.arena[name][start:stop])
