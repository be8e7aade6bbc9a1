"""The peer of decoding: the same decoder in plain PyTorch with a static cache, a step compiled as a CUDA graph.

    python benchmarks/torch_decode.py        on the CPU: tokens with the cache are those of full forward passes

Weights are Hugging Face's names to tensors, as for torch_model.py, whose layers are used. The next token never visits
the host between steps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_model import Decoder, rotate


class TorchDecoder:
    """`B` sequences of at most `S` tokens; weights and cache of `dtype`, scores and choice as F.linear gives them."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor], B: int, S: int, dtype: torch.dtype,
                 device: str, compiled: bool = True) -> None:
        self.c, self.S = config, S
        net = Decoder(config, S)
        tables = net.cos, net.sin
        net.load_state_dict(weights, strict=True)
        self.net = net.to(device, dtype).requires_grad_(False)
        self.cos, self.sin = (t.to(device) for t in tables)  # float32 whatever the weights
        shape = (B, config["num_key_value_heads"], S, config["head_dim"])
        self.cache = [[torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"] for _ in net.model["layers"]]
        self.places = torch.arange(S, device=device)
        for array in (self.cos, self.sin, self.places, *(t for pair in self.cache for t in pair)):
            torch._dynamo.mark_static_address(array)  # else a graph that writes to them is not captured
        self.one = torch.compile(self.forward, mode="reduce-overhead", dynamic=False) if compiled else self.forward

    def forward(self, ids: Tensor, pos: Tensor) -> Tensor:
        """The token (B,) after ids (B, T), which stand at pos (T,); their keys and values enter the cache."""
        model, (b, t) = self.net.model, ids.shape
        x, cos, sin = model["embed_tokens"](ids), self.cos[pos], self.sin[pos]
        mask = self.places[None, :] <= pos[:, None]
        for layer, (keys, values) in zip(model["layers"], self.cache, strict=True):
            a, h = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (p(h).view(b, t, -1, a.head_dim) for p in (a.q_proj, a.k_proj, a.v_proj))
            if hasattr(a, "q_norm"):
                q, k = a.q_norm(q), a.k_norm(k)
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
            keys.index_copy_(2, pos, k)
            values.index_copy_(2, pos, v)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
            x = x + a.o_proj(out.transpose(1, 2).reshape(b, t, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        head = model["embed_tokens"].weight if self.net.tied else self.net.lm_head.weight
        return F.linear(model["norm"](x[:, -1]), head).argmax(-1)

    def generate(self, prompts: Tensor, steps: int) -> list[Tensor]:
        """Greedy tokens (B,) after prompts (B, T), on the device."""
        with torch.no_grad():
            pos = torch.arange(prompts.shape[1], device=prompts.device)
            out = [self.forward(prompts, pos)]
            pos = pos[-1:]
            for _ in range(steps - 1):
                pos = pos + 1
                out.append(self.one(out[-1][:, None], pos).clone())
            return out


def check() -> None:
    """Raise AssertionError unless cached tokens are those of full forward passes through torch_model's own layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
             "rope_scaling": None}
    for bias, norm, tied in ((True, False, True), (False, True, False)):
        config = {**sizes, "use_bias": bias, "qk_norm": norm, "tie_word_embeddings": tied}
        torch.manual_seed(1)
        full, prompts = Decoder(config, 40).requires_grad_(False), torch.randint(0, 97, (2, 7))
        full.model["embed_tokens"].weight.mul_(0.02)  # else a tied head sees the last token in everything
        decoder = TorchDecoder(config, full.state_dict(), 2, 40, torch.float32, "cpu", compiled=False)
        got, ids = torch.stack(decoder.generate(prompts, 30), 1), prompts
        for _ in range(30):
            x = full.model["embed_tokens"](ids)
            for layer in full.model["layers"]:
                x = layer(x, full.cos[:ids.shape[1]], full.sin[:ids.shape[1]])
            head = full.model["embed_tokens"].weight if tied else full.lm_head.weight
            ids = torch.cat([ids, F.linear(full.model["norm"](x[:, -1:]), head).argmax(-1)], 1)
        assert torch.equal(got, ids[:, 7:]), "a token differs"
        assert len(set(got.flatten().tolist())) > 3, "the tokens say nothing"


if __name__ == "__main__":
    check()
    print("equal tokens")
