"""Trace: what a model computes at every point of apr/taps.py for one prompt, on the CPU or a GPU, forward and backward.

Every device and file format goes through the same enumeration, a point is always of all tokens, and a pass that shows
other points than the enumeration is refused: numbers of two places are never laid side by side.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from apr.config import IGNORE, TransformerConfig, TransformerTrainConfig
from apr.data.batch import LMBatch
from apr.device import Device
from apr.errors import ConfigError, MeasureError, ShapeError, UnavailableError
from apr.formats.source import ModelSource
from apr.infer.cpu_engine import load_params
from apr.infer.cuda_engine import CudaEngine
from apr.infer.prompt import open_prompter
from apr.params import param_specs
from apr.reference.model import loss_and_gradients, model_forward
from apr.rng import generator
from apr.tools.device import Choice
from apr.tools.trace_points import all_points, point_shape
from apr.tools.weights import Weights
from apr.train.cuda_trainer import CudaTransformerTrainer
from apr.train.snapshot import sha256_of

PROMPT = "What is 2+2?"  # upstream's
RANDOM_TOKENS = 16  # for a model without a tokenizer
LEAST_BACKWARD = 4  # tokens: with fewer, gradients of queries and keys are small differences of large numbers


@dataclass(frozen=True)
class Statistics:
    """Of an array. mean, std (of the sample, n - 1), min and max are over the finite values, in float64.

    They are None where no value is finite; std is 0 of a single one.
    """

    count: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    nan: int
    inf: int
    zeros: int


@dataclass(frozen=True)
class Trace:
    """What was computed: by whom, from what, and the statistics of each point in the order of computation.

    `arrays` are the points that were kept, float32, (1, T, …); `stored` the types of the file's tensors; `loss` the
    mean over the tokens that have a successor, nats, None without a backward pass; `weights_sha256` as
    Trainer.parameters_sha256, None where nobody asked.
    """

    model: str
    stored: tuple[str, ...]
    config: TransformerConfig
    device: str
    precision: str
    tokens: tuple[int, ...]
    loss: float | None
    weights_sha256: str | None
    statistics: Mapping[str, Statistics]
    arrays: Mapping[str, np.ndarray]


def statistics(array: np.ndarray) -> Statistics:
    """The statistics of an array of any shape."""
    finite = array[np.isfinite(array)].astype(np.float64)
    nan, n = int(np.isnan(array).sum()), finite.size
    zeros = int(array.size - np.count_nonzero(array))
    if n == 0:
        return Statistics(array.size, None, None, None, None, nan, array.size - nan, zeros)
    mean = float(finite.mean())
    low, high = float(finite.min()), float(finite.max())
    finite -= mean
    std = math.sqrt(float(finite @ finite) / (n - 1)) if n > 1 else 0.0
    return Statistics(array.size, mean, std, low, high, nan, array.size - n - nan, zeros)


def prompt_tokens(source: ModelSource, text: str | None) -> tuple[list[int], str]:
    """The ids of a prompt (None: PROMPT, or random ids where the model has no tokenizer), and where they are from.

    Raises FormatError for a prompt without a tokenizer, ConfigError for one of no tokens.
    """
    if text is None and not source.has_tokenizer:
        count = min(RANDOM_TOKENS, source.config.max_position_embeddings)
        ids = generator(0, "trace", "tokens").integers(0, source.config.V, count).tolist()
        return ids, "random ids, the same in every run: the model has no tokenizer"
    ids = open_prompter(source).raw(PROMPT if text is None else text)
    if not ids:
        raise ConfigError("--prompt", "at least one token", "none", "write something")
    return ids, repr(PROMPT if text is None else text)


def check_tokens(config: TransformerConfig, tokens: Sequence[int], backward: bool) -> None:
    """Raise ConfigError unless these are ids of the model, as many as it has positions at most, enough for backward."""
    least = LEAST_BACKWARD if backward else 1
    if not least <= len(tokens) <= config.max_position_embeddings:
        raise ConfigError("tokens", f"{least} to {config.max_position_embeddings} of them"
                          + " for a backward pass" * backward, str(len(tokens)), "give another prompt")
    if bad := [t for t in tokens if not 0 <= t < config.V]:
        raise ConfigError("tokens", f"ids in [0, {config.V})", str(bad[0]), "use the model's own tokenizer")


def check_precision(choice: Choice) -> None:
    """Raise UnavailableError for bf16 on the CPU."""
    if choice.kind == "cpu" and choice.precision != "fp32":
        raise UnavailableError("--precision", "fp32 on the CPU", choice.precision, "leave it out, or use a GPU")


def capture(source: ModelSource, choice: Choice, tokens: Sequence[int], wanted: Collection[str],
            keep: Collection[str] = (), backward: bool = False, hashed: bool = False, device: Device | None = None
            ) -> Trace:
    """Run the model on one prompt and look at the points `wanted`; copies of those in `keep` stay in memory.

    With `backward` the targets are the tokens shifted by one and the gradient is that of their mean loss; on a GPU the
    forward pass is then training's, else that of a prompt in generation. `hashed` asks for the weights' hash, `device`
    is the GPU to use, or None for a new one. Raises ConfigError for bad tokens, UnavailableError and OutOfMemoryError
    for what the device cannot do, MeasureError when it showed other points than the model has.
    """
    check_tokens(source.config, tokens, backward)
    check_precision(choice)
    look = _Look(source.config, len(tokens), wanted, keep)
    if choice.kind == "cpu":
        loss = _on_cpu(source, tokens, backward, look)
    else:
        loss = _on_gpu(source, choice, tokens, backward, look, device or Device(choice.ordinal))
    _check_seen(look.seen, all_points(source.config, backward), choice)
    sha256 = sha256_of(_Params(source)) if hashed else None
    return Trace(str(source.path), tuple(sorted(set(source.dtypes.values()))), source.config, choice.text,
                 choice.precision, tuple(int(t) for t in tokens), loss, sha256, look.statistics, look.arrays)


class _Look:
    """A tap: statistics of what is wanted, copies of what is kept. Raises ShapeError for one of another shape."""

    def __init__(self, config: TransformerConfig, count: int, wanted: Collection[str], keep: Collection[str]) -> None:
        self.config, self.count, self.wanted, self.keep = config, count, frozenset(wanted), frozenset(keep)
        self.seen: list[str] = []
        self.statistics: dict[str, Statistics] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def __call__(self, name: str, array: np.ndarray) -> None:
        self.seen.append(name)
        if name in self.wanted | self.keep and array.shape != point_shape(name, self.config, self.count):
            raise ShapeError(f"point {name}", f"{list(point_shape(name, self.config, self.count))}, all tokens",
                             f"{list(array.shape)}", "this is a defect of apr: report it")
        if name in self.wanted:
            self.statistics[name] = statistics(array)
        if name in self.keep:
            self.arrays[name] = np.array(array, np.float32)


class _Params(Mapping[str, np.ndarray]):
    """The file's parameters in float32, each read whenever it is asked for: a model need not fit in memory so."""

    def __init__(self, source: ModelSource) -> None:
        self.weights = Weights(source, "fp32")
        self.names = [spec.name for spec in param_specs(source.config)]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.weights.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Discarded(_Params):
    """A gradient of each parameter that nobody keeps."""

    def __getitem__(self, name: str) -> np.ndarray:
        return np.zeros(self.weights.source.shapes[name], np.float32)


