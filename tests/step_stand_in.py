"""A GPU trainer for machines without one: NumPy's steps, each leaving what a step leaves on a GPU, and faults in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from apr.config import TransformerConfig
from apr.data.batch import LMBatch
from apr.dtypes import BY_NAME
from apr.reference.cross_entropy import cross_entropy_forward_backward
from apr.reference.model import head_name, loss_and_gradients
from apr.taps import Recorder, tap_name
from apr.train.trainer import TransformerTrainer

BF16 = BY_NAME["BF16"].numpy


@dataclass
class Fault:
    """What is wrong with a step: each function changes what it is given, or returns another."""

    config: Callable[[TransformerConfig], TransformerConfig] = lambda c: c  # that the layers compute with
    params: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda p: p  # the same, float32
    left: Callable[[dict[str, np.ndarray]], None] = lambda left: None  # what is stored of the activations
    grads: Callable[[dict[str, np.ndarray]], None] = lambda grads: None
    update: Callable[["StandIn", float, float], tuple[float, float]] = lambda trainer, lr, norm: (lr, norm)
    after: Callable[["StandIn"], None] = lambda trainer: None  # the update


class StandIn(TransformerTrainer):
    """TransformerTrainer with a view. `precision` bf16 rounds what a GPU would store so; `parts` cuts batches."""

    def __init__(self, model, config) -> None:
        super().__init__(model, replace(config, precision="fp32"))
        self.precision, self.part_rows, self.fault = config.precision, 1 << 30, Fault()
        self.left: dict[str, np.ndarray] = {}

    def as_stored(self, array: np.ndarray) -> np.ndarray:
        """What a GPU keeps as floatX."""
        return array.astype(BF16) if self.precision == "bf16" else np.array(array, np.float32)

    def view(self) -> Any:
        """The trainer is its own view."""
        return self

    def parts(self, micro: Sequence[LMBatch]) -> list[LMBatch]:
        """As a GPU's plan would cut them."""
        n = self.part_rows
        return [LMBatch(b.inputs[i:i + n], b.targets[i:i + n]) for b in micro for i in range(0, b.batch_size, n)]

    def stored(self, spec) -> np.ndarray:
        """A parameter as kernels would read it."""
        return self.as_stored(self.params[spec.name])

    def rows(self, name: str, layer: int | None, start: int, stop: int) -> np.ndarray:
        """Of what the last step left."""
        return np.array((self.left[name] if layer is None else self.left[name][layer])[start:stop])

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Of the flat memory."""
        if name == "params":
            return self.as_stored(self.left.get("copy", self.params_buf)[start:stop])
        return np.array({"master": self.params_buf, "grads": self.grads_buf, "m": self.m_buf, "v": self.v_buf}
                        [name][start:stop])

    def _step(self, micro, dloss, lr):
        self.left = {}
        result = super()._step(micro, dloss, lr)
        self.fault.after(self)
        return result

    def _gradients(self, batch: LMBatch, dloss: float) -> float:
        return sum(self._part(part, dloss) for part in self.parts([batch]))

    def _part(self, part: LMBatch, dloss: float) -> float:
        recorder, c = Recorder(), self.model
        params = self.fault.params({n: self.as_stored(p).astype(np.float32) for n, p in self.params.items()})
        loss_and_gradients(params, self.grads, self.fault.config(c), part.inputs, part.targets, dloss, recorder)
        seen = {name: a.reshape(part.inputs.size, -1) for name, a in recorder.arrays().items()}

        def layers(*stages: str, grad: bool = False) -> np.ndarray:
            return np.stack([np.concatenate([seen[tap_name(s, i, grad)] for s in stages], 1) for i in range(c.L)])

        middle, out = layers("attn_residual"), layers("output")
        streams = [seen["embedding"], *(a for i in range(c.L) for a in (middle[i], out[i]))]
        self.left = {name: self.as_stored(a) for name, a in (
            ("residual", np.stack(streams)), ("qkv", layers("q_rope", "k_rope", "v_bias")),
            ("atty", layers("attn_heads")), ("gate_up", layers("ffn_gate", "ffn_up", grad=True)),
            ("final_norm", seen["final_norm"]))}
        scores = self.as_stored(self.left["final_norm"].astype(np.float32) @ params[head_name(c)].T).astype(np.float32)
        self.left["losses"] = cross_entropy_forward_backward(scores, part.targets.reshape(-1), None)
        total = float(self.left["losses"].sum(dtype=np.float64))
        self.fault.left(self.left)
        self.fault.grads(self.grads)
        return total

    def _update(self, lr: float, norm: float) -> None:
        super()._update(*self.fault.update(self, lr, norm))
