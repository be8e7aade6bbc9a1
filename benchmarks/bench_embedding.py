"""The embedding and its gradient, beside F.embedding.

Tokens are drawn as text has them (Zipf), and once evenly. PyTorch's gradient sorts on the GPU and fills the whole table
first; ours is given the order by the host, and adds to float32.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from harness import BYTES, MODELS, Bench, Case, N, Work, run

from apr.config import TransformerConfig
from apr.ops.embedding import embedding_backward, embedding_forward, sort_ids


def forward_bytes(N: int, C: int, s: int) -> int:
    return 2 * N * C * s + 4 * N


def backward_bytes(N: int, C: int, U: int, s: int) -> int:
    return N * C * s + 8 * U * C + 8 * N


def backward_flops(N: int, C: int) -> int:
    return N * C


def draw(V: int, even: bool = False) -> np.ndarray:
    """N token ids, of the frequencies of words in a text or all alike."""
    rng = np.random.default_rng(1)
    if even:
        return rng.integers(0, V, N).astype(np.int32)
    often = 1 / (np.arange(V) + 2.7)
    return rng.permutation(V)[rng.choice(V, N, p=often / often.sum())].astype(np.int32)


def forward(name: str, c: TransformerConfig, ids: np.ndarray, X: str) -> Case:
    def setup(b: Bench) -> Work:
        out, weight, tokens = b.empty((N, c.C), X), b.random((c.Vp, c.C), X), b.put(ids)
        return Work(lambda: embedding_forward(b.dev, out, weight, tokens),
                    lambda p: p.forward(p.functional.embedding, *p.tensors(tokens, weight)))
    return Case(f"forward {name}", X, forward_bytes(N, c.C, BYTES[X]), 0, setup)


def backward(name: str, c: TransformerConfig, ids: np.ndarray, X: str) -> Case:
    def setup(b: Bench) -> Work:
        dweight, dout, tokens = b.random((c.Vp, c.C), "f32"), b.random((N, c.C), X), b.put(ids)
        order, runs = map(b.put, sort_ids(ids))

        def peers(p: Any) -> Any:
            index, table, embedding = p.tensor(tokens), p.tensor(b.random((c.Vp, c.C), X)), p.functional.embedding
            return p.backward(lambda weight: embedding(index, weight), [table], [p.tensor(dout)])
        return Work(lambda: embedding_backward(b.dev, dweight, dout, tokens, order, runs), peers)
    return Case(f"backward {name}", X, backward_bytes(N, c.C, np.unique(ids).size, BYTES[X]), backward_flops(N, c.C),
                setup)


def cases() -> list[Case]:
    """Both models in bf16."""
    out = []
    for name, c in MODELS.items():
        out += [forward(name, c, draw(c.V), "bf16"), backward(name, c, draw(c.V), "bf16"),
                backward(f"{name} even", c, draw(c.V, even=True), "bf16")]
    return out


def main(argv: Sequence[str] | None = None) -> int:
    return run({"embedding": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