def _batch(tokens: Sequence[int]) -> LMBatch:
    """One sequence, each token's target the next one; the last has none."""
    return LMBatch(np.array([tokens], np.int32), np.array([[*tokens[1:], IGNORE]], np.int32))


def _on_cpu(source: ModelSource, tokens: Sequence[int], backward: bool, look: _Look) -> float | None:
    batch, params = _batch(tokens), _Params(source)
    with np.errstate(all="ignore"):  # a number that is none is shown, not warned of
        if not backward:
            model_forward(params, source.config, batch.inputs, None, look)
            return None
        dloss = 1 / batch.num_tokens
        return dloss * loss_and_gradients(params, _Discarded(source), source.config, batch.inputs, batch.targets,
                                          dloss, look)


def _on_gpu(source: ModelSource, choice: Choice, tokens: Sequence[int], backward: bool, look: _Look, device: Device
            ) -> float | None:
    if not backward:
        engine = CudaEngine(source, device, choice.precision, 1, len(tokens))
        engine.scores([tokens], [len(tokens)], look)
        return None
    settings = TransformerTrainConfig(batch_size=1, max_seq_len=len(tokens), precision=choice.precision)
    trainer = CudaTransformerTrainer.with_model(source.config, load_params(source), settings, device)
    batch = _batch(tokens)
    return trainer.gradients(batch, 1 / batch.num_tokens, look) / batch.num_tokens


def _check_seen(seen: list[str], expected: list[str], choice: Choice) -> None:
    """A point that was not seen is not a point without faults."""
    if seen != expected:
        at = next((i for i, (a, b) in enumerate(zip(seen, expected, strict=False)) if a != b),
                  min(len(seen), len(expected)))
        found = (*seen, "the end")[at] if at <= len(seen) else "the end"
        raise MeasureError(f"trace on {choice.text}", f"{len(expected)} points, {(*expected, 'the end')[at]} as number "
                           f"{at + 1}", f"{len(seen)}, {found}",
                           "give a shorter prompt if it is long; else this is a defect of apr: report it")
