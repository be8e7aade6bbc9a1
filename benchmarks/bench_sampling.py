"""The choice of the next token and its embedding, beside the same choice as users of Hugging Face's library write it.

Scores are normal numbers of deviation 3, of the whole vocabulary; decode_head's best of each block is there already,
since it comes with the scores. Drawing reads the scores 2 to 11 times, from L2; the bytes here count one reading.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from harness import MODELS, Bench, Case, Work, run
from peers import EAGER

from apr.config import TransformerConfig
from apr.ops.decode_linear import head_blocks
from apr.ops.sampling import sample

TEMPERATURE = 0.8
SETTINGS: dict[str, tuple[float, int, float]] = {  # temperature, top_k (0: all), top_p
    "greedy": (0.0, 0, 1.0), "temperature": (TEMPERATURE, 0, 1.0), "top-k 50": (TEMPERATURE, 50, 1.0),
    "top-p 0.95": (TEMPERATURE, 0, 0.95)}
BATCHES = (1, 8)


def greedy_bytes(B: int, BESTS: int) -> int:
    return 8 * B * BESTS


def drawn_bytes(B: int, V: int) -> int:
    return 4 * B * V


def bests_of(scores: np.ndarray, bests: int) -> tuple[np.ndarray, np.ndarray]:
    """Score and id of the best of each block, as decode_head leaves them."""
    rows = -(-scores.shape[1] // bests)
    whole = np.full((len(scores), bests * rows), -np.inf, np.float32)
    whole[:, :scores.shape[1]] = scores
    ids = whole.reshape(len(scores), bests, rows).argmax(2) + np.arange(bests) * rows
    return np.take_along_axis(whole, ids, 1), ids.astype(np.int32)


def peer(p: Any, temperature: float, top_k: int, top_p: float) -> Any:
    """A function of scores (B, V) that draws a token for each row."""
    torch = p.torch

    def choose(scores: Any) -> Any:
        if temperature == 0:
            return torch.argmax(scores, dim=-1)
        scores = scores / temperature
        if top_k:
            scores = scores.masked_fill(scores < torch.topk(scores, top_k)[0][..., -1:], -torch.inf)
        if top_p < 1:
            ordered, ids = torch.sort(scores, descending=False)
            remove = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
            remove[..., -1:] = False
            scores = scores.masked_fill(remove.scatter(1, ids, remove), -torch.inf)
        return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
    return choose


def choice(which: str, name: str, c: TransformerConfig, B: int, X: str) -> Case:
    temperature, top_k, top_p = SETTINGS[which]
    bests = head_blocks(c, B, X)

    def setup(b: Bench) -> Work:
        scores = 3 * np.random.default_rng(B).standard_normal((B, c.V), np.float32)
        logits, (best, ids) = b.put(scores), map(b.put, bests_of(scores, bests))
        x, matrix = b.empty((B, c.C), "f32"), b.random((c.V, c.C), X)
        token, pos, step = (b.put(np.zeros(B, np.int32)) for _ in range(3))
        _, tokens = b.dev.mapped((1, B), "i32")
        settings = b.put(np.array([c.V, 1, 0, top_k, 1], np.int64))
        odds = b.put(np.array([1 / temperature if temperature else 0.0, top_p]))

        def peers(p: Any) -> Any:
            function, tensor = peer(p, temperature, top_k, top_p), p.tensor(logits)
            return {EAGER: lambda: lambda: function(tensor)}
        return Work(lambda: sample(b.dev, x, token, pos, step, tokens, logits, best, ids, matrix, settings, odds, c),
                    peers, reset=lambda: b.dev.fill(step, 0))
    moved = drawn_bytes(B, c.V) if temperature else greedy_bytes(B, bests)
    return Case(f"{which} {name} B={B}", X, moved, 0, setup)


def cases() -> list[Case]:
    """Every way to choose, with the vocabulary of Qwen2; the first with the other model's."""
    c = MODELS["qwen2_0_5b"]
    out = [choice(which, "qwen2_0_5b", c, B, "bf16") for B in BATCHES for which in SETTINGS]
    return [*out, choice("greedy", "llama_370m", MODELS["llama_370m"], 1, "bf16")]


def main(argv: Sequence[str] | None = None) -> int:
    return run({"sampling": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
