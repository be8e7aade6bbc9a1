"""Named model shapes. Sources: the config.json of each model on Hugging Face; `tiny` and `llama_370m` are upstream's.

Two differ from those files, as upstream does: `llama2_*` have eps 1e-6 (published: 1e-5), `mistral_7b` has no window.
`demo` is what `apr pretrain --demo` trains: small enough for two cores and a minute, deep enough to be a real model.
"""

from dataclasses import replace
from typing import Any

from apr.config import FAMILIES, RopeScaling, TransformerConfig
from apr.errors import ConfigError, did_you_mean

_LLAMA3_SCALING = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                              original_max_position_embeddings=8192)


def _config(family: str, **values: Any) -> TransformerConfig:
    head = values["hidden_size"] // values["num_attention_heads"]
    common: dict[str, Any] = {
        "head_dim": head, "rope_scaling": None, "use_bias": family == "qwen2", "qk_norm": family == "qwen3",
        "architecture": "decoder", "hf_architecture": FAMILIES[family], "hf_model_type": family,
    }
    return TransformerConfig(**{**common, **values})


tiny = _config(
    "llama", vocab_size=1000, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False)
demo = _config(
    "llama", vocab_size=512, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=3, max_position_embeddings=256, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True)
llama_370m = _config(
    "llama", vocab_size=50257, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
    num_key_value_heads=4, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=True)
llama2_7b = _config(
    "llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=False)
llama2_13b = replace(
    llama2_7b, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
    num_key_value_heads=40)
llama3_2_1b = _config(
    "llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=5e5,
    rope_scaling=_LLAMA3_SCALING, tie_word_embeddings=True)
smollm2_135m = _config(
    "llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True)
mistral_7b = _config(
    "mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1e4,
    tie_word_embeddings=False)
qwen2_0_5b = _config(
    "qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True)
qwen2_1_5b = replace(
    qwen2_0_5b, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, head_dim=128)
qwen2_7b = replace(
    qwen2_0_5b, vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, head_dim=128, tie_word_embeddings=False)
qwen3_0_6b = _config(
    "qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6,
    tie_word_embeddings=True)
qwen3_4b = replace(
    qwen3_0_6b, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32)

PRESETS = {name: value for name, value in list(globals().items()) if isinstance(value, TransformerConfig)}


def preset(name: str) -> TransformerConfig:
    """The preset of exactly this name.

    Raises ConfigError listing the names, or naming the nearest one.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset '{name}'", "the name of a preset", "an unknown name", did_you_mean(name, PRESETS))
    return PRESETS[name]
