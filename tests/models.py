"""Small models, batches and runs that several test files train."""

import dataclasses
from pathlib import Path

import numpy as np

from apr.config import TransformerConfig, TransformerTrainConfig
from apr.data.batch import LMBatch
from apr.dtypes import BY_NAME, BY_NUMPY
from apr.formats.source import ModelSource
from apr.hf_config import to_hf
from apr.params import param_specs
from apr.presets import qwen2_0_5b, qwen3_0_6b, tiny

SIZE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
FAMILIES = {name: dataclasses.replace(base, **SIZE)
            for name, base in (("llama", tiny), ("qwen2", qwen2_0_5b), ("qwen3", qwen3_0_6b))}
SMALL: TransformerConfig = FAMILIES["qwen2"]


def train_config(**changes) -> TransformerTrainConfig:
    """A training configuration for the small models."""
    return TransformerTrainConfig(**{"lr": 1e-2, "max_steps": 20, "batch_size": 4, "max_seq_len": 16, "seed": 7,
                                     **changes})


def random_batch(seed: int, rows: int = 4, length: int = 16, vocab: int = 97) -> LMBatch:
    """A batch of random tokens."""
    return LMBatch.from_rows(np.random.default_rng(seed).integers(0, vocab, (rows, length + 1)))


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "how", "rain", "fell", "over", "old", "green", "hills",
         "while", "seven", "small", "ships", "went", "home", "by", "night", "under", "stars", "that", "no", "one",
         "had", "ever", "counted"]


def write_texts(folder, documents: int = 40) -> None:
    """A folder of small texts with some structure, enough for a few hundred rows of 16 tokens."""
    rng = np.random.default_rng(3)
    folder.mkdir()
    for i in range(documents):
        start, length = rng.integers(0, len(WORDS)), rng.integers(60, 240)
        words = [WORDS[(start + j * (1 + i % 3)) % len(WORDS)] for j in range(length)]
        (folder / f"{i:03d}.txt").write_text(" ".join(words) + ".\n")


YAML = """
model: {vocab_size: 320, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4,
  num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 64, rms_norm_eps: 1e-6, rope_theta: 1e6,
  rope_scaling: null, use_bias: true, qk_norm: false, tie_word_embeddings: true, architecture: decoder,
  hf_architecture: Qwen2ForCausalLM, hf_model_type: qwen2}
train: {lr: 5e-3, warmup_steps: 3, max_steps: 24, batch_size: 4, max_seq_len: 16, accumulation_steps: 2, seed: 11}
loop: {steps_per_epoch: 8, target_val_loss: 0.1}
val_batches: 2
allow_shard_cycle: true
"""


def source_of(config: TransformerConfig, params: dict[str, np.ndarray]) -> ModelSource:
    """A model in memory as if it had been read."""
    return ModelSource(Path("memory"), "memory", config, to_hf(config), {}, {n: a.shape for n, a in params.items()},
                       {n: BY_NUMPY[a.dtype].name for n, a in params.items()}, params.__getitem__, lambda: None)


def random_params(config: TransformerConfig, seed: int, dtype: str = "F32") -> dict[str, np.ndarray]:
    """Weights at which every constant shows: small embeddings, sharp attention, biases as large as Qwen2's."""
    rng, out = np.random.default_rng(seed), {}
    scale = {"norm.weight": 0.2, "q_proj.bias": 1.0, "k_proj.bias": 3.0, "v_proj.bias": 0.1,
             "embed_tokens.weight": 0.02, "o_proj.weight": 0.004, "down_proj.weight": 0.004}
    for spec in param_specs(config):
        size = next((s for end, s in scale.items() if spec.name.endswith(end)), 1.5 / np.sqrt(spec.shape[-1]))
        noise = size * rng.standard_normal(spec.shape, dtype=np.float32)
        out[spec.name] = (noise + spec.name.endswith("norm.weight")).astype(BY_NAME[dtype].numpy)
    return out
