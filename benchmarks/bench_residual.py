"""The residual addition and the norm after it, which are one kernel here (kernels/rmsnorm.cu), and their gradient.

The peer is x + update, then F.rms_norm: two kernels in eager, one where torch.compile fuses them. Our gradient also
writes the norm's output again, which forward does not keep.
"""

from collections.abc import Sequence
from typing import Any

from harness import BYTES, MODELS, Bench, Case, N, Work, run

from apr.buffers import PARTS
from apr.config import TransformerConfig
from apr.ops.rmsnorm import rmsnorm_backward, rmsnorm_forward


def forward_bytes(N: int, C: int, s: int) -> int:
    return 4 * N * C * s + 4 * N


def backward_bytes(N: int, C: int, P: int, s: int) -> int:
    """Both kernels."""
    return 5 * N * C * s + 4 * N + 4 * P * C + (4 * P * C + 8 * C)


def forward_flops(N: int, C: int) -> int:
    return 5 * N * C


def backward_flops(N: int, C: int) -> int:
    return 12 * N * C


def peer(p: Any, c: TransformerConfig) -> Any:
    """The same in PyTorch: the stream after the addition, and its norm."""
    rms_norm, shape, eps = p.functional.rms_norm, (c.C,), c.rms_norm_eps

    def add_norm(x: Any, update: Any, weight: Any) -> tuple[Any, Any]:
        stream = x + update
        return stream, rms_norm(stream, shape, weight, eps)
    return add_norm


def forward(name: str, c: TransformerConfig, X: str) -> Case:
    def setup(b: Bench) -> Work:
        out, rstd, residual = b.empty((N, c.C), X), b.empty((N,), "f32"), b.empty((N, c.C), X)
        inp, update, weight = b.random((N, c.C), X), b.random((N, c.C), X), b.random((c.C,), X)
        return Work(lambda: rmsnorm_forward(b.dev, out, rstd, residual, inp, update, weight, eps=c.rms_norm_eps),
                    lambda p: p.forward(peer(p, c), *p.tensors(inp, update, weight)))
    return Case(f"forward {name}", X, forward_bytes(N, c.C, BYTES[X]), forward_flops(N, c.C), setup)


def backward(name: str, c: TransformerConfig, X: str) -> Case:
    def setup(b: Bench) -> Work:
        dinp, out, partial = b.empty((N, c.C), X), b.empty((N, c.C), X), b.empty((PARTS, c.C), "f32")
        dout, dresidual, inp = (b.random((N, c.C), X) for _ in range(3))
        weight, dweight, rstd = b.random((c.C,), X), b.random((c.C,), "f32"), b.empty((N,), "f32")
        rmsnorm_forward(b.dev, out, rstd, None, inp, None, weight, eps=c.rms_norm_eps)
        return Work(lambda: rmsnorm_backward(b.dev, dinp, dweight, out, partial, dout, dresidual, inp, weight, rstd,
                                             eps=c.rms_norm_eps),
                    lambda p: p.backward(peer(p, c), p.tensors(inp, b.random((N, c.C), X), weight),
                                         p.tensors(dresidual, dout)))
    return Case(f"backward {name}", X, backward_bytes(N, c.C, PARTS, BYTES[X]), backward_flops(N, c.C), setup)


def cases() -> list[Case]:
    """Both models in bf16."""
    return [make(name, c, "bf16") for name, c in MODELS.items() for make in (forward, backward)]


def main(argv: Sequence[str] | None = None) -> int:
    return run({"residual": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
