"""The L2 norm of every gradient, beside torch.nn.utils.get_total_norm over the same memory as a list of parameters, and
torch.linalg.vector_norm over all of it at once. Ours adds up in double, PyTorch's in float.
"""

from collections.abc import Sequence
from typing import Any

from harness import MODELS, Bench, Case, Work, run

from apr.buffers import PARTS
from apr.config import TransformerConfig
from apr.ops.global_norm import global_norm
from apr.params import layout


def norm_bytes(size: int) -> int:
    return 4 * size


def flops(size: int) -> int:
    return 2 * size


def norm(name: str, c: TransformerConfig) -> Case:
    where = layout(c)

    def setup(b: Bench) -> Work:
        grads, result, partial = b.random((where.size,), "f32"), b.empty((1,), "f64"), b.empty((PARTS,), "f64")

        def peers(p: Any) -> Any:
            flat = p.tensor(grads)
            each = [flat[o:o + s.size] for s, o in zip(where.specs, where.offsets, strict=True)]
            return {"torch foreach": lambda: lambda: p.torch.nn.utils.get_total_norm(each, foreach=True),
                    "torch flat": lambda: lambda: p.torch.linalg.vector_norm(flat)}
        return Work(lambda: global_norm(b.dev, result, partial, grads, "f32"), peers)
    return Case(f"norm {name}", "f32", norm_bytes(where.size), flops(where.size), setup)


def cases() -> list[Case]:
    """Both models; gradients are f32 whatever the weights are."""
    return [norm(name, c) for name, c in MODELS.items()]


def main(argv: Sequence[str] | None = None) -> int:
    return run({"global_norm": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
