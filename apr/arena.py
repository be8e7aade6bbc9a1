"""The arena: every buffer of a plan, allocated once; the names, shapes and dtypes are the plan's.

Each buffer is an allocation of its own, so that a memory checker sees the end of every one. `logits_buf` has phases,
free -> logits -> dlogits -> free, and a step that reads it in the wrong one is refused: upstream's evaluation read what
training had left in it.
"""

import math
from typing import Any

from apr.buffers import Plan
from apr.device import Device
from apr.errors import OutOfMemoryError, ShapeError

PHASES = {"free": "logits", "logits": "dlogits", "dlogits": "free"}
ZEROED = ("master", "params", "grads", "optimizer", "inputs", "state", "kv")  # the others are written before read
RESERVE = 512 << 20  # bytes left for CUDA itself, kernels and graphs


class Arena:
    """The buffers of `plan` on a device: arena["qkv"] is a CuPy array (bf16 as uint16).

    Raises OutOfMemoryError before anything is allocated when they do not fit.
    """

    def __init__(self, dev: Device, plan: Plan) -> None:
        self.dev, self.plan, self.phase = dev, plan, "free"
        free, _ = dev.free_bytes()
        if plan.bytes + RESERVE > free:
            raise OutOfMemoryError(
                f"{plan.what} at batch {plan.B}, length {plan.T} in {plan.precision}",
                f"{(plan.bytes + RESERVE) / 2**30:.2f} GiB free on cuda:{dev.ordinal}", f"{free / 2**30:.2f} GiB",
                "lower --batch-size (and raise --grad-accum), or --seq-length; 'apr plan' lists the buffers")
        self.arrays: dict[str, Any] = {}
        for b in plan.buffers:
            if b.alias is None:
                self.arrays[b.name] = dev.empty(b.shape, b.dtype)
        for b in plan.buffers:
            if b.alias is not None:
                self.arrays[b.name] = self.arrays[b.alias].reshape(b.shape)
        for b in plan.buffers:
            if b.role in ZEROED and b.alias is None:
                dev.fill(self.arrays[b.name], 0)

    def __getitem__(self, name: str) -> Any:
        return self.arrays[name]

    def part(self, name: str, offset: int, shape: tuple[int, ...]) -> Any:
        """A view of a flat buffer from element `offset` on."""
        return self.arrays[name][offset:offset + math.prod(shape)].reshape(shape)

    def rows(self, name: str, shape: tuple[int, ...]) -> Any:
        """The beginning of a buffer as an array of a smaller shape: a batch may be smaller than planned."""
        return self.arrays[name].reshape(-1)[:math.prod(shape)].reshape(shape)

    def layer(self, name: str, index: int, shape: tuple[int, ...]) -> Any:
        """The same of one layer's part of a buffer whose first axis is layers, or the few that are kept, in turn."""
        whole = self.arrays[name]
        return whole[index % whole.shape[0]].reshape(-1)[:math.prod(shape)].reshape(shape)

    def poison(self) -> None:
        """Fill what a step must write before it reads with NaN (all bits set: -1 in integers)."""
        for b in self.plan.buffers:
            if b.role in ("acts", "scratch") and b.alias is None and b.name not in ("cos", "sin", "workspace"):
                self.dev.fill(self.arrays[b.name], 0xFF)

    def enter(self, phase: str) -> None:
        """Move logits_buf to its next phase. Raises ShapeError out of turn."""
        if PHASES[self.phase] != phase:
            raise ShapeError("logits_buf", f"phase {PHASES[self.phase]} after {self.phase}", phase,
                             "this is a defect of the step's order")
        self.phase = phase
