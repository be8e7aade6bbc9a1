"""The peer: the same decoder in plain PyTorch, as a user of it would write it, for CPU and GPU. It needs no apr.

On a GPU: float32 weights under bf16 autocast, scaled_dot_product_attention, fused AdamW in two decay groups, clipping,
the usual recipe. Parameters have Hugging Face's names, so a state dict is apr's dictionary of parameters.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal grouped-query attention with split-half rotary positions, biases (Qwen2) and head norms (Qwen3)."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.head_dim = c["head_dim"]
        heads, kv = c["num_attention_heads"] * self.head_dim, c["num_key_value_heads"] * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c["hidden_size"], n, bias=c["use_bias"])
                                                 for n in (heads, kv, kv))
        self.o_proj = nn.Linear(heads, c["hidden_size"], bias=False)
        if c["qk_norm"]:
            self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, c["rms_norm_eps"]) for _ in "qk")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False) for _ in "gu")
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = Mlp(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The whole model; returns the mean loss."""

    def __init__(self, c: dict[str, Any], t: int) -> None:
        super().__init__()
        if c["rope_scaling"]:
            raise SystemExit("the PyTorch peer has no rope scaling")
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c["vocab_size"], c["hidden_size"]),
            "layers": nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"])),
            "norm": nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])})
        self.tied = c["tie_word_embeddings"]
        if not self.tied:
            self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        inv_freq = c["rope_theta"] ** (-torch.arange(0, c["head_dim"], 2, dtype=torch.float64) / c["head_dim"])
        angles = torch.outer(torch.arange(t, dtype=torch.float64), inv_freq).repeat(1, 2)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, self.cos, self.sin)
        head = self.model["embed_tokens"].weight if self.tied else self.lm_head.weight
        logits = F.linear(self.model["norm"](x), head)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x (B, heads, T, head_dim), as transformers writes them."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def make_optimizer(model: nn.Module, train: dict[str, Any], **options: Any) -> torch.optim.AdamW:
    """AdamW as apr's: matrices decayed, norms and biases not."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": train["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=train["lr"], betas=(train["beta1"], train["beta2"]), eps=train["adam_eps"], **options)


class TorchTrainer:
    """The peer's training step on cuda:0; `mode` is eager, default or reduce-overhead (torch.compile's)."""

    def __init__(self, config: dict[str, Any], train: dict[str, Any], mode: str,
                 weights: dict[str, Any] | None = None) -> None:
        self.bf16 = train["precision"] == "bf16"
        torch.set_float32_matmul_precision("high" if self.bf16 else "highest")
        with torch.device("cuda"):
            self.model = Decoder(config, train["max_seq_len"])
        if weights is not None:
            self.model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        self.optimizer = make_optimizer(self.model, train, fused=True)
        self.max_norm = train["max_grad_norm"]
        compile_mode = None if mode == "default" else mode
        self.run = self.model if mode == "eager" else torch.compile(self.model, mode=compile_mode)

    def step(self, inputs: Tensor, targets: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """One step on device tensors (B, T) int64; returns loss and gradient norm, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cuda", torch.bfloat16, enabled=self.bf16):
            loss = self.run(inputs, targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach().clone(), norm.detach().clone()
