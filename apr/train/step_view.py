"""What a step leaves in a trainer's buffers, to be read by who checks it; reading changes nothing.

After a step the activations are those of the last part that went through the layers; `gate_up` holds its gradient.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from apr.data.batch import LMBatch
from apr.params import ParamSpec


class StepView(Protocol):
    """A trainer's buffers by the names of apr/buffers.py, copied: bfloat16 where they are bf16, else float32."""

    precision: str  # fp32 or bf16

    def parts(self, micro: Sequence[LMBatch]) -> list[LMBatch]:
        """The parts in which a step's micro-batches go through the layers, in order."""

    def stored(self, spec: ParamSpec) -> np.ndarray:
        """A parameter, in its shape, as the kernels read it now."""

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a buffer of N rows: (stop - start, width), or (stop - start,) of `losses`.

        `layer` counts the first axis where there is one; for `residual` that is twice the layers, and one.
        """

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of master, params, grads, m or v."""
