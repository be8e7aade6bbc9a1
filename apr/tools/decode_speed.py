"""How quick generation is, for `apr bench decode` and benchmarks/bench_decode.py: a random model, its bytes, seconds.

    roof = copy rate of this GPU / (bytes of weights and of keys and values that a step must read), times the batch
"""

import statistics
import time
from pathlib import Path

import numpy as np

from apr.config import Sampling, TransformerConfig
from apr.dtypes import BY_NAME
from apr.formats.source import ModelSource
from apr.hf_config import to_hf
from apr.infer.cuda_engine import CudaEngine
from apr.params import layout, param_specs
from apr.tools.timing import BLOCK

STORED = {"bf16": "BF16", "fp32": "F32"}
DRAWN = {"temperature": 0.8, "top_p": 0.95, "seed": 1}
SPREAD = 0.02  # deviation of the weights
STEPS = 128  # decoded at a time


def random_model(config: TransformerConfig, precision: str) -> dict[str, np.ndarray]:
    """Parameters by name: norms 1, the rest normal numbers of which a block is repeated, each from another start."""
    kind = BY_NAME[STORED[precision]].numpy
    block = (SPREAD * np.random.default_rng(1).standard_normal(BLOCK, np.float32)).astype(kind)
    out = {}
    for i, spec in enumerate(param_specs(config)):
        out[spec.name] = (np.ones(spec.shape, kind) if spec.name.endswith("norm.weight")
                          else np.resize(np.roll(block, 7919 * i), spec.shape))
    return out


def source_of(config: TransformerConfig, arrays: dict[str, np.ndarray], precision: str) -> ModelSource:
    """The parameters as if they had been read."""
    return ModelSource(Path("memory"), "memory", config, to_hf(config), {}, {n: a.shape for n, a in arrays.items()},
                       dict.fromkeys(arrays, STORED[precision]), arrays.__getitem__, lambda: None)


def step_bytes(c: TransformerConfig, itemsize: int, batch: int, context: int) -> int:
    """What a step must read: every weight once (an untied embedding: a row per sequence), all keys and values."""
    weights = layout(c).size - (0 if c.tie_word_embeddings else c.Vp * c.C)
    return itemsize * (weights + 2 * c.L * c.NKV * c.HS * context * batch)


def prompts_of(c: TransformerConfig, batch: int, length: int, seed: int = 2) -> list[list[int]]:
    """Random tokens."""
    rows: list[list[int]] = np.random.default_rng(seed).integers(0, c.V, (batch, length)).tolist()
    return rows


def step_seconds(engine: CudaEngine, prompts: list[list[int]], sampling: Sampling, steps: int, repeats: int) -> float:
    """Seconds of a decoding step after `prompts`, on the GPU alone."""
    list(engine.generate(prompts, sampling, 4))  # makes the graph
    dev, length, times = engine.dev, len(prompts[0]), []
    for slot, prompt in enumerate(prompts):
        engine._prefill(slot, prompt[:-1])
    for _ in range(repeats):
        engine._state([p[-1] for p in prompts], [length - 1] * len(prompts), sampling, steps)
        engine.decoder.start()
        start, end = dev.cupy.cuda.Event(), dev.cupy.cuda.Event()
        start.record(dev.stream)
        for _ in range(steps):
            engine._launch()
        end.record(dev.stream)
        dev.synchronize()
        times.append(1e-3 * dev.cupy.cuda.get_elapsed_time(start, end) / steps)
    return statistics.median(times)


def generate_seconds(engine: CudaEngine, prompts: list[list[int]], sampling: Sampling, steps: int,
                     repeats: int) -> float:
    """Seconds between two tokens of a caller of generate."""
    times = []
    for _ in range(repeats):
        tokens = engine.generate(prompts, sampling, steps)
        next(tokens)
        start = time.perf_counter()
        count = sum(1 for _ in tokens)
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)


def first_seconds(engine: CudaEngine, length: int, repeats: int) -> tuple[float, float]:
    """Seconds from call to first token with a prompt of `length`, and of its prefill alone."""
    first, alone, c = [], [], engine.config
    for i in range(repeats + 2):  # the first two make views and load algorithms
        (prompt,) = prompts_of(c, 1, length, seed=i)
        start = time.perf_counter()
        tokens = engine.generate([prompt], Sampling(c.V), 64)
        next(tokens)
        first.append(time.perf_counter() - start)
        tokens.close()  # type: ignore[attr-defined]
        start = time.perf_counter()
        engine._prefill(0, prompt)
        engine.dev.synchronize()
        alone.append(time.perf_counter() - start)
    return statistics.median(first[2:]), statistics.median(alone[2:])
