"""What bisect asks of a model on a GPU, answered by the engine that generates and by the trainer."""

from collections.abc import Iterator

import numpy as np

from apr.block import to_host
from apr.config import Sampling, TransformerConfig, TransformerTrainConfig
from apr.data.batch import LMBatch
from apr.device import Device
from apr.formats.source import ModelSource
from apr.infer.cpu_engine import load_params
from apr.infer.cuda_engine import CudaEngine
from apr.model import Model
from apr.params import ParamSpec
from apr.taps import Tap, tap_name
from apr.tools.bisect import ROWS, TOKENS
from apr.tools.weights import TensorFault, byte_faults
from apr.train.cuda_trainer import CudaTransformerTrainer


class _OnGpu:
    """A model whose parameters can be read back. Its kernel cache is thawed: a kernel that is new because of a fault,
    as of another eps, shall run, so that its stage can be named.
    """

    net: Model

    def _thaw(self) -> None:
        self.net.dev.cache.frozen = False

    def byte_faults(self, source: ModelSource) -> Iterator[tuple[str, TensorFault | None]]:
        """As weights.byte_faults."""
        return byte_faults(self.net, source)

    def stored(self, spec: ParamSpec) -> np.ndarray:
        """A parameter as the kernels read it."""
        return self.net.stored(spec)


class EngineSubject(_OnGpu):
    """bisect.Generating: `apr run`'s engine, its start gate left out."""

    def __init__(self, engine: CudaEngine) -> None:
        self.engine, self.net, self.precision, self.S = engine, engine.net, engine.precision, engine.S
        self._thaw()

    def record(self, ids: list[int], cached: int, tap: Tap | None) -> dict[str, np.ndarray]:
        """See bisect.Generating."""
        e, kept = self.engine, {}
        e.scores([ids], [cached], tap)
        for layer in range(e.config.L):
            for kind in "kv":
                cache = to_host(e.dev, e.arena[f"{kind}_cache"][layer, 0])[:, :len(ids)]
                kept[tap_name(f"{kind}_cache", layer)] = np.ascontiguousarray(cache.transpose(1, 0, 2))[None]
        return kept

    def generate(self, ids: list[int], count: int) -> list[int]:
        """See bisect.Generating."""
        return [int(step[0]) for step in self.engine.generate([ids], Sampling(self.engine.config.V), count)]


class TrainerSubject(_OnGpu):
    """bisect.Training: the GPU trainer, every buffer NaN before a pass, so that what was not written is not read."""

    def __init__(self, source: ModelSource, device: Device, precision: str) -> None:
        c: TransformerConfig = source.config
        self.precision = precision
        self.config = TransformerTrainConfig(batch_size=ROWS, max_seq_len=min(TOKENS, c.max_position_embeddings),
                                             precision=precision, max_grad_norm=0.1, weight_decay=0.1, lr=1e-2,
                                             max_steps=10)
        self.trainer = CudaTransformerTrainer.with_model(c, load_params(source), self.config, device, graphs=False,
                                                         poison=True)
        self.net = self.trainer.net
        self._thaw()

    def gradients(self, batch: LMBatch, dloss: float, tap: Tap) -> np.ndarray:
        """See bisect.Training."""
        self.trainer.gradients(batch, dloss, tap)
        return self.trainer.last_losses()

    def evaluate(self, batch: LMBatch) -> tuple[np.ndarray, float]:
        """See bisect.Training."""
        total = self.trainer.eval_batch(batch) * batch.num_tokens
        return self.trainer.last_losses(), total

    def scores(self, ids: np.ndarray) -> np.ndarray:
        """See bisect.Training."""
        return self.trainer.forward_logits(ids)

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """See bisect.Training."""
        moments = self.trainer.optimizer_state()
        return {"master": self.trainer.params,
                **{kind: {name[2:]: a for name, a in moments.items() if name.startswith(f"{kind}.")} for kind in "mv"}}

    def grads(self) -> dict[str, np.ndarray]:
        """See bisect.Training."""
        return self.trainer.grads

    def update(self, batch: LMBatch, lr: float) -> tuple[float, int]:
        """See bisect.Training."""
        self.trainer.train_batch(batch, lr)
        return self.trainer.last_grad_norm, self.trainer.step
