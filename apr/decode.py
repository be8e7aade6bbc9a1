"""One decoding step on the GPU: a token of each sequence through all layers, five kernels a layer, weights read once.

    1 qkv: norm, product, bias        2 attention: head norm, rope, append to the cache, attention over it
    3 output projection, residual     4 norm, gate and up, swiglu     5 down projection, residual

then the head, and the choice of the next token, whose embedding starts the next step. Activations are float32 (there
are few); only weights and cache are of the storage type. Nothing here waits for the host, so a step is one CUDA graph.
"""

from typing import Any

import numpy as np

from apr.block import to_host
from apr.model import Model
from apr.ops.decode_attention import decode_attention
from apr.ops.decode_linear import decode_add, decode_gate_up, decode_head, decode_qkv
from apr.ops.sampling import embed, sample
from apr.params import EMBED, NORM
from apr.taps import Tap, tap_name


class Decoder:
    """Decoding steps of `net`, whose arena is of `inference_plan`. `tokens` (S, B) i32 is where the host reads them."""

    def __init__(self, net: Model, tokens: Any) -> None:
        self.net, self.dev, self.config, self.arena, self.tokens = net, net.dev, net.config, net.arena, tokens
        a, c = net.arena, net.config
        self.embedding = net.matrix("params", EMBED)
        self.head = net.matrix("params", net.head)[:c.V]
        self.final_weight = a.part("params", net.layout.offset(NORM), (c.C,))

    def start(self) -> None:
        """x = the embeddings of `token`."""
        embed(self.dev, self.arena["x"], self.arena["token"], self.embedding, self.arena["best_id"].shape[1],
              self.config)

    def forward(self, tap: Tap | None = None) -> None:
        """From x, the embeddings of `token` at `pos`, to `scores`; keys and values enter the cache."""
        dev, a, c = self.dev, self.arena, self.config
        x, qkv, heads, act, eps = a["x"], a["x_qkv"], a["x_heads"], a["x_act"], c.rms_norm_eps
        self._look(tap, "embedding", x, c.C)
        for layer, w in enumerate(self.net.weights):
            decode_qkv(dev, qkv, x, w.qkv, w.attn_norm, w.qkv_bias, eps=eps, first=layer == 0)               # 1
            self._look_qkv(tap, layer)
            decode_attention(dev, heads, a["attention_parts"], a["ticket"], a["k_cache"][layer], a["v_cache"][layer],
                             qkv, w.q_norm, w.k_norm, a["cos"], a["sin"], a["pos"], c, scale=c.HS ** -0.5)   # 2
            self._look_cache(tap, layer)
            self._look(tap, tap_name("attn_heads", layer), heads, c.NH * c.HS)
            decode_add(dev, x, heads, w.o, eps=eps)                                                          # 3
            self._look(tap, tap_name("attn_residual", layer), x, c.C)
            decode_gate_up(dev, act, x, w.gate_up, w.ffn_norm, eps=eps)                                      # 4
            self._look(tap, tap_name("ffn_swiglu", layer), act, c.F)
            decode_add(dev, x, act, w.down, eps=eps)                                                         # 5
            self._look(tap, tap_name("output", layer), x, c.C)
        decode_head(dev, a["scores"], a["best_score"], a["best_id"], x, self.head, self.final_weight, a["settings"],
                    eps=eps)
        self._look(tap, "logits", a["scores"], c.V)

    def step(self) -> None:
        """One token of every sequence: scores, the choice, and the next step's x."""
        a = self.arena
        self.forward()
        sample(self.dev, a["x"], a["token"], a["pos"], a["step"], self.tokens, a["scores"], a["best_score"],
               a["best_id"], self.embedding, a["settings"], a["odds"], self.config)

    def _look(self, tap: Tap | None, name: str, array: Any, width: int) -> None:
        if tap is not None:
            tap(name, to_host(self.dev, array).reshape(-1, 1, width))

    def _look_qkv(self, tap: Tap | None, layer: int) -> None:
        if tap is None:
            return
        c, host, begin = self.config, to_host(self.dev, self.arena["x_qkv"]), 0
        for p, heads in (("q", c.NH), ("k", c.NKV), ("v", c.NKV)):
            tap(tap_name(f"{p}_bias", layer), host[:, begin:begin + heads * c.HS].reshape(-1, 1, heads, c.HS))
            begin += heads * c.HS

    def _look_cache(self, tap: Tap | None, layer: int) -> None:
        """The keys that entered the cache: after head norm and rotation."""
        if tap is None:
            return
        cache, pos = to_host(self.dev, self.arena["k_cache"][layer]), self.dev.download(self.arena["pos"])
        tap(tap_name("k_rope", layer), np.stack([cache[b, :, p] for b, p in enumerate(pos)])[:, None])
