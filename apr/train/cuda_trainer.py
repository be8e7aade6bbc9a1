"""CudaTransformerTrainer: the same training on a GPU, with every buffer there from the first step to the last.

A step sends token ids, targets, their sorted order and two numbers, and reads back four, through pinned memory: the
next step may be started before they are there, so that the GPU never waits for the host (start_batch). A micro-batch's
forward and backward is one CUDA graph and the update another: the first batch of a shape runs kernel by kernel, which
loads everything that loads lazily, the second is recorded, and from then on it is launched. The first part of a step
sets the gradients and the others add to them, which are two graphs. Nothing is allocated or compiled in a step.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from apr.arena import Arena
from apr.block import Batch
from apr.buffers import STORAGE, plan
from apr.config import IGNORE, TransformerConfig, TransformerTrainConfig
from apr.data.batch import LMBatch
from apr.device import Device
from apr.errors import ShapeError
from apr.gemm import Gemm
from apr.model import Model
from apr.ops.adamw import adamw_round, adamw_update
from apr.ops.embedding import sort_ids
from apr.ops.global_norm import global_norm
from apr.params import init_params
from apr.registry import paths, variants, warmup
from apr.taps import Tap
from apr.train.base import Numbers, Trainer
from apr.train.cuda_view import CudaStepView
from apr.train.staging import Staging


class CudaTransformerTrainer(Trainer):
    """Trains a decoder on a GPU, in bf16 with float32 master weights or in float32 throughout (config.precision).

    `device`: a Device, or None for the first GPU. `graphs` False launches every kernel by itself; `poison` fills every
    buffer with NaN before a pass that must write it first. `chosen`: the algorithms of matrix products that a
    checkpoint recorded. `random`: the weights are those of new, else zeros until they are loaded. Raises
    UnavailableError without a usable GPU, OutOfMemoryError when the plan does not fit, ConfigError and UnavailableError
    for a model that the kernels do not cover.
    """

    ahead, copies, step_seconds = 1, True, 600.0

    def __init__(self, model: TransformerConfig, config: TransformerTrainConfig, device: Device | None = None, *,
                 graphs: bool = True, poison: bool = False, chosen: Mapping[str, Any] | None = None,
                 random: bool = False) -> None:
        super().__init__(model, config)
        self.storage = STORAGE[config.precision]
        self.dev = device or Device()
        needed = variants(model, self.storage, self.dev.fast)  # what they do not cover is refused before any allocation
        self.path = paths(model, self.storage, self.dev.fast)
        self.arena = Arena(self.dev, plan(model, config.batch_size, config.max_seq_len, config.precision))
        with ThreadPoolExecutor(1) as pool:  # the host makes weights while the compiler makes kernels
            flat = pool.submit(self._random_weights) if random else None
            warmup(self.dev.cache, needed)
        self.gemm = Gemm(self.dev, self.arena["workspace"], chosen)
        self.net = Model(self.dev, self.gemm, self.arena, model)
        self.staging = Staging(self.dev, self.arena, 1 + self.ahead, config.accumulation_steps)
        self.graphs, self.poison = graphs, poison
        self._seen: dict[tuple[Any, ...], Any] = {}  # a shape's graph, or None after its first run
        self._rows = 0  # of the part that was loaded last
        if flat is not None:
            self._load_flat(flat.result())

    @classmethod
    def new(cls, model: TransformerConfig, config: TransformerTrainConfig, device: Device | None = None,
            **options: Any) -> "CudaTransformerTrainer":
        """A trainer with random weights, a pure function of config.seed: the CPU trainer's."""
        return cls(model, config, device, random=True, **options)

    @classmethod
    def with_model(cls, model: TransformerConfig, arrays: dict[str, np.ndarray], config: TransformerTrainConfig,
                   device: Device | None = None, **options: Any) -> "CudaTransformerTrainer":
        """A trainer with given weights and fresh optimizer. Raises FormatError unless they are exactly the model's."""
        trainer = cls(model, config, device, **options)
        trainer._load_checked(arrays)
        return trainer

    @property
    def params(self) -> dict[str, np.ndarray]:
        """The master weights by name, float32, copied to the host."""
        return self.layout.views(self.dev.download(self.arena["master"]))

    @property
    def grads(self) -> dict[str, np.ndarray]:
        """The last step's gradients by name, float32, copied to the host."""
        return self.layout.views(self.dev.download(self.arena["grads"]))

    def load_params(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace every parameter by the array of its name."""
        flat = np.zeros(self.layout.size, np.float32)
        for name, view in self.layout.views(flat).items():
            view[...] = arrays[name]
        self._load_flat(flat)

    def _random_weights(self) -> np.ndarray:
        flat = np.zeros(self.layout.size, np.float32)
        init_params(self.model, self.config.seed, self.layout.views(flat))
        return flat

    def _load_flat(self, flat: np.ndarray) -> None:
        self.dev.upload(self.arena["master"], flat)
        if self.storage == "bf16":
            adamw_round(self.dev, self.arena["params"], self.arena["master"])
        self.dev.synchronize()

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """m and v by name (`m.<param>`, `v.<param>`), copied to the host."""
        return {f"{kind}.{name}": view for kind in "mv"
                for name, view in self.layout.views(self.dev.download(self.arena[kind])).items()}

    def load_optimizer(self, arrays: Mapping[str, np.ndarray], step: int) -> None:
        """Go on from an optimizer state as optimizer_state gives it, after `step` updates."""
        self.finish()
        for kind in "mv":
            flat = np.zeros(self.layout.size, np.float32)
            for name, view in self.layout.views(flat).items():
                view[...] = arrays[f"{kind}.{name}"]
            self.dev.upload(self.arena[kind], flat)
        self.dev.upload(self.arena["stats"], np.array([0, 0, 0, step], np.float64))
        self.dev.synchronize()
        self.step = step

    def view(self) -> CudaStepView:
        """What the last step left in the buffers."""
        return CudaStepView(self.dev, self.arena, self.net, self._fitting)

    def doing(self) -> str:
        """The kernels and graphs that were launched last, newest last."""
        return f"; launched last: {', '.join(self.dev.recent)}" if self.dev.recent else ""

    def record(self) -> dict[str, Any]:
        """The algorithms of the matrix products, what they are of, and the paths of ops that have several."""
        return {"gemm": self.gemm.record(), "path": self.path}

    def _step(self, micro: Sequence[LMBatch], dloss: float, lr: float) -> Callable[[], Numbers]:
        first: np.ndarray | None = np.array([dloss, lr])
        for part in [part for batch in micro for part in self._fitting(batch)]:
            self._pass("train", part, self._train_pass, first)
            first = None
        self._run(("update",), self._update)
        read = self.staging.fetch()

        def numbers() -> Numbers:
            total, norm, applied, _ = read()
            return float(total), float(norm), bool(applied)

        return numbers

    def _train_pass(self, b: Batch) -> None:
        if not b.add:
            self.dev.fill(self.arena["stats"][:1], 0)
        self.net.forward(b)
        self.net.losses_and_gradients(b)

    def _eval_pass(self, b: Batch) -> None:
        self.net.forward(b)
        self.net.losses(b)

    def _update(self) -> None:
        a, c = self.arena, self.config
        global_norm(self.dev, a["stats"][1:2], a["norm_partial"], a["grads"], self.storage)
        adamw_update(self.dev, a["master"], a["m"], a["v"], a["params"] if self.storage == "bf16" else None, a["grads"],
                     a["factors"], a["stats"], a["step"], self.layout.decay_end, c, self.storage)

    def _loss_sum(self, batches: Sequence[LMBatch]) -> float:
        self.dev.fill(self.arena["stats"][:1], 0)
        for batch in batches:
            for part in self._fitting(batch):
                self._pass("eval", part, self._eval_pass)
        return float(self.dev.download(self.arena["stats"])[0])

    def forward_logits(self, ids: np.ndarray, tap: Tap | None = None) -> np.ndarray:
        """Scores (B, T, V) float32 of every position for ids (B, T) int; T at most max_seq_len. `tap` sees the passes.
        """
        out = []
        for part in self._fitting(LMBatch(ids, np.full(ids.shape, IGNORE, np.int32))):
            b = self._load(part, tap)
            self.net.forward(b)
            out.append(self.net.logits(b))
            if tap is not None:
                tap("logits", out[-1])
        return np.concatenate(out)

    def gradients(self, batch: LMBatch, dloss: float, tap: Tap | None = None) -> float:
        """The parts that are planned for, in turn; see Trainer.gradients."""
        for index, part in enumerate(self._fitting(batch)):
            self._train_pass(self._load(part, tap, None if index else np.array([dloss, 0.0])))
        return float(self.dev.download(self.arena["stats"])[0])

    def last_losses(self) -> np.ndarray:
        """The loss of every row (N,) float32, in nats, of the part that was trained or evaluated last. For comparisons.
        """
        return self.dev.download(self.arena.rows("losses", (self._rows,)))

    def _fitting(self, batch: LMBatch) -> list[LMBatch]:
        """The batch in parts of at most the planned sequences. Raises ShapeError for longer ones, or bad ids."""
        p, v = self.arena.plan, self.model.V
        if not 1 <= batch.seq_len <= p.T:
            raise ShapeError("batch", f"sequences of 1 to {p.T} tokens, as planned", str(batch.seq_len),
                             "make the trainer with a larger max_seq_len")
        for name, ids, ignored in (("inputs", batch.inputs, None), ("targets", batch.targets, IGNORE)):
            bad = (ids < 0) | (ids >= v)
            if ignored is not None:
                bad &= ids != ignored
            if bool(bad.any()):
                raise ShapeError(f"batch {name}", f"token ids in [0, {v})", str(int(ids[bad][0])), "check the data")
        return [LMBatch(batch.inputs[i:i + p.B], batch.targets[i:i + p.B]) for i in range(0, batch.batch_size, p.B)]

    def _load(self, part: LMBatch, tap: Tap | None = None, first: np.ndarray | None = None) -> Batch:
        """The batch on the GPU; dloss and lr with a step's first part, which sets the gradients."""
        b = self.net.batch(part.batch_size, part.seq_len, tap, add=first is None)
        self._rows = b.N
        ids, targets = (np.asarray(a, np.int32).reshape(-1) for a in (part.inputs, part.targets))
        order, runs = sort_ids(ids)
        self.staging.send({"ids": ids, "targets": targets, "order": order, "runs": runs,
                           **({} if first is None else {"step": first})})
        if self.poison:
            self.arena.poison()
        return b

    def _pass(self, kind: str, part: LMBatch, work: Callable[[Batch], None], first: np.ndarray | None = None) -> None:
        b = self._load(part, first=first)
        self._run((kind, b.B, b.T, b.add), lambda: work(b))

    def _run(self, key: tuple[Any, ...], work: Callable[[], None]) -> None:
        """Kernel by kernel the first time, recorded the second, launched as a graph from then on."""
        if not self.graphs or key not in self._seen:
            self._seen.setdefault(key, None)
            work()
            return
        if self._seen[key] is None:
            recorded: list[Any] = []
            with self.dev.capture(recorded):
                work()
            self._seen[key] = recorded[0]
        self.dev.replay(self._seen[key], f"graph of {' '.join(map(str, key))}")

