"""One transformer layer on the GPU, numbered steps; backward walks the same numbers in reverse.

    1 attn_norm   2 qkv   3 head norm (Qwen3)   4 rope   5 attention   6 output projection   7 residual
    8 ffn_norm    9 gate, up   10 swiglu   11 down projection   12 residual

Steps 7 and 8 are one kernel, and 12 is one with the next layer's 1 (or with the final norm): a layer ends with its last
addition still to be made, from `branch` to `residual`. What backward reads is in the arena under the plan's names.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from apr.arena import Arena
from apr.buffers import PARTS
from apr.config import TransformerConfig
from apr.device import Device
from apr.dtypes import BY_NAME
from apr.gemm import Gemm
from apr.ops.attention import attention_backward, attention_forward
from apr.ops.decode_attention import kv_cache_append
from apr.ops.linear import bias_backward, linear_backward, linear_forward
from apr.ops.rmsnorm import rmsnorm_backward, rmsnorm_forward
from apr.ops.rope import HeadNorm, rope_backward, rope_forward
from apr.ops.swiglu import swiglu_backward, swiglu_forward
from apr.params import Layout
from apr.taps import Tap, tap_name


@dataclass(frozen=True)
class LayerViews:
    """A layer's weights (or gradients) as views of flat memory; q, k, v are one matrix, and so are gate, up."""

    attn_norm: Any
    qkv: Any
    qkv_bias: Any
    q_norm: Any
    k_norm: Any
    o: Any
    ffn_norm: Any
    gate_up: Any
    down: Any


def layer_views(arena: Arena, buffer: str, layout: Layout, c: TransformerConfig, layer: int) -> LayerViews:
    """The views of one layer in the flat buffer `params` or `grads`."""
    def view(name: str, *shape: int) -> Any:
        return arena.part(buffer, layout.offset(f"model.layers.{layer}.{name}"), shape)

    return LayerViews(
        view("input_layernorm.weight", c.C), view("self_attn.q_proj.weight", c.QKV, c.C),
        view("self_attn.q_proj.bias", c.QKV) if c.use_bias else None,
        view("self_attn.q_norm.weight", c.HS) if c.qk_norm else None,
        view("self_attn.k_norm.weight", c.HS) if c.qk_norm else None,
        view("self_attn.o_proj.weight", c.C, c.NH * c.HS), view("post_attention_layernorm.weight", c.C),
        view("mlp.gate_proj.weight", 2 * c.F, c.C), view("mlp.down_proj.weight", c.C, c.F))


@dataclass(frozen=True)
class Batch:
    """What a pass works with: device, products, buffers, the model's shape, and this batch's B and T.

    `slot`: where in the key/value cache the one sequence goes, if it does. `add`: gradients are added to what is in
    `grads`; else they replace it, whatever it is.
    """

    dev: Device
    gemm: Gemm
    arena: Arena
    config: TransformerConfig
    B: int
    T: int
    tap: Tap | None = None
    slot: int | None = None
    add: bool = True

    @property
    def N(self) -> int:
        """Rows."""
        return self.B * self.T

    def rows(self, name: str, width: int) -> Any:
        """A buffer as (N, width)."""
        return self.arena.rows(name, (self.N, width))

    def layer(self, name: str, index: int, *shape: int) -> Any:
        """One layer's part of a buffer, as this shape."""
        return self.arena.layer(name, index, shape)

    def residual(self, index: int) -> tuple[Any, Any]:
        """The residual stream before norm number `index`, and that norm's rstd."""
        return self.layer("residual", index, self.N, self.config.C), self.layer("rstd", index, self.N)

    def partial(self, width: int) -> Any:
        """Scratch for sums over rows."""
        return self.arena.rows("partial", (PARTS, width))

    def look(self, name: str, array: Any, *shape: int, columns: slice = slice(None)) -> None:
        """Show an array to the tap, on the host, as (B, T, …) of `shape`, some columns of it."""
        if self.tap is not None:
            self.tap(name, to_host(self.dev, array)[:, columns].reshape(self.B, self.T, *shape))

    def look_heads(self, which: str, stage: str, layer: int, qkv: Any, grad: bool = False, flat: bool = False) -> None:
        """Show the parts of a merged array of heads, in the order of `which`: "qkv", "kq", …"""
        c = self.config
        begin = {"q": 0, "k": c.NH, "v": c.NH + c.NKV}
        for p in which if self.tap is not None else "":
            count = c.NH if p == "q" else c.NKV
            shape = (count * c.HS,) if flat else (count, c.HS)
            self.look(tap_name(f"{p}_{stage}", layer, grad), qkv, *shape,
                      columns=slice(begin[p] * c.HS, (begin[p] + count) * c.HS))


def to_host(dev: Device, array: Any) -> np.ndarray:
    """A device array as float32 on the host."""
    return stored(dev, array).astype(np.float32, copy=False)


