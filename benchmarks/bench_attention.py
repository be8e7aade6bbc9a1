"""Causal grouped-query attention and its gradient, beside PyTorch's scaled_dot_product_attention: flash and cuDNN.

Peers read q, k, v from the merged array, as our kernels do; the "repeated" ones get keys and values repeated for every
query head, untimed, as older versions need them. FLOPs of the gradient are 5 products, as everyone counts them: our
kernels do 7, since dq is summed apart.
"""

from collections.abc import Callable, Sequence
from typing import Any

from harness import BYTES, MODELS, B, Bench, Case, T, Work, run

from apr.config import TransformerConfig
from apr.ops.attention import attention_backward, attention_forward

FORWARD, DKV, DQ = 2, 4, 3  # products of each kernel, in units of half a T x T x HS product per head
DONE_TWICE = 2  # score and dprob, by dkv and by dq


def forward_bytes(B: int, T: int, NH: int, NKV: int, HS: int, s: int) -> int:
    return s * B * T * ((NH + 2 * NKV) * HS + NH * HS)


def backward_bytes(B: int, T: int, NH: int, NKV: int, HS: int, s: int) -> int:
    """delta, what dkv and dq read, and dqkv, which they write between them."""
    qkv, out = (NH + 2 * NKV) * HS, NH * HS
    return 2 * s * B * T * out + 2 * s * B * T * (qkv + out) + s * B * T * qkv


def forward_flops(B: int, T: int, NH: int, HS: int) -> int:
    return FORWARD * B * NH * HS * T**2


def backward_flops(B: int, T: int, NH: int, HS: int) -> int:
    return (DKV + DQ - DONE_TWICE) * B * NH * HS * T**2


def peer(p: Any, c: TransformerConfig, backend: str, qkv: Any, dout: Any = None, repeat: bool = False) -> Callable:
    """A maker of PyTorch's attention of qkv (B*T, QKV) by one backend; of its gradient where dout is given."""
    def attend(q: Any, k: Any, v: Any) -> Any:
        with p.torch.nn.attention.sdpa_kernel(getattr(p.torch.nn.attention.SDPBackend, backend)):
            return p.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not repeat)

    def make() -> Callable:
        heads = p.tensor(qkv).view(B, T, -1, c.HS).transpose(1, 2)
        q, k, v = heads.split([c.NH, c.NKV, c.NKV], dim=1)
        if repeat:
            k, v = k.repeat_interleave(c.G, dim=1), v.repeat_interleave(c.G, dim=1)
        if dout is None:
            return lambda: attend(q, k, v)
        return p.gradient(attend, [q, k, v], [p.tensor(dout).view(B, T, c.NH, c.HS).transpose(1, 2)])
    return make


def peers(c: TransformerConfig, X: str, qkv: Any, dout: Any = None) -> Callable:
    """The peers of a case by name."""
    if X == "f32":
        return lambda p: {"efficient repeated": peer(p, c, "EFFICIENT_ATTENTION", qkv, dout, repeat=True)}
    return lambda p: {"flash": peer(p, c, "FLASH_ATTENTION", qkv, dout),
                      "cudnn": peer(p, c, "CUDNN_ATTENTION", qkv, dout),
                      "cudnn repeated": peer(p, c, "CUDNN_ATTENTION", qkv, dout, repeat=True)}


def forward(name: str, c: TransformerConfig, X: str) -> Case:
    def setup(b: Bench) -> Work:
        qkv = b.random((B * T, c.QKV), X)
        out, lse = b.empty((B * T, c.NH * c.HS), X), b.empty((B, c.NH, T), "f32")
        return Work(lambda: attention_forward(b.dev, out, lse, qkv, B, T, c, scale=c.HS ** -0.5), peers(c, X, qkv))
    return Case(f"forward {name}", X, forward_bytes(B, T, c.NH, c.NKV, c.HS, BYTES[X]),
                forward_flops(B, T, c.NH, c.HS), setup, compute=True)


def backward(name: str, c: TransformerConfig, X: str) -> Case:
    def setup(b: Bench) -> Work:
        qkv, dout = b.random((B * T, c.QKV), X), b.random((B * T, c.NH * c.HS), X)
        out, lse = b.empty((B * T, c.NH * c.HS), X), b.empty((B, c.NH, T), "f32")
        dqkv, delta = b.empty((B * T, c.QKV), X), b.empty((B, c.NH, T), "f32")
        attention_forward(b.dev, out, lse, qkv, B, T, c, scale=c.HS ** -0.5)
        return Work(lambda: attention_backward(b.dev, dqkv, delta, dout, qkv, out, lse, B, T, c, scale=c.HS ** -0.5),
                    peers(c, X, qkv, dout))
    return Case(f"backward {name}", X, backward_bytes(B, T, c.NH, c.NKV, c.HS, BYTES[X]),
                backward_flops(B, T, c.NH, c.HS), setup, compute=True)


def cases() -> list[Case]:
    """Both models in bf16, the first in f32 too (kernels/attention_f32.cu)."""
    kinds = [*((name, "bf16") for name in MODELS), ("qwen2_0_5b", "f32")]
    return [make(name, MODELS[name], X) for name, X in kinds for make in (forward, backward)]


def main(argv: Sequence[str] | None = None) -> int:
    return run({"attention": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
