"""Golden files from Hugging Face transformers and PyTorch on the CPU: the oracle that the NumPy reference must match.

    python -m venv /tmp/golden && /tmp/golden/bin/pip install torch transformers safetensors
    /tmp/golden/bin/python tests/golden/make_golden.py

Not run by the tests and never importing apr: the code under test must not make its own answers. The weights are random
but shaped so that every constant matters: small embeddings (eps shows), projections wide enough for sharp attention
(theta, scale and mask show), biases as large as Qwen2's, gains that are not 1, ragged targets.
"""

import hashlib
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional

HERE = Path(__file__).parent
B, T, STEPS = 3, 23, 10
SHAPE = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
         "hidden_act": "silu"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
# eps 1e-6, not 1e-8: a gradient element of 1e-9 would otherwise turn rounding into a step of full size
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 1.0}


def default_rope(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


MODELS = {
    "llama": transformers.LlamaConfig(**SHAPE, rms_norm_eps=1e-5, rope_parameters=default_rope(1e4),
                                      tie_word_embeddings=False),
    "llama3": transformers.LlamaConfig(**SHAPE, rms_norm_eps=1e-5, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SHAPE, rms_norm_eps=1e-6, rope_parameters=default_rope(1e6),
                                      tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SHAPE, rms_norm_eps=1e-6, rope_parameters=default_rope(1e6),
                                      tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SHAPE, rms_norm_eps=1e-5, rope_parameters=default_rope(1e4),
                                          sliding_window=None, tie_word_embeddings=False),
}


def fill(model: torch.nn.Module, rng: torch.Generator, branch: float = 0.004) -> None:
    """Random weights at which every constant of the model shows; `branch` scales what is added to the residual stream.
    """
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=rng)
        if name.endswith("norm.weight"):
            p.data = 1 + 0.2 * noise
        elif name.endswith(".bias"):
            p.data = {"q": 1.0, "k": 3.0, "v": 0.1}[name.split(".")[-2][0]] * noise
        elif "embed_tokens" in name:
            p.data = 0.02 * noise
        elif "o_proj" in name or "down_proj" in name:
            p.data = branch * noise  # keeps the residual stream as small as the embeddings: every norm's eps shows
        else:
            p.data = 0.15 * noise


def watch(model: torch.nn.Module, states: dict) -> None:
    """Keep what each module returns, under the names of apr's taps."""
    points = {"input_layernorm": "attn_norm", "self_attn": "attn_out", "post_attention_layernorm": "ffn_norm",
              "mlp": "ffn_out", "self_attn.q_proj": "q_bias", "self_attn.k_proj": "k_bias",
              "self_attn.v_proj": "v_bias", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "": "output"}

    def keep(name):
        def hook(_module, _inputs, output):
            states[name] = (output[0] if isinstance(output, tuple) else output).detach().clone().contiguous()
        return hook

    for i, layer in enumerate(model.model.layers):
        for path, stage in points.items():
            layer.get_submodule(path).register_forward_hook(keep(f"L{i:02d}.{stage}"))
    model.model.embed_tokens.register_forward_hook(keep("embedding"))
    model.model.norm.register_forward_hook(keep("final_norm"))


def make(name: str, config) -> dict:
    rng = torch.Generator().manual_seed(sum(map(ord, name)))
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    fill(model, rng)
    ids = torch.randint(0, SHAPE["vocab_size"], (STEPS, B, T + 1), generator=rng)
    inputs, targets = ids[..., :-1].contiguous(), ids[..., 1:].contiguous()
    targets[torch.rand(targets.shape, generator=rng) < 0.1] = -100
    out = {"inputs": inputs.int(), "targets": targets.int()}
    out |= {f"param.{n}": p.detach().clone() for n, p in model.named_parameters()}

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": ADAMW["weight_decay"]},
                               {"params": others, "weight_decay": 0.0}],
                              lr=ADAMW["lr"], betas=ADAMW["betas"], eps=ADAMW["eps"], foreach=False)
    losses, norms, states = [], [], {}
    watch(model, states)
    for step in range(STEPS):
        logits = model(input_ids=inputs[step]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), targets[step].flatten(), ignore_index=-100)
        adamw.zero_grad()
        loss.backward()
        if step == 0:
            out["logits"] = logits.detach().clone()
            out |= {f"state.{n}": s for n, s in states.items()}
            out |= {f"grad.{n}": p.grad.detach().clone() for n, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW["max_grad_norm"]).item())
        losses.append(loss.item())
        adamw.step()
    out |= {f"final.{n}": p.detach().clone() for n, p in model.named_parameters()}
    out["losses"], out["norms"] = torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)
    path = HERE / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in out.items()}, path, metadata={
        "config": config.to_json_string(use_diff=False), "adamw": json.dumps(ADAMW),
        "made_with": f"torch {torch.__version__}, transformers {transformers.__version__}"})
    print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB, losses {losses[0]:.4f} .. {losses[-1]:.4f}")
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    rows = [make(name, config) for name, config in MODELS.items()]
    (HERE / "SHA256SUMS").write_text("".join(f"{r['sha256']}  {r['file']}\n" for r in rows))