def stored(dev: Device, array: Any) -> np.ndarray:
    """A device array on the host as it is: float32, or bfloat16 bit for bit."""
    host = dev.download(array)
    return host.view(BY_NAME["BF16"].numpy) if host.dtype == np.uint16 else host


def block_forward(b: Batch, w: LayerViews, layer: int, pending: bool) -> None:
    """From the residual stream to `branch`, which is to be added to it.

    `pending`: the stream is the layer before's plus `branch`; else residual[2 layer] holds it already.
    """
    c, dev, gemm = b.config, b.dev, b.gemm
    stream, rstd = b.residual(2 * layer)
    norm, branch = b.rows("norm", c.C), b.rows("branch", c.C)
    if pending:                                                                                              # 12
        rmsnorm_forward(dev, norm, rstd, stream, b.residual(2 * layer - 1)[0], branch, w.attn_norm,
                        eps=c.rms_norm_eps)                                                                  # 1
        b.look(tap_name("output", layer - 1), stream, c.C)
    else:
        rmsnorm_forward(dev, norm, rstd, None, stream, None, w.attn_norm, eps=c.rms_norm_eps)
    b.look(tap_name("attn_norm", layer), norm, c.C)
    qkv = b.layer("qkv", layer, b.N, c.QKV)
    raw = b.layer("qkv_raw", layer, b.N, c.QKV) if c.qk_norm else qkv
    if b.tap is not None:  # the product before its bias, which is nowhere else; looking changes no bit of the rest
        aside = b.rows("dqkv", c.QKV)
        linear_forward(gemm, aside, norm, w.qkv)
        b.look_heads("qkv", "linear", layer, aside, flat=True)
    linear_forward(gemm, raw, norm, w.qkv, w.qkv_bias)                                                       # 2
    b.look_heads("qkv", "bias", layer, raw)
    cos, sin, heads = b.arena["cos"], b.arena["sin"], head_norm(b, w, layer)
    if b.tap is not None and heads is not None:  # turned by the angle 0 of a first position: the norm alone
        aside = b.rows("dqkv", c.QKV)
        rope_forward(dev, aside, raw, heads, cos, sin, 1, c)
        b.look_heads("qk", "norm", layer, aside)
    rope_forward(dev, qkv, raw, heads, cos, sin, b.T, c)                                                     # 3, 4
    b.look_heads("qk", "rope", layer, qkv)
    if b.slot is not None:
        kv_cache_append(dev, b.arena["k_cache"][layer, b.slot], b.arena["v_cache"][layer, b.slot], qkv, c)
    atty = b.layer("atty", layer, b.N, c.NH * c.HS)
    attention_forward(dev, atty, b.layer("lse", layer, b.B, c.NH, b.T), qkv, b.B, b.T, c, scale=c.HS ** -0.5)  # 5
    b.look(tap_name("attn_heads", layer), atty, c.NH * c.HS)
    linear_forward(gemm, branch, atty, w.o)                                                                  # 6
    b.look(tap_name("attn_out", layer), branch, c.C)

    middle, rstd = b.residual(2 * layer + 1)
    rmsnorm_forward(dev, norm, rstd, middle, stream, branch, w.ffn_norm, eps=c.rms_norm_eps)                 # 7, 8
    b.look(tap_name("attn_residual", layer), middle, c.C)
    b.look(tap_name("ffn_norm", layer), norm, c.C)
    gate_up, act = b.layer("gate_up", layer, b.N, 2 * c.F), b.rows("act", c.F)
    linear_forward(gemm, gate_up, norm, w.gate_up)                                                           # 9
    b.look(tap_name("ffn_gate", layer), gate_up, c.F, columns=slice(0, c.F))
    b.look(tap_name("ffn_up", layer), gate_up, c.F, columns=slice(c.F, None))
    swiglu_forward(dev, act, gate_up)                                                                        # 10
    if b.tap is not None:  # the kernel has no silu of its own to show
        gate = to_host(dev, gate_up)[:, :c.F]
        b.tap(tap_name("ffn_silu", layer), (gate / (1 + np.exp(-gate))).reshape(b.B, b.T, c.F))
    b.look(tap_name("ffn_swiglu", layer), act, c.F)
    linear_forward(gemm, branch, act, w.down)                                                                # 11
    b.look(tap_name("ffn_out", layer), branch, c.C)


