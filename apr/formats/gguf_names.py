"""What differs between a model in GGUF and in Hugging Face's layout: names, the order of q and k rows, Llama 3's rope.

SOURCE  llama.cpp: gguf-py/gguf/tensor_mapping.py (names), convert_hf_to_gguf.py (rows of q and k, rope_freqs).
"""

import re
from typing import Any

import numpy as np

from apr.config import RopeScaling, TransformerConfig

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # by Hugging Face's family
ROPE_FREQS = "rope_freqs.weight"
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
         "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_OUTER_BACK = {hf: gguf for gguf, hf in OUTER.items()}
_INNER_BACK = {hf: gguf for gguf, hf in INNER.items()}
# Llama 3's scaling is kept in GGUF as its factors only; these two numbers are the same in every published model.
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_CONTEXT = 1.0, 4.0, 8192


def hf_name(name: str) -> str | None:
    """Hugging Face's name of a tensor of a GGUF file; None if there is none."""
    if layer := re.fullmatch(r"blk\.(0|[1-9][0-9]{0,4})\.([a-z_]+)\.(weight|bias)", name):
        number, stem, kind = layer.groups()
        return f"model.layers.{number}.{INNER[stem]}.{kind}" if stem in INNER else None
    stem, _, kind = name.rpartition(".")
    return f"{OUTER[stem]}.weight" if stem in OUTER and kind == "weight" else None


def gguf_name(name: str) -> str:
    """GGUF's name of a parameter. Raises KeyError for what is no parameter of these families."""
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        number, stem, kind = layer.groups()
        return f"blk.{number}.{_INNER_BACK[stem]}.{kind}"
    return _OUTER_BACK[name.removesuffix(".weight")] + ".weight"


def permuted_heads(name: str, config: TransformerConfig) -> int:
    """Heads of a parameter whose rows GGUF keeps in another order; 0 for every other parameter (Hugging Face's name).

    Architecture `llama` rotates neighbours, so q and k rows are stored in pairs; the others rotate halves as we do.
    """
    if ARCHITECTURES[config.hf_model_type] != "llama":
        return 0
    return {"q_proj": config.NH, "k_proj": config.NKV}.get(name.split(".")[-2], 0)


def adjacent_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * HS, …) from halves to pairs: row i and row i + HS/2 of each head become neighbours."""
    halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def split_half_rows(array: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of adjacent_rows."""
    pairs = array.reshape(heads, len(array) // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def rope_factors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """float32 (HS/2,): by how much each frequency is divided, which is what `rope_freqs.weight` holds."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)  # within the original context
    smooth = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)


def scaling_of(factors: np.ndarray, theta: float, head_dim: int, original: int) -> RopeScaling | None:
    """The scaling whose factors these are, to float32's rounding; None if there is none with the usual two numbers."""
    if factors.shape != (head_dim // 2,) or not factors.max(initial=0) >= 1:
        return None
    guess = RopeScaling(factor=shortest(float(factors.max())), low_freq_factor=LOW_FREQ_FACTOR,
                        high_freq_factor=HIGH_FREQ_FACTOR, original_max_position_embeddings=original)
    found = rope_factors(guess, theta, head_dim)
    return guess if np.allclose(found, factors, rtol=1e-5, atol=0) else None


def shortest(value: float) -> float:
    """The number that was meant by a float32: 1e-06, not 9.999999974752427e-07. Any other number is itself."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def one_of(value: Any, *known: Any) -> bool:
    """Whether a value of a file's metadata is one of these, type included: it may be an array, true, or a text."""
    return any(type(value) is type(k) and value == k for k in known)


def shown(value: Any) -> str:
    """A value of a file's metadata for a message; a list may hold a million texts."""
    return f"{len(value)} values" if isinstance(value, list | np.ndarray) else repr(value)[:60]
