"""One transformer layer, numbered steps; backward walks the same numbers in reverse.

    1 attn_norm   2 qkv   3 head norm (Qwen3)   4 rope   5 attention   6 output projection   7 residual
    8 ffn_norm    9 gate, up   10 swiglu   11 down projection   12 residual
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from apr.config import TransformerConfig
from apr.reference.attention import attention_backward, attention_forward
from apr.reference.linear import bias_backward, bias_forward, linear_backward, linear_forward
from apr.reference.residual import residual_backward, residual_forward
from apr.reference.rmsnorm import rmsnorm_backward, rmsnorm_forward
from apr.reference.rope import rope_backward, rope_forward
from apr.reference.swiglu import silu, swiglu_backward, swiglu_forward
from apr.taps import Tap

Arrays = Mapping[str, np.ndarray]
Tables = tuple[np.ndarray, np.ndarray]
Attend = Callable[[np.ndarray, np.ndarray, np.ndarray, float], tuple[np.ndarray, np.ndarray]]


class Weights:
    """A layer's parameters (or gradients) by short name.

    `w["q_proj.weight"]` is the layer's `model.layers.3.self_attn.q_proj.weight`.
    """

    def __init__(self, arrays: Arrays, layer: int) -> None:
        self.arrays, self.prefix = arrays, f"model.layers.{layer}."

    def __getitem__(self, name: str) -> np.ndarray:
        part = "mlp." if name.split("_")[0] in ("gate", "up", "down") else "" if "layernorm" in name else "self_attn."
        return self.arrays[self.prefix + part + name]


def block_forward(params: Arrays, config: TransformerConfig, layer: int, x: np.ndarray, tables: Tables,
                  saved: dict[str, Any] | None, tap: Tap | None, attend: Attend = attention_forward) -> np.ndarray:
    """The layer's output (B, T, C) from its input x (B, T, C).

    params by name; tables = cos, sin of rope_tables; what backward needs goes into `saved` unless it is None; tap takes
    this layer's stages; attend is step 5, another one for keys and values that are kept from earlier calls.
    """
    w, eps, (b, t, _) = Weights(params, layer), config.rms_norm_eps, x.shape
    s: dict[str, Any] = {} if saved is None else saved
    look: Tap = tap or (lambda _stage, _array: None)

    s["x"] = x
    s["attn_norm"], s["attn_rstd"] = rmsnorm_forward(x, w["input_layernorm.weight"], eps)                    # 1
    look("attn_norm", s["attn_norm"])
    heads = {}
    for p in "qkv":                                                                                           # 2
        heads[p] = linear_forward(s["attn_norm"], w[f"{p}_proj.weight"])
        look(f"{p}_linear", heads[p])
    for p in "qkv":
        if config.use_bias:
            heads[p] = bias_forward(heads[p], w[f"{p}_proj.bias"])
        heads[p] = heads[p].reshape(b, t, -1, config.HS)
        look(f"{p}_bias", heads[p])
    if config.qk_norm:                                                                                        # 3
        for p in "qk":
            s[f"{p}_raw"] = heads[p]
            heads[p], s[f"{p}_rstd"] = rmsnorm_forward(heads[p], w[f"{p}_norm.weight"], eps)
            look(f"{p}_norm", heads[p])
    for p in "qk":                                                                                            # 4
        heads[p] = rope_forward(heads[p], *tables)
        look(f"{p}_rope", heads[p])
    s.update(heads)
    mixed, s["prob"] = attend(heads["q"], heads["k"], heads["v"], config.HS ** -0.5)                         # 5
    s["attn_heads"] = mixed.reshape(b, t, -1)
    look("attn_heads", s["attn_heads"])
    out = linear_forward(s["attn_heads"], w["o_proj.weight"])                                                 # 6
    look("attn_out", out)
    s["mid"] = residual_forward(x, out)                                                                       # 7
    look("attn_residual", s["mid"])

    s["ffn_norm"], s["ffn_rstd"] = rmsnorm_forward(s["mid"], w["post_attention_layernorm.weight"], eps)      # 8
    look("ffn_norm", s["ffn_norm"])
    s["gate"] = linear_forward(s["ffn_norm"], w["gate_proj.weight"])                                          # 9
    look("ffn_gate", s["gate"])
    s["up"] = linear_forward(s["ffn_norm"], w["up_proj.weight"])
    look("ffn_up", s["up"])
    if tap is not None:
        look("ffn_silu", silu(s["gate"]))
    s["act"] = swiglu_forward(s["gate"], s["up"])                                                             # 10
    look("ffn_swiglu", s["act"])
    out = linear_forward(s["act"], w["down_proj.weight"])                                                     # 11
    look("ffn_out", out)
    out = residual_forward(s["mid"], out)                                                                     # 12
    look("output", out)
    return out


def block_backward(params: Arrays, grads: Arrays, config: TransformerConfig, layer: int, dout: np.ndarray,
                   tables: Tables, saved: dict[str, Any], tap: Tap | None) -> np.ndarray:
    """Gradient of block_forward.

    grads by name, accumulated; dout (B, T, C); saved as block_forward left it. Returns dx (B, T, C).
    """
    w, dw, s = Weights(params, layer), Weights(grads, layer), saved
    look: Tap = tap or (lambda _stage, _array: None)
    b, t, _ = dout.shape

    look("output", dout)                                                                                      # 12
    look("ffn_out", dout)
    dact = linear_backward(dw["down_proj.weight"], dout, s["act"], w["down_proj.weight"])                    # 11
    look("ffn_swiglu", dact)
    if tap is not None:
        look("ffn_silu", dact * s["up"])
    dgate, dup = swiglu_backward(dact, s["gate"], s["up"])                                                    # 10
    look("ffn_up", dup)
    look("ffn_gate", dgate)
    dnorm = linear_backward(dw["up_proj.weight"], dup, s["ffn_norm"], w["up_proj.weight"])                   # 9
    dnorm += linear_backward(dw["gate_proj.weight"], dgate, s["ffn_norm"], w["gate_proj.weight"])
    look("ffn_norm", dnorm)
    dmid = rmsnorm_backward(dw["post_attention_layernorm.weight"], dnorm, s["mid"],                           # 8
                            w["post_attention_layernorm.weight"], s["ffn_rstd"])
    dmid = residual_backward(dout, dmid)

    look("attn_residual", dmid)                                                                               # 7
    look("attn_out", dmid)
    dmixed = linear_backward(dw["o_proj.weight"], dmid, s["attn_heads"], w["o_proj.weight"])                 # 6
    look("attn_heads", dmixed)
    d = dict(zip("qkv", attention_backward(dmixed.reshape(s["q"].shape), s["q"], s["k"], s["v"], s["prob"],  # 5
                                           config.HS ** -0.5), strict=True))
    for p in "kq":                                                                                            # 4
        look(f"{p}_rope", d[p])
        d[p] = rope_backward(d[p], *tables)
    if config.qk_norm:                                                                                        # 3
        for p in "kq":
            look(f"{p}_norm", d[p])
            d[p] = rmsnorm_backward(dw[f"{p}_norm.weight"], d[p], s[f"{p}_raw"], w[f"{p}_norm.weight"], s[f"{p}_rstd"])
    for p in "vkq":                                                                                           # 2
        look(f"{p}_bias", d[p])
        d[p] = d[p].reshape(b, t, -1)
        if config.use_bias:
            bias_backward(dw[f"{p}_proj.bias"], d[p])
    dnorm = np.zeros_like(s["attn_norm"])
    for p in "vkq":
        look(f"{p}_linear", d[p])
        dnorm += linear_backward(dw[f"{p}_proj.weight"], d[p], s["attn_norm"], w[f"{p}_proj.weight"])
    look("attn_norm", dnorm)
    dx = rmsnorm_backward(dw["input_layernorm.weight"], dnorm, s["x"], w["input_layernorm.weight"], s["attn_rstd"])  # 1
    return residual_backward(dmid, dx)
