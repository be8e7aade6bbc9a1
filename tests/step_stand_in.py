"""A GPU trainer for machines without one: NumPy's steps, each leaving what a step leaves on a GPU, and faults in it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from apr.config import TransformerConfig
from apr.data.batch import LMBatch
from apr.dtypes import BY_NAME
from apr.params import EMBED, NORM
from apr.reference.block import block_forward
from apr.reference.cross_entropy import cross_entropy_forward_backward
from apr.reference.model import head_name, loss_and_gradients
from apr.reference.rmsnorm import rmsnorm_forward
from apr.reference.rope import rope_tables
from apr.taps import Recorder, tap_name
from apr.train.trainer import TransformerTrainer

BF16 = BY_NAME["BF16"].numpy
UNITS = re.compile("gate_proj|up_proj")


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
        """One part's sum of losses; gradients are added, and `left` is what it leaves, rounded where a GPU rounds."""
        c, recorder, flat = self.model, Recorder(), part.inputs.size
        params = self.fault.params({n: self.as_stored(p).astype(np.float32) for n, p in self.params.items()})
        config, earlier = self.fault.config(c), {n: self.grads[n].copy() for n in self.grads if UNITS.search(n)}
        loss_and_gradients(params, self.grads, config, part.inputs, part.targets, dloss, recorder)
        seen = {name: a.reshape(flat, -1) for name, a in recorder.arrays().items()}
        dunits = [np.concatenate([seen[tap_name(s, i, True)] for s in ("ffn_gate", "ffn_up")], 1) for i in range(c.L)]
        self.left = self._forward(params, config, part)
        self.left["gate_up"] = self.as_stored(np.stack(dunits))
        for layer in range(c.L):
            norm = self._rounded(rmsnorm_forward(
                self.left["residual"][2 * layer + 1].astype(np.float32),
                params[f"model.layers.{layer}.post_attention_layernorm.weight"], config.rms_norm_eps)[0])
            both = self.left["gate_up"][layer].astype(np.float32).T @ norm
            for name, grad in zip(("gate", "up"), np.split(both, 2), strict=True):
                key = f"model.layers.{layer}.mlp.{name}_proj.weight"
                self.grads[key][...] = earlier[key] + grad
        total = float(self.left["losses"].sum(dtype=np.float64))
        self.fault.left(self.left)
        self.fault.grads(self.grads)
        return total

    def _rounded(self, array: np.ndarray) -> np.ndarray:
        return self.as_stored(array).astype(np.float32)

    def _forward(self, params: dict[str, np.ndarray], c: TransformerConfig, part: LMBatch) -> dict[str, np.ndarray]:
        """Layer after layer, each from the rounded stream of the one before."""
        rounded, shape, n = self._rounded, (*part.inputs.shape, c.C), part.inputs.size
        tables = rope_tables(np.arange(part.seq_len), c.HS, c.rope_theta, c.rope_scaling, np.dtype(np.float32))
        streams, qkv, atty = [rounded(params[EMBED][part.inputs]).reshape(n, c.C)], [], []
        for layer in range(c.L):
            seen: dict[str, np.ndarray] = {}
            block_forward(params, c, layer, streams[-1].reshape(shape), tables, None,
                          lambda stage, array, seen=seen: seen.update({stage: np.array(array).reshape(n, -1)}))
            qkv.append(np.concatenate([seen[s] for s in ("q_rope", "k_rope", "v_bias")], 1))
            atty.append(seen["attn_heads"])
            for branch in ("attn_out", "ffn_out"):
                streams.append(rounded(streams[-1] + rounded(seen[branch])))
        final = rounded(rmsnorm_forward(streams[-1], params[NORM], c.rms_norm_eps)[0])
        losses = cross_entropy_forward_backward(rounded(final @ params[head_name(c)].T), part.targets.reshape(-1), None)
        left = {"residual": np.stack(streams), "qkv": np.stack(qkv), "atty": np.stack(atty), "final_norm": final}
        return {name: self.as_stored(a) for name, a in left.items()} | {"losses": losses}

    def _update(self, lr: float, norm: float) -> None:
        super()._update(*self.fault.update(self, lr, norm))
