"""Engine: what generates, on a CPU or a GPU: prompts in, one token per sequence and step out; and scores for checks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from apr.config import TransformerConfig, require
from apr.errors import ShapeError
from apr.taps import Tap


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from scores.

    temperature 0 takes the largest (the first of equals); else scores / temperature, of which the `top_k` largest are
    kept (0: all), then the fewest that hold `top_p` of the probability (1: all), and one is drawn. `vocab` is the
    tokenizer's size: ids from there on are padding of the model's head and are never chosen. Draws are a pure function
    of seed, number of the sequence (`first` is that of the first prompt) and position, the same on CPU and GPU:
    apr/reference/sampling.py. Raises ConfigError for a value out of range.
    """

    vocab: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        require("--temperature", self.temperature, "from 0 to 100", 0 <= self.temperature <= 100, "sampling")
        require("--top-k", self.top_k, "0 or more", type(self.top_k) is int and 0 <= self.top_k < 2**31, "sampling")
        require("--top-p", self.top_p, "above 0, at most 1", 0 < self.top_p <= 1, "sampling")
        require("--seed", self.seed, "from 0 to 2^63-1", type(self.seed) is int and 0 <= self.seed < 2**63, "sampling")


class Engine(ABC):
    """A model that is ready to generate: up to `B` sequences of at most `S` tokens each, prompt included."""

    config: TransformerConfig
    B: int
    S: int
    device: str  # cpu or cuda:N
    precision: str  # fp32 or bf16

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

        The first cached[i] >= 1 tokens of prompt i go through prefill, the rest through decoding steps one by one, all
        prompts together. `tap` sees every stage of every layer as (B, T, ...): in decoding once per step, T = 1. Raises
        ShapeError as generate.
        """


def check_prompts(engine: Engine, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ShapeError for no prompt, more than B, an empty one, one longer than S, or an id that the model lacks."""
    if not 1 <= len(prompts) <= engine.B:
        raise ShapeError("prompts", f"1 to {engine.B} at a time", str(len(prompts)), "make the engine with a larger B")
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= engine.S:
            raise ShapeError(f"prompt {number}", f"1 to {engine.S} tokens", str(len(prompt)), "shorten it")
        if not (min(prompt) >= 0 and max(prompt) < engine.config.V):
            raise ShapeError(f"prompt {number}", f"token ids in [0, {engine.config.V})",
                             f"{min(prompt)} to {max(prompt)}", "use the model's own tokenizer")
