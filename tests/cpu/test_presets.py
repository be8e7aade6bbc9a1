"""Presets against upstream's table and against known parameter counts, by arithmetic of their own."""

import pytest

from apr.config import FAMILIES
from apr.errors import ConfigError
from apr.params import param_specs, parameter_count
from apr.presets import PRESETS, llama3_2_1b, preset

# C, NH, NKV, HS, F, L, V, positions, eps, theta, tied, family. The first nine rows are upstream's TransformerConfig
# presets, the others the config.json files on Hugging Face; `demo` is ours.
TABLE = {
    "tiny": (64, 2, 2, 32, 256, 2, 1000, 512, 1e-6, 1e4, False, "llama"),
    "llama_370m": (1024, 16, 4, 64, 2816, 24, 50257, 4096, 1e-5, 1e4, True, "llama"),
    "qwen2_0_5b": (896, 14, 2, 64, 4864, 24, 151936, 32768, 1e-6, 1e6, True, "qwen2"),
    "qwen2_1_5b": (1536, 12, 2, 128, 8960, 28, 151936, 32768, 1e-6, 1e6, True, "qwen2"),
    "qwen2_7b": (3584, 28, 4, 128, 18944, 28, 152064, 32768, 1e-6, 1e6, False, "qwen2"),
    "qwen3_4b": (2560, 32, 8, 128, 9728, 36, 151936, 40960, 1e-6, 1e6, True, "qwen3"),
    "llama2_7b": (4096, 32, 32, 128, 11008, 32, 32000, 4096, 1e-6, 1e4, False, "llama"),
    "llama2_13b": (5120, 40, 40, 128, 13824, 40, 32000, 4096, 1e-6, 1e4, False, "llama"),
    "mistral_7b": (4096, 32, 8, 128, 14336, 32, 32000, 32768, 1e-5, 1e4, False, "mistral"),
    "llama3_2_1b": (2048, 32, 8, 64, 8192, 16, 128256, 131072, 1e-5, 5e5, True, "llama"),
    "smollm2_135m": (576, 9, 3, 64, 1536, 30, 49152, 8192, 1e-5, 1e5, True, "llama"),
    "qwen3_0_6b": (1024, 16, 8, 128, 3072, 28, 151936, 40960, 1e-6, 1e6, True, "qwen3"),
    "demo": (192, 6, 3, 32, 512, 4, 512, 256, 1e-6, 1e4, True, "llama"),
}
COUNTS = {
    "tiny": 259_392, "llama_370m": 322_045_952, "qwen2_0_5b": 494_032_768, "qwen2_1_5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512, "qwen3_4b": 4_022_468_096, "llama2_7b": 6_738_415_616, "llama2_13b": 13_015_864_320,
    "mistral_7b": 7_241_732_096, "llama3_2_1b": 1_235_814_400, "smollm2_135m": 134_515_008,
    "qwen3_0_6b": 596_049_920, "demo": 1_722_048,
}


def test_every_preset_is_in_the_table():
    assert PRESETS.keys() == TABLE.keys() == COUNTS.keys()


@pytest.mark.parametrize("name", TABLE)
def test_preset_is_the_table_row(name):
    p = preset(name)
    assert (p.hidden_size, p.num_attention_heads, p.num_key_value_heads, p.head_dim, p.intermediate_size,
            p.num_hidden_layers, p.vocab_size, p.max_position_embeddings, p.rms_norm_eps, p.rope_theta,
            p.tie_word_embeddings, p.hf_model_type) == TABLE[name]
    family = TABLE[name][-1]
    assert (p.use_bias, p.qk_norm) == (family == "qwen2", family == "qwen3")
    assert (p.architecture, p.hf_architecture) == ("decoder", FAMILIES[family])
    assert (p.rope_scaling is not None) == (name == "llama3_2_1b")


@pytest.mark.parametrize("name", TABLE)
def test_parameter_count(name):
    c, nh, nkv, hs, f, layers, v, *_, tied, family = TABLE[name]
    attention = c * nh * hs + 2 * c * nkv * hs + nh * hs * c
    extra = {"qwen2": (nh + 2 * nkv) * hs, "qwen3": 2 * hs}.get(family, 0)
    by_hand = v * c + layers * (attention + 3 * c * f + 2 * c + extra) + c + (0 if tied else v * c)
    assert parameter_count(preset(name)) == by_hand == COUNTS[name]


def test_untied_count_adds_the_head_once():
    assert parameter_count(preset("llama_370m"), untied=True) == 373_509_120  # INV-ARCH-370M-001: 366 to 374 million
    assert parameter_count(preset("mistral_7b"), untied=True) == COUNTS["mistral_7b"]


def test_qwen2_0_5b_has_all_its_tensors():
    """Upstream's checkpoint had 219: without the 72 biases, and with a head of its own."""
    names = [spec.name for spec in param_specs(preset("qwen2_0_5b"))]
    assert len(names) == len(set(names)) == 24 * 12 + 2 == 290
    assert sum(name.endswith(".bias") for name in names) == 72
    assert "lm_head.weight" not in names


def test_370m_keeps_upstreams_invariants():
    """INV-ARCH-370M-002 to -008."""
    p = preset("llama_370m")
    assert p.NH * p.HS == p.C and p.NH % p.NKV == 0 and p.tie_word_embeddings and p.rope_theta == 10000
    assert p.vocab_size == 50257 and not p.use_bias  # 50000 was the bug: GPT-2's tokenizer has 50257
    names = {spec.name for spec in param_specs(p)}
    assert {"model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"} <= names
    assert not any(name.endswith(".bias") for name in names)


def test_llama3_scaling_is_the_published_one():
    s = llama3_2_1b.rope_scaling
    assert (s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_position_embeddings) == (32, 1, 4, 8192)


@pytest.mark.parametrize(("name", "answer"), [
    ("qwen2_05b", "did you mean 'qwen2_0_5b'?"), ("llama370m", "did you mean 'llama_370m'?"),
    ("codebert", "known: demo, "),
    ("Tiny", "did you mean 'tiny'?"), ("__name__", "known: demo, ")])
def test_unknown_preset_is_refused_with_an_answer(name, answer):
    with pytest.raises(ConfigError, match=f"preset '{name}'") as caught:
        preset(name)
    assert answer in str(caught.value)
