"""Choosing the next token from scores; and generation by the reference, one whole forward pass per token.

No key/value cache yet: this is what a cached decoder will have to agree with, and quick enough for a demo's sample.
"""

from collections.abc import Iterator

import numpy as np

from apr.config import TransformerConfig
from apr.reference.model import model_forward
from apr.rng import generator


def sample(logits: np.ndarray, temperature: float, top_k: int, rng: np.random.Generator) -> int:
    """A token id from scores (V,): the largest at temperature 0, else drawn from the softmax of the top_k (0: all)."""
    if temperature == 0:
        return int(logits.argmax())
    scores = logits.astype(np.float64) / temperature
    if 0 < top_k < scores.size:
        scores[scores < np.partition(scores, -top_k)[-top_k]] = -np.inf
    odds = np.exp(scores - scores.max())
    return int(np.searchsorted(np.cumsum(odds), rng.random() * odds.sum(), side="right"))


def generate(params: dict[str, np.ndarray], config: TransformerConfig, prompt: list[int], max_tokens: int,
             vocab_limit: int, *, temperature: float, top_k: int, seed: int, stop_id: int | None) -> Iterator[int]:
    """Token ids that continue `prompt`, until stop_id, max_tokens or the model's last position.

    vocab_limit is the tokenizer's size: rows of the head beyond it are padding and are never drawn.
    """
    ids = list(prompt)
    for position in range(max_tokens):
        if len(ids) >= config.max_position_embeddings:
            return
        logits = model_forward(params, config, np.array([ids]))[0, -1, :vocab_limit]
        token = sample(logits, temperature, top_k, generator(seed, "sample", position))
        if token == stop_id:
            return
        ids.append(token)
        yield token
