"""One AdamW update of a whole model, beside torch.optim.AdamW(fused=True) over the same two ranges of flat memory.

Ours clips too, which PyTorch's does not. In bf16 ours also writes the copy of the weights that kernels read, and the
peer copies them after its step.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from harness import MODELS, Bench, Case, Work, run

from apr.buffers import STATS
from apr.config import TransformerConfig, TransformerTrainConfig
from apr.ops.adamw import adamw_update
from apr.params import layout

TRAIN = TransformerTrainConfig(lr=1e-5)


def update_bytes(size: int, copy: bool) -> int:
    """`copy`: with the bf16 copy of the weights."""
    return (30 if copy else 28) * size


def flops(size: int) -> int:
    return 15 * size


def peer(p: Any, master: Any, grads: Any, params: Any, decay_end: int) -> Any:
    """A maker of PyTorch's update: two groups, of which the first decays."""
    def make() -> Any:
        weights, gradients = p.tensors(master, grads)
        ranges = [weights[:decay_end], weights[decay_end:]]
        for weight, grad in zip(ranges, (gradients[:decay_end], gradients[decay_end:]), strict=True):
            weight.grad = grad
        optimizer = p.torch.optim.AdamW(
            [{"params": ranges[:1], "weight_decay": TRAIN.weight_decay}, {"params": ranges[1:], "weight_decay": 0.0}],
            lr=TRAIN.lr, betas=(TRAIN.beta1, TRAIN.beta2), eps=TRAIN.adam_eps, fused=True)
        copy = None if params is None else p.tensor(params)

        def launch() -> None:
            optimizer.step()
            if copy is not None:
                copy.copy_(weights)
        return launch
    return make


def update(name: str, c: TransformerConfig, X: str) -> Case:
    where = layout(c)

    def setup(b: Bench) -> Work:
        size = (where.size,)
        master, m, grads = (b.random(size, "f32") for _ in range(3))
        v, params = b.random(size, "f32", positive=True), b.empty(size, X) if X == "bf16" else None
        stats, step, factors = b.put(np.array([2.3, 1.7] + [0.0] * (STATS - 2))), b.put(np.array([1.0, TRAIN.lr])), (
            b.empty((4,), "f32"))
        label = "torch fused, copy" if X == "bf16" else "torch fused"
        return Work(lambda: adamw_update(b.dev, master, m, v, params, grads, factors, stats, step, where.decay_end,
                                         TRAIN, X),
                    lambda p: {label: peer(p, master, grads, params, where.decay_end)})
    return Case(f"update {name}", X, update_bytes(where.size, X == "bf16"), flops(where.size), setup)


def cases() -> list[Case]:
    """Both models in bf16, the first in f32 too: without the copy."""
    return [*(update(name, c, "bf16") for name, c in MODELS.items()),
            update("qwen2_0_5b", MODELS["qwen2_0_5b"], "f32")]


def main(argv: Sequence[str] | None = None) -> int:
    return run({"adamw": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
