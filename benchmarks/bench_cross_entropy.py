"""Cross-entropy of as many rows of logits as training has in memory, alone and with its gradient; F.cross_entropy.

Our gradient replaces the logits, which are restored, untimed, before each repetition; PyTorch's is a new array, and it
has V columns where ours has them padded to a multiple of 128. Eager is given the bf16 logits, torch.compile casts them
to float32 within its kernels, where that costs nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from harness import BYTES, MODELS, Bench, Case, Work, head_rows, run
from peers import COMPILED, EAGER

from apr.config import TransformerConfig
from apr.ops.cross_entropy import cross_entropy_forward, cross_entropy_forward_backward


def forward_bytes(N: int, V: int, s: int) -> int:
    return N * V * s


def backward_bytes(N: int, V: int, s: int) -> int:
    """Of the kernel that does both: what a row is read again is no work."""
    return 2 * N * V * s


def flops(N: int, V: int) -> int:
    """Without the exponentials."""
    return 10 * N * V


def targets(n: int, c: TransformerConfig) -> np.ndarray:
    """A target for each of n rows."""
    return np.random.default_rng(2).integers(0, c.V, n).astype(np.int32)


def peers(p: Any, logits: Any, ids: np.ndarray, c: TransformerConfig, gradient: bool) -> dict[str, Any]:
    """PyTorch's mean loss of logits (N, V), and its gradient if wanted, forward pass included."""
    scores = p.tensor(logits).view(-1)[:ids.size * c.V].view(ids.size, c.V)
    index = p.torch.as_tensor(ids, device="cuda").long()

    cross_entropy = p.functional.cross_entropy

    def loss(x: Any) -> Any:
        return cross_entropy(x, index)

    def launch(f: Any) -> Any:
        if not gradient:
            return lambda: f(scores)
        leaf = scores.detach().requires_grad_()
        return lambda: p.torch.autograd.grad(f(leaf), leaf)
    return {EAGER: lambda: launch(loss), COMPILED: lambda: launch(p.compile(lambda x: loss(x.float())))}


def forward(name: str, c: TransformerConfig, X: str) -> Case:
    n = head_rows(c, X)

    def setup(b: Bench) -> Work:
        losses, logits, ids = b.empty((n,), "f32"), b.random((n, c.Vp), X), targets(n, c)
        on_gpu = b.put(ids)
        return Work(lambda: cross_entropy_forward(b.dev, losses, logits, on_gpu, c.V),
                    lambda p: peers(p, logits, ids, c, False))
    return Case(f"forward {name}", X, forward_bytes(n, c.V, BYTES[X]), flops(n, c.V), setup)


def backward(name: str, c: TransformerConfig, X: str) -> Case:
    n = head_rows(c, X)

    def setup(b: Bench) -> Work:
        losses, original, ids = b.empty((n,), "f32"), b.random((n, c.Vp), X), targets(n, c)
        logits, on_gpu, dloss = b.random((n, c.Vp), X), b.put(ids), b.put(np.array([1 / n]))
        return Work(lambda: cross_entropy_forward_backward(b.dev, losses, logits, on_gpu, dloss, c.V),
                    lambda p: peers(p, original, ids, c, True), lambda: b.copy(logits, original))
    return Case(f"forward+backward {name}", X, backward_bytes(n, c.V, BYTES[X]), flops(n, c.V), setup)


def cases() -> list[Case]:
    """Both models in bf16, the second also with a vocabulary as wide as its padded one, and the first in f32."""
    llama = MODELS["llama_370m"]
    kinds = [*((name, c, "bf16") for name, c in MODELS.items()),
             (f"V={llama.Vp}", replace(llama, vocab_size=llama.Vp), "bf16"),
             ("qwen2_0_5b", MODELS["qwen2_0_5b"], "f32")]
    return [make(name, c, X) for name, c, X in kinds for make in (forward, backward)]


def main(argv: Sequence[str] | None = None) -> int:
    return run({"cross_entropy": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
