"""RMSNorm alone and its gradient, beside F.rms_norm. With the residual addition, as in a layer: bench_residual.py.

Our gradient also writes the norm's output again, which forward does not keep.
"""

from collections.abc import Sequence
from typing import Any

from harness import BYTES, MODELS, Bench, Case, N, Work, run

from apr.buffers import PARTS
from apr.config import TransformerConfig
from apr.ops.rmsnorm import rmsnorm_backward, rmsnorm_forward


def forward_bytes(N: int, C: int, s: int) -> int:
    return 2 * N * C * s + 4 * N


def backward_bytes(N: int, C: int, P: int, s: int) -> int:
    """Without the residual's gradient, which is one reading less; and the kernel that adds the parts of dweight."""
    return 4 * N * C * s + 4 * N + 4 * P * C + (4 * P * C + 8 * C)


def forward_flops(N: int, C: int) -> int:
    return 5 * N * C


def backward_flops(N: int, C: int) -> int:
    return 12 * N * C


def peer(p: Any, c: TransformerConfig) -> Any:
    """The same in PyTorch."""
    rms_norm, shape, eps = p.functional.rms_norm, (c.C,), c.rms_norm_eps
    return lambda x, weight: rms_norm(x, shape, weight, eps)


def forward(name: str, c: TransformerConfig, X: str) -> Case:
    def setup(b: Bench) -> Work:
        out, rstd, inp, weight = (b.empty((N, c.C), X), b.empty((N,), "f32"), b.random((N, c.C), X),
                                  b.random((c.C,), X))
        return Work(lambda: rmsnorm_forward(b.dev, out, rstd, None, inp, None, weight, eps=c.rms_norm_eps),
                    lambda p: p.forward(peer(p, c), *p.tensors(inp, weight)))
    return Case(f"forward {name}", X, forward_bytes(N, c.C, BYTES[X]), forward_flops(N, c.C), setup)


def backward(name: str, c: TransformerConfig, X: str) -> Case:
    def setup(b: Bench) -> Work:
        dinp, out, partial = b.empty((N, c.C), X), b.empty((N, c.C), X), b.empty((PARTS, c.C), "f32")
        dout, inp, weight = b.random((N, c.C), X), b.random((N, c.C), X), b.random((c.C,), X)
        dweight, rstd = b.random((c.C,), "f32"), b.empty((N,), "f32")
        rmsnorm_forward(b.dev, out, rstd, None, inp, None, weight, eps=c.rms_norm_eps)
        return Work(lambda: rmsnorm_backward(b.dev, dinp, dweight, out, partial, dout, None, inp, weight, rstd,
                                             eps=c.rms_norm_eps),
                    lambda p: p.backward(peer(p, c), p.tensors(inp, weight), [p.tensor(dout)]))
    return Case(f"backward {name}", X, backward_bytes(N, c.C, PARTS, BYTES[X]), backward_flops(N, c.C), setup)


def cases() -> list[Case]:
    """Both models in bf16, the first in f32 too."""
    kinds = [*((name, "bf16") for name in MODELS), ("qwen2_0_5b", "f32")]
    return [make(name, MODELS[name], X) for name, X in kinds for make in (forward, backward)]


def main(argv: Sequence[str] | None = None) -> int:
    return run({"rmsnorm": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
