"""Configurations: what is refused and how it is said, bounds, and the way to plain data and back."""

import dataclasses
import math

import pytest

from apr.config import RopeScaling, TransformerConfig, TransformerTrainConfig, decode, encode
from apr.errors import ConfigError
from apr.presets import PRESETS, llama3_2_1b, llama_370m, qwen2_0_5b, qwen3_0_6b, tiny

NAN, INF = math.nan, math.inf
SCALING = dataclasses.asdict(llama3_2_1b.rope_scaling)


def refused(kind, values, *parts: str) -> None:
    """decode refuses `values` in one line that names the file and holds every part."""
    with pytest.raises(ConfigError) as caught:
        decode(kind, values, "run.yaml")
    text = str(caught.value)
    assert text.startswith("run.yaml") and "\n" not in text and caught.value.exit_code == 2
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize("name", PRESETS)
def test_plain_data_and_back(name):
    assert decode(TransformerConfig, encode(PRESETS[name]), "run.yaml") == PRESETS[name]


def test_train_config_plain_data_and_back():
    config = TransformerTrainConfig(lr=3e-4, seed=2**63 - 1, max_steps=7)
    assert decode(TransformerTrainConfig, encode(config), "run.yaml") == config
    assert decode(TransformerTrainConfig, {}, "run.yaml") == TransformerTrainConfig()


def test_train_defaults_are_upstreams():
    c = TransformerTrainConfig()
    assert (c.max_grad_norm, c.precision, c.max_seq_len, c.accumulation_steps, c.warmup_steps, c.lr, c.beta1, c.beta2,
            c.weight_decay, c.seed) == (1.0, "fp32", 512, 1, 0, 1e-3, 0.9, 0.999, 0.01, 42)
    assert dataclasses.replace(c, batch_size=3, max_seq_len=5, accumulation_steps=7).tokens_per_step == 105
    assert all(f.metadata["help"] for f in dataclasses.fields(c))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(TransformerConfig)])
def test_no_field_of_a_model_has_a_default(field):
    refused(TransformerConfig, {k: v for k, v in encode(tiny).items() if k != field}, f"run.yaml: {field}: ",
            "no default")


@pytest.mark.parametrize(("key", "answer"), [
    ("num_kv_heads", "use 'num_key_value_heads'"), ("head_dim_override", "use 'head_dim'"),
    ("rms_norm_epsilon", "use 'rms_norm_eps'"), ("rope_thete", "did you mean 'rope_theta'?"),
    ("xyz", "known: architecture, "), (7, "key '7'"), ("a\nb\x1b[2J", "a\\x0ab\\x1b[2J")])
def test_unknown_key_is_refused_with_an_answer(key, answer):
    refused(TransformerConfig, {**encode(tiny), key: 1}, "unknown key", answer)


def test_unknown_key_of_rope_scaling_is_refused():
    """A silently dropped `rope_type: yarn` would train another model."""
    values = {**encode(tiny), "rope_scaling": {**SCALING, "rope_type": "yarn"}}
    refused(TransformerConfig, values, "rope_scaling", "key 'rope_type'", "unknown key")


INTEGERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings")


@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, [], NAN, 0, -1, 2**31])
@pytest.mark.parametrize("field", INTEGERS)
def test_sizes_are_whole_positive_numbers(field, value):
    refused(TransformerConfig, {**encode(tiny), field: value}, field)
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(tiny, **{field: value})


@pytest.mark.parametrize(("field", "value"), [
    ("num_key_value_heads", 3), ("num_attention_heads", 5), ("head_dim", 33), ("rms_norm_eps", 0.0),
    ("rms_norm_eps", -1e-6), ("rms_norm_eps", 0.02), ("rms_norm_eps", NAN), ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", True), ("rope_theta", 1.0), ("rope_theta", NAN), ("rope_theta", INF), ("rope_theta", False),
    ("rope_scaling", []), ("use_bias", True), ("use_bias", 0), ("qk_norm", True), ("tie_word_embeddings", "no"),
    ("tie_word_embeddings", 1), ("architecture", "encoder"), ("hf_model_type", "gpt2"),
    ("hf_architecture", "LlamaModel"), ("hf_architecture", None)])
def test_model_value_is_refused(field, value):
    base = dataclasses.replace(llama_370m, num_attention_heads=4, num_key_value_heads=2)
    refused(TransformerConfig, {**encode(base), field: value}, field if field != "num_attention_heads" else "a divisor")


