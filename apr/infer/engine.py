"""Engine: what generates, on a CPU or a GPU: prompts in, one token per sequence and step out; and scores for checks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from apr.config import Sampling, TransformerConfig
from apr.errors import ShapeError
from apr.taps import Tap


class Engine(ABC):
    """A model that is ready to generate: up to `B` sequences of at most `S` tokens each, prompt included."""

    config: TransformerConfig
    B: int
    S: int
    device: str  # cpu or cuda:N
    precision: str  # fp32 or bf16
    path: Mapping[str, str] = MappingProxyType({})  # of each op with a fast path, which one is taken (registry.paths)
    gate: Mapping[str, Any]  # what the start gate found: status (not run, passed, remembered, skipped) and its figures

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, limit: int) -> Iterator[np.ndarray]:
        """Tokens that continue each prompt: (len(prompts),) int32 a step, for at most `limit` steps.

        The iterator goes on for all sequences until it is closed or one of them is S long; who takes the tokens
        decides which sequences have ended. Raises ShapeError for no prompt, more than B, an empty one, one longer than
        S, or an id that the model lacks.
        """

    @abstractmethod
    def scores(self, prompts: Sequence[Sequence[int]], cached: Sequence[int], tap: Tap | None = None
               ) -> list[np.ndarray]:
        """Next-token scores (T, V) float32 at every position of each prompt, given as they are.

        The first cached[i] tokens (0: none) of prompt i go through prefill, the rest through decoding steps one by one,
        all prompts together. `tap` sees every stage of each layer as (B, T, ...), in decoding once per step with T = 1;
        what a fused kernel has inside it does not show. Raises ShapeError as generate.
        """



def check_prompts(engine: Engine, prompts: Sequence[Sequence[int]], cached: Sequence[int] | None = None) -> None:
    """Raise ShapeError for no prompt, more than B, an empty one, one longer than S, or an id that the model lacks.

    And for a `cached` that is not as long as prompts, or a number in it beyond the prompt's length.
    """
    if not 1 <= len(prompts) <= engine.B:
        raise ShapeError("prompts", f"1 to {engine.B} at a time", str(len(prompts)), "give fewer at a time")
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= engine.S:
            raise ShapeError(f"prompt {number}", f"1 to {engine.S} tokens", str(len(prompt)), "shorten it")
        if min(prompt) < 0 or max(prompt) >= engine.config.V:
            raise ShapeError(f"prompt {number}", f"token ids in [0, {engine.config.V})",
                             f"{min(prompt)} to {max(prompt)}", "use the model's own tokenizer")
    if cached is not None and (len(cached) != len(prompts)
                               or any(not 0 <= n <= len(p) for n, p in zip(cached, prompts, strict=True))):
        raise ShapeError("cached", "for each prompt a number from 0 to its length", f"{list(cached)[:8]}", "correct it")
