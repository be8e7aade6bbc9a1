"""config.json of Hugging Face: published files as literals, both spellings, and what is refused."""

import dataclasses
import json

import pytest

from apr.config import TransformerConfig
from apr.errors import ConfigError
from apr.hf_config import ENCODERS, config_facts, from_hf, to_hf, with_dtype
from apr.presets import (
    PRESETS,
    llama2_7b,
    llama3_2_1b,
    mistral_7b,
    qwen2_0_5b,
    qwen2_7b,
    qwen3_0_6b,
    smollm2_135m,
    tiny,
)
from apr.strict import parse_json

QWEN = """"attention_dropout": 0.0, "bos_token_id": 151643, "hidden_act": "silu", "initializer_range": 0.02,
 "rms_norm_eps": 1e-06, "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false"""
# The published files (transformers v4 spelling) and what they are.
V4 = {
    "Qwen2-0.5B": ("{" + QWEN + """, "architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151643, "hidden_size": 896,
 "intermediate_size": 4864, "max_position_embeddings": 131072, "max_window_layers": 24, "model_type": "qwen2",
 "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0,
 "sliding_window": 131072, "tie_word_embeddings": true, "transformers_version": "4.40.1", "vocab_size": 151936}""",
                   dataclasses.replace(qwen2_0_5b, max_position_embeddings=131072)),
    "Qwen2.5-0.5B": ("{" + QWEN
                     + """, "architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151643, "hidden_size": 896,
 "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
 "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0,
 "use_mrope": false, "sliding_window": 32768, "tie_word_embeddings": true, "transformers_version": "4.40.1",
 "vocab_size": 151936}""",
                     qwen2_0_5b),
    "Qwen2-7B-Instruct": ("{" + QWEN + """, "architectures": ["Qwen2ForCausalLM"], "eos_token_id": 151645,
 "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
 "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
 "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false, "transformers_version": "4.41.2",
 "vocab_size": 152064}""", qwen2_7b),
    "Qwen3-0.6B": ("{" + QWEN
                   + """, "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "eos_token_id": 151645,
 "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
 "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
 "num_key_value_heads": 8, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
 "tie_word_embeddings": true, "transformers_version": "4.51.0", "vocab_size": 151936}""", qwen3_0_6b),
    "Llama-3.2-1B": ("""{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
 "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
 "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
 "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
 "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
 "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": true,
 "vocab_size": 128256}""", llama3_2_1b),
    "SmolLM2-135M": ("""{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
 "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
 "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
 "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
 "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
 "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
 "use_cache": true, "vocab_size": 49152}""", smollm2_135m),
    "Mistral-7B-v0.1": ("""{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
 "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
 "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
 "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
 "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true,
 "vocab_size": 32000}""", dataclasses.replace(mistral_7b, max_position_embeddings=4096)),  # no longer than its window
    "Llama-2-7b-hf": ("""{"_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
 "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
 "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
 "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
 "rope_scaling": null, "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "float16",
 "transformers_version": "4.36.2", "use_cache": true, "vocab_size": 32000}""",  # saved again: it had no rope_theta
                      dataclasses.replace(llama2_7b, rms_norm_eps=1e-5)),
    "TinyLlama-1.1B-Chat-v1.0": ("""{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1,
 "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
 "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
 "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
 "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": true,
 "vocab_size": 32000}""", dataclasses.replace(
        llama2_7b, rms_norm_eps=1e-5, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=2048)),
    "Mistral-7B-v0.3": ("""{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
 "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
 "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
 "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
 "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0", "use_cache": true,
 "vocab_size": 32768}""", dataclasses.replace(mistral_7b, vocab_size=32768, rope_theta=1e6)),
}


def file(name: str, drop: tuple[str, ...] = (), **changes) -> dict:
    """A published file, with keys dropped and changed."""
    values = parse_json(V4[name][0].encode(), name)
    return {k: v for k, v in values.items() if k not in drop} | changes


