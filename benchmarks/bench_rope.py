"""Rotary positions of the query and key heads, in place as in training, and their gradient, beside transformers' way.

PyTorch's writes the turned heads to other memory, as its users do. Turning keeps the length of what it turns, so the
numbers stay random however often it is repeated.
"""

from collections.abc import Sequence
from typing import Any

from harness import BYTES, MODELS, B, Bench, Case, N, T, Work, run

from apr.buffers import PARTS
from apr.config import TransformerConfig
from apr.ops.rope import rope_backward, rope_forward, rope_table


def forward_bytes(N: int, NH: int, NKV: int, HS: int, s: int) -> int:
    """Without the table of angles, which stays in L2."""
    return 2 * N * (NH + NKV) * HS * s


def forward_flops(N: int, NH: int, NKV: int, HS: int) -> int:
    return 3 * N * (NH + NKV) * HS


backward_bytes, backward_flops = forward_bytes, forward_flops


def peer(p: Any, cos: Any, sin: Any) -> Any:
    """The same in PyTorch of x (B, T, heads, HS); cos, sin (T, HS/2)."""
    cat = p.torch.cat
    cos, sin = (cat((t, t), -1)[:, None] for t in p.tensors(cos, sin))

    def rope(x: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        return (x * cos + cat((-second, first), dim=-1) * sin).to(x.dtype)
    return rope


def heads(p: Any, c: TransformerConfig, qkv: Any) -> Any:
    """The heads of qkv (N, QKV) that are turned, as a tensor."""
    return p.tensor(qkv).view(B, T, -1, c.HS)[:, :, :c.NH + c.NKV]


def forward(name: str, c: TransformerConfig, X: str) -> Case:
    def setup(b: Bench) -> Work:
        qkv, cos, sin = b.random((N, c.QKV), X), b.empty((T, c.HS // 2), "f32"), b.empty((T, c.HS // 2), "f32")
        rope_table(b.dev, cos, sin, c, X)
        return Work(lambda: rope_forward(b.dev, qkv, qkv, None, cos, sin, T, c),
                    lambda p: p.forward(peer(p, cos, sin), heads(p, c, qkv)))
    return Case(f"forward {name}", X, forward_bytes(N, c.NH, c.NKV, c.HS, BYTES[X]),
                forward_flops(N, c.NH, c.NKV, c.HS), setup)


def backward(name: str, c: TransformerConfig, X: str) -> Case:
    def setup(b: Bench) -> Work:
        dqkv, cos, sin = b.random((N, c.QKV), X), b.empty((T, c.HS // 2), "f32"), b.empty((T, c.HS // 2), "f32")
        partial = b.empty((PARTS, 2 * c.HS), "f32")
        rope_table(b.dev, cos, sin, c, X)

        def peers(p: Any) -> Any:
            dout = p.tensor(b.random((B, T, c.NH + c.NKV, c.HS), X))
            return p.backward(peer(p, cos, sin), [heads(p, c, dqkv)], [dout])
        return Work(lambda: rope_backward(b.dev, dqkv, None, None, partial, dqkv, None, None, cos, sin, T, c), peers)
    return Case(f"backward {name}", X, backward_bytes(N, c.NH, c.NKV, c.HS, BYTES[X]),
                backward_flops(N, c.NH, c.NKV, c.HS), setup)


def cases() -> list[Case]:
    """Both models in bf16."""
    return [make(name, c, "bf16") for name, c in MODELS.items() for make in (forward, backward)]


def main(argv: Sequence[str] | None = None) -> int:
    return run({"rope": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
