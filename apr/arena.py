"""The arena: every buffer of a plan, allocated once; the names, shapes and dtypes are the plan's.

Each buffer that is no alias is an allocation of its own, so that a memory checker sees the end of it. `logits_buf` has
phases, free -> logits -> dlogits -> free, and a step that reads it in the wrong one is refused: upstream's evaluation
read what training had left in it. What lies in its memory may only be asked for while it is free.
"""

import math
from typing import Any

from apr.buffers import Plan
from apr.device import Device
from apr.errors import OutOfMemoryError, ShapeError

PHASES = {"free": "logits", "logits": "dlogits", "dlogits": "free"}
ZEROED = ("master", "params", "grads", "optimizer", "inputs", "state", "kv")  # the others are written before read
REMEDIES = {
    "training": "lower --batch-size (and raise --grad-accum), or --seq-length; 'apr plan' lists the buffers",
    "generation": "lower --batch-size, --context or --max-tokens, or take --precision bf16 or --device cpu"}
VIEWS = 1 << 14  # views remembered at a time
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
                REMEDIES[plan.what])
        self.arrays: dict[str, Any] = {}
        self.views: dict[tuple[str, int | None, tuple[int, ...]], Any] = {}
        for b in plan.buffers:
            if b.alias is None:
                self.arrays[b.name] = dev.empty(b.shape, b.dtype)
        for b in plan.buffers:
            if b.alias is not None:
                self.arrays[b.name] = self.arrays[b.alias].reshape(-1)[b.offset:b.offset + b.size].reshape(b.shape)
        self.beside_logits = frozenset(b.name for b in plan.buffers if b.alias == "logits_buf")
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
        return self._view(name, None, shape)

    def layer(self, name: str, index: int, shape: tuple[int, ...]) -> Any:
        """The same of one layer's part of a buffer whose first axis is layers, or the few that are kept, in turn."""
        return self._view(name, index % self.arrays[name].shape[0], shape)

    def _view(self, name: str, index: int | None, shape: tuple[int, ...]) -> Any:
        """Views are remembered: CuPy takes 10 microseconds to make one, and a pass needs hundreds."""
        if self.phase != "free" and name in self.beside_logits:
            raise ShapeError(name, "to be asked for while logits_buf is free", f"phase {self.phase}",
                             "this is a defect of the step's order")
        view = self.views.get((name, index, shape))
        if view is None:
            if len(self.views) >= VIEWS:  # a server sees prompts of every length
                self.views.clear()
            whole = self.arrays[name] if index is None else self.arrays[name][index]
            view = self.views[name, index, shape] = whole.reshape(-1)[:math.prod(shape)].reshape(shape)
        return view

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
