"""TransformerTrainer: the NumPy trainer, the truth that the GPU trainer is held against.

Parameters, gradients and AdamW's m and v are four flat float32 arrays with named views. A step is one or more
micro-batches; its loss is the mean over all their counted targets, so accumulation changes memory and not the result.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from apr.config import TransformerConfig, TransformerTrainConfig
from apr.data.batch import LMBatch
from apr.errors import UnavailableError
from apr.params import init_params
from apr.reference.adamw import adamw_update
from apr.reference.global_norm import clip_factor, global_norm
from apr.reference.model import loss_and_gradients, loss_sum, model_forward
from apr.taps import Tap
from apr.train.base import Numbers, Trainer
from apr.train.slices import SliceRunner, add_in_order, cut, ranges


class TransformerTrainer(Trainer):
    """Trains a decoder with NumPy on the CPU, in float32. `grads` are views by name, like `params`.

    Raises UnavailableError for a precision other than fp32.
    """

    def __init__(self, model: TransformerConfig, config: TransformerTrainConfig) -> None:
        super().__init__(model, config)
        if config.precision != "fp32":
            raise UnavailableError("precision", "fp32 on the CPU", config.precision, "use --precision fp32")
        self.params_buf, self.grads_buf, self.m_buf, self.v_buf = (
            np.zeros(self.layout.size, np.float32) for _ in range(4))
        self._params, self.grads = self.layout.views(self.params_buf), self.layout.views(self.grads_buf)
        self.runner, self._slice_bufs = SliceRunner(), list[np.ndarray]()

    @classmethod
    def new(cls, model: TransformerConfig, config: TransformerTrainConfig) -> "TransformerTrainer":
        """A trainer with random weights, a pure function of config.seed."""
        trainer = cls(model, config)
        init_params(model, config.seed, trainer.params)
        return trainer

    @classmethod
    def with_model(cls, model: TransformerConfig, arrays: dict[str, np.ndarray],
                   config: TransformerTrainConfig) -> "TransformerTrainer":
        """A trainer with given weights and fresh optimizer. Raises FormatError unless they are exactly the model's."""
        trainer = cls(model, config)
        trainer._load_checked(arrays)
        return trainer

    @property
    def params(self) -> dict[str, np.ndarray]:
        """The parameters by name, views."""
        return self._params

    def load_params(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace every parameter by the array of its name."""
        for name, view in self._params.items():
            view[...] = arrays[name]

    def _step(self, micro: Sequence[LMBatch], dloss: float, lr: float) -> Callable[[], Numbers]:
        self.grads_buf.fill(0.0)
        total = sum(self._gradients(b, dloss) for b in micro)
        norm = global_norm(self.grads_buf)
        applied = math.isfinite(total) and math.isfinite(norm)
        if applied:
            self._update(lr, norm)
        return lambda: (total, norm, applied)

    def _gradients(self, batch: LMBatch, dloss: float) -> float:
        """Sum of a micro-batch's losses; its gradient is added to grads_buf."""
        slices = cut(batch)
        while len(self._slice_bufs) < len(slices):
            self._slice_bufs.append(np.zeros(self.layout.size, np.float32))

        def run(index: int) -> float:
            buffer = self._slice_bufs[index]
            buffer.fill(0.0)
            part = slices[index]
            return loss_and_gradients(self._params, self.layout.views(buffer), self.model, part.inputs, part.targets,
                                      dloss)

        losses = self.runner.map(run, range(len(slices)))
        add_in_order(self.grads_buf, self._slice_bufs[:len(slices)], self.runner)
        return sum(losses)

    def gradients(self, batch: LMBatch, dloss: float, tap: Tap | None = None) -> float:
        """Slice by slice, as a step cuts them, in turn."""
        self.grads_buf.fill(0.0)
        return sum(loss_and_gradients(self._params, self.grads, self.model, part.inputs, part.targets, dloss, tap)
                   for part in cut(batch))

    def _update(self, lr: float, norm: float) -> None:
        c, split = self.config, self.layout.decay_end
        clip = clip_factor(norm, c.max_grad_norm)

        def update(part: slice) -> None:
            adamw_update(self.params_buf[part], self.m_buf[part], self.v_buf[part], self.grads_buf[part], lr=lr,
                         beta1=c.beta1, beta2=c.beta2, eps=c.adam_eps, step=self.step + 1, grad_scale=clip,
                         weight_decay=c.weight_decay if part.start < split else 0.0)

        self.runner.map(update, [*ranges(0, split), *ranges(split, self.layout.size)])

    def _loss_sum(self, batches: Sequence[LMBatch]) -> float:
        slices = [part for b in batches for part in cut(b)]
        return sum(self.runner.map(lambda b: loss_sum(self._params, self.model, b.inputs, b.targets), slices))

    def forward_logits(self, ids: np.ndarray) -> np.ndarray:
        """Scores (B, T, V) float32 of every position for ids (B, T) int."""
        return model_forward(self._params, self.model, ids)

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """m and v by name (`m.<param>`, `v.<param>`), views."""
        return {f"{kind}.{name}": view for kind, flat in (("m", self.m_buf), ("v", self.v_buf))
                for name, view in self.layout.views(flat).items()}

    def load_optimizer(self, arrays: Mapping[str, np.ndarray], step: int) -> None:
        """Go on from an optimizer state as optimizer_state gives it, after `step` updates."""
        for name, view in self.optimizer_state().items():
            view[...] = arrays[name]
        self.step = step
