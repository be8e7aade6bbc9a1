"""Attention of one new token per sequence over the key/value cache, and the cache's filling: decode_attention.cu."""

from typing import Any

import numpy as np

from apr.config import TransformerConfig
from apr.device import Device
from apr.errors import UnavailableError
from apr.kernel import Baked, KernelSpec, blocks, floatx, vector_width

BAKED = ("EPS", "FLOATX", "HEADS", "HS", "NH", "NKV", "QK_NORM", "SPLITS")
ATTENTION = KernelSpec("decode_attention.cu", "decode_attention", BAKED,
                       ("out:f32*", "partial:f32*", "ticket:i32*", "k_cache:floatX*", "v_cache:floatX*",
                        "qkv:const f32*", "q_weight:const floatX*?", "k_weight:const floatX*?", "cos:const f32*",
                        "sin:const f32*", "pos_of:const i32*", "S:i32", "scale:f32"))
APPEND = KernelSpec("decode_attention.cu", "kv_cache_append", BAKED,
                    ("k_cache:floatX*", "v_cache:floatX*", "qkv:const floatX*", "S:i32", "T:i32"))
SPECS = (ATTENTION, APPEND)
HEADS = 4  # query heads of a key head that a block takes, at most
LARGEST_HEAD = 128


def decode_attention_baked(c: TransformerConfig, storage: str) -> Baked:
    """The baked values of both kernels. Raises UnavailableError for a head size that they do not cover."""
    if c.HS // vector_width(c.HS, 2 if storage == "bf16" else 4) > 32 or c.HS > LARGEST_HEAD:
        raise UnavailableError("head_dim", f"at most {LARGEST_HEAD}, and 32 vectors of a power of two", str(c.HS),
                               "use --device cpu")
    return {"EPS": float(c.rms_norm_eps), "FLOATX": storage, "HEADS": min(c.G, HEADS), "HS": c.HS, "NH": c.NH,
            "NKV": c.NKV, "QK_NORM": int(c.qk_norm), "SPLITS": splits(c)}


def splits(c: TransformerConfig) -> int:
    """Blocks that share the keys of a long sequence: together about as many as the GPU runs at once."""
    return min(64, max(8, 128 // (c.NKV * shares(c))))


def shares(c: TransformerConfig) -> int:
    """Blocks that share the query heads of a key head."""
    return blocks(c.G, HEADS)


def partial_size(c: TransformerConfig, B: int) -> int:
    """Elements of `partial`."""
    return B * c.NKV * shares(c) * splits(c) * min(c.G, HEADS) * (c.HS + 2)


def decode_attention(dev: Device, out: Any, partial: Any, ticket: Any, k_cache: Any, v_cache: Any, qkv: Any,
                     q_weight: Any, k_weight: Any, cos: Any, sin: Any, pos: Any, config: TransformerConfig, *,
                     scale: float) -> None:
    """out (B, NH*HS) f32 = attention of qkv (B, QKV) f32, at pos (B,) i32, over k_cache, v_cache (B, NKV, S, HS).

    The new keys (normalised and turned here, as the queries are) and values enter the caches at pos. q_weight, k_weight
    (HS,) for Qwen3, else None; partial (partial_size,) f32 is scratch; ticket (B, NKV, shares) i32 starts as 0.
    """
    c = config
    dev.launch(ATTENTION, decode_attention_baked(c, floatx(k_cache)), (splits(c), c.NKV * shares(c), qkv.shape[0]),
               (256,), (out, partial, ticket, k_cache, v_cache, qkv, q_weight, k_weight, cos, sin, pos,
                        np.int32(k_cache.shape[-2]), np.float32(scale)), programmatic=True)


def kv_cache_append(dev: Device, k_cache: Any, v_cache: Any, qkv: Any, config: TransformerConfig) -> None:
    """k_cache, v_cache (NKV, S, HS) of one sequence = the keys and values of qkv (T, QKV), at positions 0 to T-1."""
    c, t = config, qkv.shape[0]
    vectors = 2 * c.NKV * c.HS // vector_width(c.HS, qkv.itemsize)
    dev.launch(APPEND, decode_attention_baked(c, floatx(qkv)), (blocks(t * vectors, 256),), (256,),
               (k_cache, v_cache, qkv, np.int32(k_cache.shape[-2]), np.int32(t)))
