"""Generation on the CPU: the reference's own layers in float32, with a cache of keys and values.

A token costs one pass over the weights, and memory is the limit: on two cores one BLAS thread already takes what there
is, while two wait for each other (docs/run.md has the figures). So BLAS is held to one thread.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from apr.config import Sampling, TransformerConfig
from apr.errors import ShapeError
from apr.formats.source import ModelSource
from apr.infer.engine import Engine, check_prompts
from apr.params import param_specs
from apr.reference.kv_cache import KVCache, cached_forward
from apr.reference.sampling import choose
from apr.taps import Tap

CHUNK = 256  # tokens of a prompt at a time: attention's matrix is CHUNK x length


def load_params(source: ModelSource) -> dict[str, np.ndarray]:
    """Every parameter as float32 by name; beside them, never more than one as it is stored. Raises as source.read."""
    params = {}
    for spec in param_specs(source.config):
        stored = source.read(spec.name)
        params[spec.name] = stored.astype(np.float32, copy=False)
    return params


class CpuEngine(Engine):
    """A model on the CPU, float32; params by name, float32, not copied. Raises ShapeError for a B or S out of range."""

    device, precision = "cpu", "fp32"
    gate: Mapping[str, Any] = {"status": "not run", "reason": "the CPU engine is the reference itself"}

    def __init__(self, config: TransformerConfig, params: dict[str, np.ndarray], B: int, S: int) -> None:
        if B < 1 or not 1 <= S <= config.max_position_embeddings:
            raise ShapeError("engine (B, S)", f"B of 1 or more, S from 1 to {config.max_position_embeddings}",
                             f"({B}, {S})", "lower it")
        self.config, self.params, self.B, self.S = config, params, B, S
        self.blas = ThreadpoolController().select(user_api="blas")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, limit: int) -> Iterator[np.ndarray]:
        """Tokens that continue each prompt, as Engine says."""
        check_prompts(self, prompts)
        return self._tokens([list(p) for p in prompts], sampling, limit)

    def _tokens(self, prompts: list[list[int]], sampling: Sampling, limit: int) -> Iterator[np.ndarray]:
        cache, rows = self._cache(len(prompts)), list(range(len(prompts)))
        if limit < 1 or max(map(len, prompts)) >= self.S:
            return
        scores = np.concatenate([self._prefill(cache, row, prompt, None, last=True)[-1:]
                                 for row, prompt in enumerate(prompts)])
        for step in range(limit):
            tokens = np.array([choose(scores[row], sampling, sampling.first + row, cache.lengths[row])
                               for row in rows], np.int32)
            yield tokens
            if step + 1 == limit or max(cache.lengths) + 1 >= self.S:
                return
            scores = self._forward(tokens[:, None], cache, rows, None)[:, 0]

    def scores(self, prompts: Sequence[Sequence[int]], cached: Sequence[int], tap: Tap | None = None
               ) -> list[np.ndarray]:
        """Next-token scores (T, V) at every position of each prompt, as Engine says."""
        check_prompts(self, prompts, cached)
        cache = self._cache(len(prompts))
        parts = [[self._prefill(cache, row, list(p[:n]), tap)] if n else []
                 for row, (p, n) in enumerate(zip(prompts, cached, strict=True))]
        while rows := [row for row, p in enumerate(prompts) if cache.lengths[row] < len(p)]:
            ids = np.array([[prompts[row][cache.lengths[row]]] for row in rows])
            for row, scores in zip(rows, self._forward(ids, cache, rows, tap), strict=True):
                parts[row].append(scores)
        return [np.concatenate(p) for p in parts]

    def _cache(self, count: int) -> KVCache:
        return KVCache(self.config, count, self.S, np.dtype(np.float32))

    def _prefill(self, cache: KVCache, row: int, prompt: list[int], tap: Tap | None, last: bool = False) -> np.ndarray:
        """Scores (T, V) of a prompt, or with `last` (1, V); in pieces of CHUNK unless a tap wants to see it whole."""
        size = CHUNK if tap is None else len(prompt)
        parts = [self._forward(np.array([prompt[at:at + size]]), cache, [row], tap, last)[0]
                 for at in range(0, len(prompt), size)]
        return parts[-1] if last else np.concatenate(parts)

    def _forward(self, ids: np.ndarray, cache: KVCache, rows: list[int], tap: Tap | None, last: bool = False
                 ) -> np.ndarray:
        with self.blas.limit(limits=1), np.errstate(all="ignore"):  # a score that is no number is refused when chosen
            return cached_forward(self.params, self.config, ids, cache, rows, tap, last)
