"""The peer of bench_train_cpu.py: the same Llama, trained by plain PyTorch eager on the CPU.

bench_train_cpu.py starts it with a Python that has torch and NumPy; by hand:

    PYTHON_WITH_TORCH benchmarks/peer_torch_cpu.py JOB

JOB is JSON: `config` (the model's shape, Hugging Face's names), `train` (AdamW and clipping), `weights` and `batches`
(.npz files), `cores`, `warmup`. Every batch is one step. Prints one line of JSON: the loss of every step, the seconds
of those after the warm-up, the process's memory, versions. Nothing of apr is imported.
"""

import json
import resource
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal grouped-query attention with split-half rotary positions."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.head_dim = c["head_dim"]
        heads, kv = c["num_attention_heads"] * self.head_dim, c["num_key_value_heads"] * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c["hidden_size"], n, bias=False) for n in (heads, kv, kv))
        self.o_proj = nn.Linear(heads, c["hidden_size"], bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
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


class Llama(nn.Module):
    """The whole model, head tied to the embedding; parameters have Hugging Face's names."""

    def __init__(self, c: dict[str, Any], t: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c["vocab_size"], c["hidden_size"]),
            "layers": nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"])),
            "norm": nn.RMSNorm(c["hidden_size"], c["rms_norm_eps"])})
        inv_freq = c["rope_theta"] ** (-torch.arange(0, c["head_dim"], 2, dtype=torch.float64) / c["head_dim"])
        angles = torch.outer(torch.arange(t, dtype=torch.float64), inv_freq).repeat(1, 2)
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x (B, heads, T, head_dim), as transformers writes them."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Train as `job` says; losses, seconds, memory, versions."""
    torch.set_num_threads(job["cores"])
    config, train = job["config"], job["train"]
    if config["rope_scaling"] or config["use_bias"] or config["qk_norm"] or not config["tie_word_embeddings"]:
        raise SystemExit("peer_torch_cpu.py has no rope scaling, bias, head norm or untied head")
    idle_mib = peak_mib()
    model = Llama(config, train["max_seq_len"])
    with np.load(job["weights"]) as weights:
        model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": train["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        lr=train["lr"], betas=(train["beta1"], train["beta2"]), eps=train["adam_eps"])
    with np.load(job["batches"]) as batches:
        inputs, targets = torch.from_numpy(batches["inputs"]), torch.from_numpy(batches["targets"])
    losses, seconds = [], []
    for x, y in zip(inputs, targets, strict=True):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds[job["warmup"]:], "idle_mib": idle_mib, "peak_mib": peak_mib(),
            "versions": f"torch {torch.__version__} eager"}


def peak_mib() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