def test_encoders_are_refused_by_their_rule():
    refused(TransformerConfig, {**encode(tiny), "architecture": "encoder"}, "ARCH-007")


@pytest.mark.parametrize(("base", "field"), [(qwen2_0_5b, "use_bias"), (qwen3_0_6b, "qk_norm")])
def test_a_family_cannot_lose_its_biases_or_norms(base, field):
    with pytest.raises(ConfigError, match=f"{field}: expected True"):
        dataclasses.replace(base, **{field: False})
    with pytest.raises(ConfigError, match=f"hf_architecture: expected '{base.hf_architecture}'"):
        dataclasses.replace(tiny, hf_model_type=base.hf_model_type)


@pytest.mark.parametrize(("field", "value"), [
    ("factor", 0.5), ("factor", NAN), ("factor", True), ("low_freq_factor", 0), ("low_freq_factor", 4.0),
    ("low_freq_factor", 5.0), ("high_freq_factor", 1.0), ("high_freq_factor", NAN), ("factor", "8"),
    ("original_max_position_embeddings", 0), ("original_max_position_embeddings", 8192.0)])
def test_rope_scaling_is_checked(field, value):
    refused(TransformerConfig, {**encode(llama3_2_1b), "rope_scaling": {**SCALING, field: value}}, "rope_scaling")


def test_rope_scaling_needs_every_field():
    for field in SCALING:
        values = {k: v for k, v in SCALING.items() if k != field}
        refused(TransformerConfig, {**encode(tiny), "rope_scaling": values}, field)
        with pytest.raises(TypeError, match=field):
            RopeScaling(**values)


GOOD = [("lr", 1e-9), ("lr", 1), ("lr_min", 1e-3), ("warmup_steps", 0), ("max_steps", 1), ("batch_size", 1),
        ("beta1", 0.0), ("beta2", 0.0), ("weight_decay", 0.0), ("precision", "bf16"), ("seed", 0), ("seed", 2**63 - 1),
        ("adam_eps", 1e-30)]
BAD = [("lr", 0.0), ("lr", -1.0), ("lr", NAN), ("lr", INF), ("lr_min", -1e-9), ("lr_min", 1.1e-3), ("lr_min", NAN),
       ("warmup_steps", -1), ("warmup_steps", 1.5), ("warmup_steps", True), ("warmup_steps", NAN), ("max_steps", 0),
       ("max_steps", 2.0), ("max_steps", True), ("batch_size", 0), ("batch_size", True), ("max_seq_len", 0),
       ("accumulation_steps", 0), ("accumulation_steps", 1.0), ("max_grad_norm", 0.0), ("max_grad_norm", NAN),
       ("max_grad_norm", INF), ("weight_decay", -0.01), ("weight_decay", NAN), ("weight_decay", INF), ("beta1", 1.0),
       ("beta1", -0.1), ("beta2", 1.0), ("beta2", NAN), ("adam_eps", 0.0), ("precision", "fp16"), ("precision", None),
       ("seed", -1), ("seed", 2**63), ("seed", 1.0), ("seed", True)]


@pytest.mark.parametrize(("field", "value"), GOOD)
def test_train_value_is_taken(field, value):
    assert getattr(decode(TransformerTrainConfig, {field: value}, "run.yaml"), field) == value


@pytest.mark.parametrize(("field", "value"), BAD)
def test_train_value_is_refused(field, value):
    refused(TransformerTrainConfig, {field: value}, field)
    with pytest.raises(ConfigError, match=f"config: {field}: "):
        TransformerTrainConfig(**{field: value})


@pytest.mark.parametrize("values", [None, [], "lr: 1", 3])
def test_a_config_is_a_mapping(values):
    refused(TransformerTrainConfig, values, "a mapping", type(values).__name__)


def test_symbols():
    q = qwen2_0_5b
    assert (q.V, q.C, q.F, q.L, q.NH, q.NKV, q.HS, q.G, q.QKV) == (151936, 896, 4864, 24, 14, 2, 64, 7, 18 * 64)
    assert (q.Vp, llama_370m.Vp) == (151936, 50304)  # 50257 is not a multiple of 128


def test_configs_are_frozen():
    for config, field in ((tiny, "rms_norm_eps"), (TransformerTrainConfig(), "lr")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, 1e-3)