def in_v5(values: dict) -> dict:
    """The same model as transformers v5 spells it."""
    out = {k: v for k, v in values.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = values.get("rope_scaling") or {"rope_type": "default"}
    out["rope_parameters"] = {**rope, "rope_theta": values["rope_theta"]}
    return out | {"dtype": values["torch_dtype"], "layer_types": ["full_attention"] * values["num_hidden_layers"],
                  "transformers_version": "5.0.0", "pad_token_id": None}


def refused(values, *parts: str) -> None:
    """The file is refused in one line that names it and holds every part."""
    with pytest.raises(ConfigError) as caught:
        from_hf(values, "m/config.json")
    text = str(caught.value)
    assert text.startswith("m/config.json") and "\n" not in text
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize("name", V4)
def test_published_file_in_both_spellings(name):
    assert from_hf(file(name), name) == V4[name][1]
    assert from_hf(in_v5(file(name)), name) == V4[name][1]


@pytest.mark.parametrize("more", [
    {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "pad_token_id": 2}, {"head_dim": None},
    {"unsloth_version": "2024.9", "unsloth_fixed": True, "tokenizer_class": "GPT2Tokenizer"},
    {"max_window_layers": 28, "use_sliding_window": False, "sliding_window": None, "layer_types": None}])
def test_keys_that_tools_leave_in_published_files(more):
    assert from_hf(file("SmolLM2-135M", **more), "x") == smollm2_135m


def test_the_type_of_the_weights_follows_them():
    assert with_dtype(file("SmolLM2-135M"), "F32") == file("SmolLM2-135M", torch_dtype="float32")
    assert with_dtype(in_v5(file("Qwen3-0.6B")), "F16") == in_v5(file("Qwen3-0.6B", torch_dtype="float16"))
    assert with_dtype({"a": 1}, "F16") == {"a": 1}


@pytest.mark.parametrize("name", V4)
def test_facts_say_where_theta_comes_from(name):
    theta = f"{V4[name][1].rope_theta:.12g}"
    for values, origin in ((file(name), "config.json"), (in_v5(file(name)), "rope_parameters")):
        found = config_facts(values, from_hf(values, name))
        assert f"rope_theta {theta} from {origin}" in found
        assert any("sliding_window" in fact for fact in found) == (name == "Mistral-7B-v0.1")
        assert (f"rope scaling llama3, factor 32, from {'rope_scaling' if origin == 'config.json' else origin}" in found
                ) == (name == "Llama-3.2-1B")


@pytest.mark.parametrize("name", PRESETS)
def test_to_hf_and_back_is_the_identity(name):
    text = json.dumps(to_hf(PRESETS[name]))
    assert from_hf(parse_json(text.encode(), name), name) == PRESETS[name]


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Llama-3.2-1B", "Qwen3-0.6B"])
@pytest.mark.parametrize("key", [
    "rope_theta", "rms_norm_eps", "hidden_act", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "max_position_embeddings", "tie_word_embeddings"])
def test_what_changes_the_model_is_never_guessed(name, key):
    refused(file(name, drop=(key,)), f": {key}: ", "nothing" if key != "rope_theta" else "neither")
    refused(file(name, **{key: None}), f": {key}: ")


def test_missing_keys_that_have_a_meaning():
    without = file("Llama-3.2-1B", drop=("head_dim", "num_key_value_heads"))
    assert from_hf(without, "x") == dataclasses.replace(llama3_2_1b,
                                                        num_key_value_heads=32)  # the first Llamas had no GQA
    refused(file("Qwen2.5-0.5B", drop=("num_key_value_heads",)), "num_key_value_heads")
    refused(file("Qwen3-0.6B", drop=("head_dim",)), "head_dim")  # 1024 / 16 would be wrong
    refused(file("Llama-3.2-1B", drop=("head_dim",), num_attention_heads=33), "a multiple of num_attention_heads (33)")


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_are_refused(family):
    refused(file("Llama-3.2-1B", model_type=family), "model_type", "ARCH-007", family)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "", None, [], {}, 3, "Llama"])
def test_other_families_are_refused(family):
    refused(file("Llama-3.2-1B", model_type=family), "model_type", "llama, mistral, qwen2, qwen3")


@pytest.mark.parametrize(("key", "answer"), [
    ("rms_norm_epsilon", "'rms_norm_eps'"), ("num_kv_heads", "'num_key_value_heads'"),
    ("head_dim_override", "'head_dim'"), ("rope_base", "unknown key"), ("use_qk_norm", "unknown key"),
    ("a\nb", "a\\x0ab")])
def test_unknown_keys_are_refused_with_an_answer(key, answer):
    refused(file("Llama-3.2-1B", **{key: 1}), "unknown key", answer)


@pytest.mark.parametrize("changes", [
    {"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True}, {"attention_dropout": 0.1},
    {"use_mrope": True}, {"pretraining_tp": 2}, {"rope_interleaved": True}, {"quantization_config": {"bits": 4}},
    {"use_sliding_window": True}, {"layer_types": ["full_attention", "sliding_attention"]},
    {"layer_types": "full_attention"}, {"layer_types": 3}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    {"rope_scaling": "llama3"}, {"rope_scaling": {"factor": 2.0}}, {"rope_parameters": []},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"rope_parameters": {"rope_type": "default"}},
    {"partial_rotary_factor": 0.5}, {"is_encoder_decoder": True},
    {"rope_scaling": {"rope_type": "default", "factor": 2.0}}, {"rope_theta": "500000"}, {"rope_theta": True},
    {"rms_norm_eps": float("nan")}, {"vocab_size": "128256"}, {"num_hidden_layers": True}, {"hidden_size": 2048.0}])
def test_features_and_values_are_refused(changes):
    refused(file("Llama-3.2-1B", **changes), *(c for c in changes if c not in ("rope_parameters", "rope_scaling")))


@pytest.mark.parametrize(("rope", "part"), [
    ({"rope_type": "default", "rope_theta": 1e4}, "rope_theta: expected the same value in both spellings"),
    ({"rope_type": "llama3", "rope_theta": 1e6, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192}, "")])
def test_two_spellings_that_disagree_are_refused(rope, part):
    agreeing = {"rope_type": "default", "rope_theta": 1e6}
    scaling = {"rope_scaling": {"rope_type": "default"}}
    assert from_hf(file("Qwen2.5-0.5B", rope_parameters=agreeing, **scaling), "x") == qwen2_0_5b
    refused(file("Qwen2.5-0.5B", rope_parameters=rope, **scaling), part)


@pytest.mark.parametrize("window", ["4096", True, 0, -1, 4096.0])
def test_sliding_window_is_a_whole_number(window):
    refused(file("Mistral-7B-v0.1", sliding_window=window))


@pytest.mark.parametrize("window", [None, 32768, 100000])
def test_a_window_beyond_the_positions_changes_nothing(window):
    assert from_hf(file("Mistral-7B-v0.1", sliding_window=window), "x") == mistral_7b


@pytest.mark.parametrize("values", [None, [], "llama", 1])
def test_a_config_is_an_object(values):
    refused(values, "a JSON object")


def test_architectures_may_differ_but_the_family_decides():
    """A file says which model it is by model_type; fine-tuning tools leave odd class names behind."""
    assert isinstance(from_hf(to_hf(tiny) | {"architectures": ["Whatever"]}, "x"), TransformerConfig)
