"""Attention of one new token per sequence over the cache, beside scaled_dot_product_attention over the same cache.

Ours also turns the new queries and keys, and puts keys and values into the cache; the peer finds them there, and its
queries ready. A context is the tokens attended to, the new one included.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from harness import BYTES, MODELS, Bench, Case, Work, run
from peers import EAGER

from apr.config import TransformerConfig
from apr.ops.decode_attention import decode_attention, kv_cache_append, partial_size

CONTEXTS, BATCHES, PROMPT = (128, 2000, 16000), (1, 8), 2048


def attention_bytes(T: int, NKV: int, HS: int, s: int) -> int:
    """Of one sequence."""
    return 2 * T * NKV * HS * s


def attention_flops(T: int, NH: int, HS: int) -> int:
    """Of one sequence."""
    return 4 * T * NH * HS


def attend(name: str, c: TransformerConfig, B: int, T: int, X: str) -> Case:
    def setup(b: Bench) -> Work:
        caches = [b.random((B, c.NKV, T, c.HS), X) for _ in "kv"]
        qkv, out = b.random((B, c.QKV), "f32"), b.empty((B, c.NH * c.HS), "f32")
        norms = [b.random((c.HS,), X) if c.qk_norm else None for _ in "qk"]
        tables = [b.random((T, c.HS // 2), "f32") for _ in range(2)]
        partial, ticket = b.empty((partial_size(c, B),), "f32"), b.put(np.zeros((B, c.NH), np.int32))
        pos, q = b.put(np.full(B, T - 1, np.int32)), b.random((B, c.NH, 1, c.HS), X)

        def peers(p: Any) -> Any:
            tensors = p.tensors(q, *caches)
            return {EAGER: lambda: lambda: p.functional.scaled_dot_product_attention(*tensors, enable_gqa=True)}
        return Work(lambda: decode_attention(b.dev, out, partial, ticket, *caches, qkv, *norms, *tables, pos, c,
                                             scale=c.HS ** -0.5), peers)
    return Case(f"{name} B={B} T={T}", X, B * attention_bytes(T, c.NKV, c.HS, BYTES[X]),
                B * attention_flops(T, c.NH, c.HS), setup)


def append(name: str, c: TransformerConfig, X: str) -> Case:
    """A prompt's keys and values into the cache of one sequence, beside two copies."""
    def setup(b: Bench) -> Work:
        caches = [b.random((c.NKV, PROMPT, c.HS), X) for _ in "kv"]
        qkv = b.random((PROMPT, c.QKV), X)

        def peers(p: Any) -> Any:
            k, v = p.tensors(*caches)
            _, keys, values = p.tensor(qkv).view(PROMPT, -1, c.HS).transpose(0, 1).split([c.NH, c.NKV, c.NKV])
            return {EAGER: lambda: lambda: (k.copy_(keys), v.copy_(values))}
        return Work(lambda: kv_cache_append(b.dev, *caches, qkv, c), peers)
    return Case(f"append {name}", X, 2 * attention_bytes(PROMPT, c.NKV, c.HS, BYTES[X]), 0, setup)


def cases() -> list[Case]:
    """Both models in bf16."""
    return [made for name, c in MODELS.items() for made in
            [*(attend(name, c, B, T, "bf16") for B in BATCHES for T in CONTEXTS), append(name, c, "bf16")]]


def main(argv: Sequence[str] | None = None) -> int:
    return run({"decode_attention": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