def block_backward(b: Batch, w: LayerViews, dw: LayerViews, layer: int) -> None:
    """Gradient of block_forward: `dresidual` of the layer's output becomes that of its input, gate_up its own gradient.

    dw's matrices are set or added to (Batch.add), its vectors always added to.
    """
    c, dev, gemm = b.config, b.dev, b.gemm
    dresidual, norm, dnorm = b.rows("dresidual", c.C), b.rows("norm", c.C), b.rows("dnorm", c.C)
    b.look(tap_name("output", layer, True), dresidual, c.C)                                                  # 12
    b.look(tap_name("ffn_out", layer, True), dresidual, c.C)
    gate_up, act, dact = b.layer("gate_up", layer, b.N, 2 * c.F), b.rows("act", c.F), b.rows("dact", c.F)
    gemm.linear_dinp(dact, dresidual, w.down)                                                                # 11
    b.look(tap_name("ffn_swiglu", layer, True), dact, c.F)
    if b.tap is not None:
        up = to_host(dev, gate_up)[:, c.F:]
        b.tap(tap_name("ffn_silu", layer, True), (to_host(dev, dact) * up).reshape(b.B, b.T, c.F))
    swiglu_backward(dev, gate_up, act, dact, gate_up)                                                        # 10
    gemm.linear_dweight(dw.down, dresidual, act, add=b.add)                                                  # 11
    b.look(tap_name("ffn_up", layer, True), gate_up, c.F, columns=slice(c.F, None))
    b.look(tap_name("ffn_gate", layer, True), gate_up, c.F, columns=slice(0, c.F))
    gemm.linear_dinp(dnorm, gate_up, w.gate_up)                                                              # 9
    b.look(tap_name("ffn_norm", layer, True), dnorm, c.C)
    middle, rstd = b.residual(2 * layer + 1)
    rmsnorm_backward(dev, dresidual, dw.ffn_norm, norm, b.partial(c.C), dnorm, dresidual, middle, w.ffn_norm, rstd,
                     eps=c.rms_norm_eps)                                                                     # 8, 7
    gemm.linear_dweight(dw.gate_up, gate_up, norm, add=b.add)                                                # 9

    b.look(tap_name("attn_residual", layer, True), dresidual, c.C)
    b.look(tap_name("attn_out", layer, True), dresidual, c.C)
    atty, datty = b.layer("atty", layer, b.N, c.NH * c.HS), b.rows("datty", c.NH * c.HS)
    linear_backward(gemm, datty, dw.o, dresidual, atty, w.o, add=b.add)                                      # 6
    b.look(tap_name("attn_heads", layer, True), datty, c.NH * c.HS)
    qkv, dqkv = b.layer("qkv", layer, b.N, c.QKV), b.rows("dqkv", c.QKV)
    attention_backward(dev, dqkv, b.arena.rows("delta", (b.B, c.NH, b.T)), datty, qkv, atty,
                       b.layer("lse", layer, b.B, c.NH, b.T), b.B, b.T, c, scale=c.HS ** -0.5)               # 5
    b.look_heads("kq", "rope", layer, dqkv, True)
    look_turned_back(b, layer, dqkv)
    rope_backward(dev, dqkv, dw.q_norm, dw.k_norm, b.partial(2 * c.HS), dqkv,
                  b.layer("qkv_raw", layer, b.N, c.QKV) if c.qk_norm else None, head_norm(b, w, layer),
                  b.arena["cos"], b.arena["sin"], b.T, c)                                                    # 4, 3
    b.look_heads("vkq", "bias", layer, dqkv, True)
    if c.use_bias:                                                                                           # 2
        bias_backward(dev, dw.qkv_bias, b.partial(c.QKV), dqkv)
    b.look_heads("vkq", "linear", layer, dqkv, True, flat=True)
    gemm.linear_dinp(dnorm, dqkv, w.qkv)
    b.look(tap_name("attn_norm", layer, True), dnorm, c.C)
    stream, rstd = b.residual(2 * layer)
    rmsnorm_backward(dev, dresidual, dw.attn_norm, norm, b.partial(c.C), dnorm, dresidual, stream, w.attn_norm, rstd,
                     eps=c.rms_norm_eps)                                                                     # 1
    gemm.linear_dweight(dw.qkv, dqkv, norm, add=b.add)                                                       # 2


def look_turned_back(b: Batch, layer: int, dqkv: Any) -> None:
    """Show the gradients of normalised heads: those of the rotated ones, turned back here, on the host.

    The kernel goes on through the norm and keeps no such result.
    """
    if b.tap is None or not b.config.qk_norm:
        return
    c, half = b.config, b.config.HS // 2
    cos, sin = (to_host(b.dev, b.arena[name])[:b.T, None, :] for name in ("cos", "sin"))
    heads = to_host(b.dev, dqkv).reshape(b.B, b.T, -1, c.HS)
    first, second = heads[..., :half], heads[..., half:]
    back = np.concatenate([first * cos + second * sin, second * cos - first * sin], -1)
    b.tap(tap_name("k_norm", layer, True), back[:, :, c.NH:c.NH + c.NKV])
    b.tap(tap_name("q_norm", layer, True), back[:, :, :c.NH])


def head_norm(b: Batch, w: LayerViews, layer: int) -> HeadNorm | None:
    """Qwen3's weights and reciprocal norms of the heads; None for other models."""
    if not b.config.qk_norm:
        return None
    return HeadNorm(w.q_norm, w.k_norm, b.layer("head_rstd", layer, b.N, b.config.NH + b.config.NKV))
