"""TransformerTrainer: the NumPy trainer, the truth that the GPU trainer is held against.

Parameters, gradients and AdamW's m and v are four flat float32 arrays with named views. A step is one or more
micro-batches; its loss is the mean over all their counted targets, so accumulation changes memory and not the result.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apr.config import TransformerConfig, TransformerTrainConfig, require
from apr.data.batch import LMBatch
from apr.data.tokenizer import Tokenizer
from apr.errors import ShapeError, UnavailableError
from apr.formats.model_file import check_coverage, save_model
from apr.params import init_params, layout
from apr.reference.adamw import adamw_update
from apr.reference.global_norm import clip_factor, global_norm
from apr.reference.model import loss_and_gradients, loss_sum, model_forward
from apr.train.schedule import lr_at
from apr.train.slices import SliceRunner, add_in_order, cut, ranges


@dataclass(frozen=True)
class StepStats:
    """What a step did: mean loss in nats per token, gradient norm before clipping, the learning rate that was applied,
    the targets that counted, and whether the update was applied (not when loss or norm is not finite, or no target
    counts).
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    applied: bool


class TransformerTrainer:
    """Trains a decoder with NumPy on the CPU, in float32.

    `step` counts the updates applied; `params`, `grads` are views by Hugging Face name. Raises ConfigError when the
    sequence is longer than the model's positions, UnavailableError for a precision other than fp32.
    """

    def __init__(self, model: TransformerConfig, config: TransformerTrainConfig) -> None:
        require("max_seq_len", config.max_seq_len, f"at most max_position_embeddings ({model.max_position_embeddings})",
                config.max_seq_len <= model.max_position_embeddings)
        if config.precision != "fp32":
            raise UnavailableError("precision", "fp32 on the CPU", config.precision, "use --precision fp32")
        self.model, self.config, self.layout = model, config, layout(model)
        self.params_buf, self.grads_buf, self.m_buf, self.v_buf = (
            np.zeros(self.layout.size, np.float32) for _ in range(4))
        self.params, self.grads = self.layout.views(self.params_buf), self.layout.views(self.grads_buf)
        self.runner, self._slice_bufs = SliceRunner(), list[np.ndarray]()
        self.step = 0
        self.last_stats: StepStats | None = None

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
        for name, values in check_coverage(model, arrays, "weights").items():
            trainer.params[name][...] = values
        return trainer

    def train_batch(self, batch: LMBatch | Sequence[LMBatch], lr: float | None = None) -> float:
        """One optimizer step on a batch, or on several micro-batches; returns the mean loss in nats per token.

        `lr` None means the schedule's at `step`. With no counted target, or a loss or norm that is not finite, nothing
        is applied; `last_stats` says so and the loss is returned as it is (NaN for no target).
        """
        micro = [batch] if isinstance(batch, LMBatch) else list(batch)
        tokens = sum(b.num_tokens for b in micro)
        applied_lr = lr_at(self.config, self.step) if lr is None else lr
        self.grads_buf.fill(0.0)
        total = sum(self._gradients(b, 1.0 / tokens) for b in micro) if tokens else 0.0
        loss, norm = total / tokens if tokens else math.nan, global_norm(self.grads_buf)
        applied = math.isfinite(loss) and math.isfinite(norm) and tokens > 0
        if applied:
            self._update(applied_lr, norm)
        self.last_stats = StepStats(loss, norm, applied_lr, tokens, applied)
        return loss

    def _gradients(self, batch: LMBatch, dloss: float) -> float:
        """Sum of a micro-batch's losses; its gradient is added to grads_buf."""
        slices = cut(batch)
        while len(self._slice_bufs) < len(slices):
            self._slice_bufs.append(np.zeros(self.layout.size, np.float32))

        def run(index: int) -> float:
            buffer = self._slice_bufs[index]
            buffer.fill(0.0)
            part = slices[index]
            return loss_and_gradients(self.params, self.layout.views(buffer), self.model, part.inputs, part.targets,
                                      dloss)

        losses = self.runner.map(run, range(len(slices)))
        add_in_order(self.grads_buf, self._slice_bufs[:len(slices)], self.runner)
        return sum(losses)

    def _update(self, lr: float, norm: float) -> None:
        c, split = self.config, self.layout.decay_end
        self.step += 1
        clip = clip_factor(norm, c.max_grad_norm)

        def update(part: slice) -> None:
            adamw_update(self.params_buf[part], self.m_buf[part], self.v_buf[part], self.grads_buf[part], lr=lr,
                         beta1=c.beta1, beta2=c.beta2, eps=c.adam_eps, step=self.step, grad_scale=clip,
                         weight_decay=c.weight_decay if part.start < split else 0.0)

        self.runner.map(update, [*ranges(0, split), *ranges(split, self.layout.size)])

    @property
    def last_grad_norm(self) -> float:
        """L2 norm of the last step's whole gradient, before clipping. Raises ShapeError before the first step."""
        if self.last_stats is None:
            raise ShapeError("last_grad_norm", "a step", "none yet", "call train_batch first")
        return self.last_stats.grad_norm

    def eval_batch(self, batch: LMBatch) -> float:
        """Mean loss in nats per counted target; changes nothing, reads nothing that training left."""
        return self.eval_batches([batch])

    def eval_batches(self, batches: Sequence[LMBatch]) -> float:
        """Mean loss over all counted targets of several batches, no mean of means. Raises ShapeError if none."""
        tokens = sum(b.num_tokens for b in batches)
        if tokens == 0:
            raise ShapeError("eval_batches", "at least one counted target", "none", "give other data")
        slices = [part for b in batches for part in cut(b)]
        return sum(self.runner.map(lambda b: loss_sum(self.params, self.model, b.inputs, b.targets), slices)) / tokens

    def forward_logits(self, ids: np.ndarray) -> np.ndarray:
        """Scores (B, T, V) float32 of every position for ids (B, T) int."""
        return model_forward(self.params, self.model, ids)

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """m and v by name (`m.<param>`, `v.<param>`), views."""
        return {f"{kind}.{name}": view for kind, flat in (("m", self.m_buf), ("v", self.v_buf))
                for name, view in self.layout.views(flat).items()}

    def optimizer_state_sha256(self) -> str:
        """SHA-256 of the step count, then every m, then every v, in the order and with the names of the layout."""
        return _sha256(self.optimizer_state(), self.step)

    def parameters_sha256(self) -> str:
        """SHA-256 of every parameter, in the order and with the names of the layout."""
        return _sha256(self.params, 0)

    def save_apr(self, path: Path) -> None:
        """The model as an .apr file. Raises StorageError."""
        save_model(path, self.model, self.params, f"{self.model.hf_model_type}-pretrain")

    def save_apr_with_tokenizer(self, path: Path, tokenizer: Tokenizer) -> None:
        """The model and its tokenizer as an .apr file. Raises StorageError."""
        save_model(path, self.model, self.params, f"{self.model.hf_model_type}-pretrain", tokenizer.json,
                   tokenizer.eos_id)


def _sha256(arrays: dict[str, np.ndarray], step: int) -> str:
    digest = hashlib.sha256(step.to_bytes(8, "little"))
    for name, array in arrays.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
