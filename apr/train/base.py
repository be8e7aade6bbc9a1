"""What the NumPy trainer and the GPU trainer have in common: names, hashes, saving; and what a step reports."""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import TransformerConfig, TransformerTrainConfig, require
from apr.data.batch import LMBatch
from apr.data.tokenizer import Tokenizer
from apr.errors import ShapeError
from apr.formats.model_file import check_coverage, save_model
from apr.params import layout
from apr.taps import Tap
from apr.train.schedule import lr_at
from apr.train.snapshot import Snapshot, sha256_of
from apr.train.step_view import StepView


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


Numbers = tuple[float, float, bool]  # of a step: the sum of losses, the gradient norm, whether it was applied


class StartedStep:
    """A step that was started. `stats` is None until it is finished, which `wait` brings nearer."""

    def __init__(self, wait: Callable[[], object] = lambda: None, stats: StepStats | None = None) -> None:
        self.wait, self.stats = wait, stats

    def result(self) -> StepStats:
        """What the step did; waits for it, and for those started before it. Raises DeviceFault."""
        while self.stats is None:
            self.wait()
        return self.stats


class Trainer(ABC):
    """A trainer of a decoder. Arrays go by their Hugging Face names.

    `step` counts the updates applied and `last_stats` is of the last step, as far as steps are finished: up to `ahead`
    of them may be under way when another is started. Raises ConfigError when the sequence is longer than the model's
    positions.
    """

    ahead = 0
    copies = False  # whether `snapshot` gives copies, which no later step changes
    step_seconds = 0.0  # that a step may take before it counts as hung, unless a run says otherwise; 0: any time

    def __init__(self, model: TransformerConfig, config: TransformerTrainConfig) -> None:
        require("max_seq_len", config.max_seq_len, f"at most max_position_embeddings ({model.max_position_embeddings})",
                config.max_seq_len <= model.max_position_embeddings)
        self.model, self.config, self.layout = model, config, layout(model)
        self.step = 0
        self.last_stats: StepStats | None = None
        self.path: dict[str, str] = {}  # of each op with a fast path, which one is taken (registry.paths)
        self._under_way: deque[tuple[StartedStep, Callable[[], StepStats]]] = deque()

    def train_batch(self, batch: LMBatch | Sequence[LMBatch], lr: float | None = None) -> float:
        """One optimizer step on a batch, or on several micro-batches; returns the mean loss in nats per token.

        `lr` None means the schedule's at `step`. With no counted target, or a loss or norm that is not finite, nothing
        is applied; `last_stats` says so and the loss is returned as it is (NaN for no target).
        """
        return self.start_batch(batch, lr).result().loss

    def start_batch(self, batch: LMBatch | Sequence[LMBatch], lr: float | None = None) -> StartedStep:
        """Start the step that train_batch makes; a GPU goes on with it while the host prepares the next.

        An `lr` of None waits for the steps under way, which decide `step`. Raises ShapeError before anything is sent.
        """
        micro = [batch] if isinstance(batch, LMBatch) else list(batch)
        tokens = sum(b.num_tokens for b in micro)
        self.finish(keep=0 if lr is None or tokens == 0 else self.ahead)
        applied_lr = lr_at(self.config, self.step) if lr is None else lr
        started = StartedStep(lambda: self.finish(keep=len(self._under_way) - 1))
        if tokens == 0:
            self.last_stats = started.stats = StepStats(math.nan, 0.0, applied_lr, 0, False)
            return started
        numbers = self._step(micro, 1.0 / tokens, applied_lr)

        def finished() -> StepStats:
            total, norm, applied = numbers()
            self.step += applied
            return StepStats(total / tokens, norm, applied_lr, tokens, applied)

        self._under_way.append((started, finished))
        if not self.ahead:
            self.finish()
        return started

    def finish(self, keep: int = 0) -> None:
        """Wait for the steps under way, from the first on, until `keep` of them are left. Raises DeviceFault."""
        while len(self._under_way) > keep:
            started, finished = self._under_way[0]
            self.last_stats = started.stats = finished()
            self._under_way.popleft()

    @abstractmethod
    def _step(self, micro: Sequence[LMBatch], dloss: float, lr: float) -> Callable[[], Numbers]:
        """Gradients of dloss times the sum of the losses, and the update if loss and norm are finite.

        Returns what waits for the sum of losses, the gradient norm and whether the update was applied.
        """

    def eval_batch(self, batch: LMBatch) -> float:
        """Mean loss in nats per counted target; changes nothing, reads nothing that training left."""
        return self.eval_batches([batch])

    def eval_batches(self, batches: Sequence[LMBatch]) -> float:
        """Mean loss over all counted targets of several batches, no mean of means. Raises ShapeError if none."""
        tokens = sum(b.num_tokens for b in batches)
        if tokens == 0:
            raise ShapeError("eval_batches", "at least one counted target", "none", "give other data")
        return self._loss_sum(batches) / tokens

    @abstractmethod
    def _loss_sum(self, batches: Sequence[LMBatch]) -> float:
        """The sum of the losses of all batches, in nats."""

    @abstractmethod
    def gradients(self, batch: LMBatch, dloss: float, tap: Tap | None = None) -> float:
        """The sum of the losses in nats; `grads` is the gradient of dloss times it, and nothing is updated.

        For comparisons: `tap` sees every point of the forward and the backward pass.
        """

    @abstractmethod
    def forward_logits(self, ids: np.ndarray) -> np.ndarray:
        """Scores (B, T, V) float32 of every position for ids (B, T) int."""

    @property
    @abstractmethod
    def params(self) -> dict[str, np.ndarray]:
        """The parameters, float32, on the host: views of the CPU trainer's own, copies of a GPU's."""

    @abstractmethod
    def load_params(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace every parameter by the array of its name."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, np.ndarray]:
        """m and v by name (`m.<param>`, `v.<param>`), float32, on the host."""

    @abstractmethod
    def load_optimizer(self, arrays: Mapping[str, np.ndarray], step: int) -> None:
        """Go on from an optimizer state as optimizer_state gives it, after `step` updates."""

    @property
    def last_grad_norm(self) -> float:
        """L2 norm of the last step's whole gradient, before clipping. Raises ShapeError before the first step."""
        self.finish()
        if self.last_stats is None:
            raise ShapeError("last_grad_norm", "a step", "none yet", "call train_batch first")
        return self.last_stats.grad_norm

    def view(self) -> StepView | None:
        """What the last step left in the buffers; None where it is not kept, as on the CPU."""
        return None

    def doing(self) -> str:
        """What the device was given last, for the message of a step that does not end; nothing on the CPU."""
        return ""

    def record(self) -> dict[str, Any]:
        """What besides weights and optimizer decides the bits of the steps to come; checkpoints keep it."""
        return {}

    def optimizer_state_sha256(self) -> str:
        """SHA-256 of the step count, then every m, then every v, in the order and with the names of the layout."""
        self.finish()
        return sha256_of(self.optimizer_state(), self.step)

    def parameters_sha256(self) -> str:
        """SHA-256 of every parameter, in the order and with the names of the layout."""
        return sha256_of(self.params)

    def snapshot(self) -> Snapshot:
        """Parameters and optimizer state, each fetched once."""
        self.finish()
        return Snapshot(self.step, self.params, self.optimizer_state())

    def save_apr(self, path: Path) -> None:
        """The model as an .apr file. Raises StorageError."""
        save_model(path, self.model, self.params, f"{self.model.hf_model_type}-pretrain")

    def save_apr_with_tokenizer(self, path: Path, tokenizer: Tokenizer) -> None:
        """The model and its tokenizer as an .apr file. Raises StorageError."""
        save_model(path, self.model, self.params, f"{self.model.hf_model_type}-pretrain", tokenizer.json,
                   tokenizer.eos_id)

    def _load_checked(self, arrays: Mapping[str, np.ndarray]) -> None:
        """load_params of weights from outside. Raises FormatError unless they are exactly the model's."""
        self.load_params(check_coverage(self.model, dict(arrays), "weights"))
