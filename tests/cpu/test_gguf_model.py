"""A model in a GGUF file: names, the order of q and k rows, configuration, rope scaling, what is refused."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from gguf_files import byte_level, model_source, random_arrays
from hostile_gguf import model as write_model
from models import FAMILIES

from apr.config import RopeScaling
from apr.errors import AprError, ConfigError, FormatError
from apr.formats.gguf_file import open_gguf
from apr.formats.gguf_model import open_gguf_model
from apr.formats.gguf_names import (
    adjacent_rows,
    gguf_name,
    hf_name,
    permuted_heads,
    rope_factors,
    scaling_of,
    shortest,
    split_half_rows,
)
from apr.formats.gguf_write import write_gguf
from apr.params import param_specs
from apr.presets import llama3_2_1b
from apr.reference.rope import inverse_frequencies

LLAMA, QWEN2, QWEN3 = (dataclasses.replace(FAMILIES[f], vocab_size=400) for f in ("llama", "qwen2", "qwen3"))
TOKENIZER = {"tokenizer.json": byte_level("qwen2")}


def written(tmp_path, config, arrays, dtype=None, **ids):
    """The path of this model as GGUF."""
    write_gguf(tmp_path / "m.gguf", model_source(config, arrays, TOKENIZER, **ids), dtype)
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3], ids=lambda c: c.hf_model_type)
def test_names_go_there_and_back(config):
    names = [s.name for s in param_specs(config)]
    there = [gguf_name(n) for n in names]
    assert [hf_name(n) for n in there] == names
    assert len(set(there)) == len(names)
    assert {"token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight", "blk.0.attn_norm.weight"} <= set(there)


@pytest.mark.parametrize("name", ["blk.0.attn_qkv.weight", "blk.00.attn_q.weight", "blk.0.attn_q", "token_embd.bias",
                                  "output", "blk.-1.attn_q.weight", "blk.0.attn_q.weight.x", "", "rope_freqs.weight"])
def test_names_that_are_unknown(name):
    assert hf_name(name) is None


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("rest", [(), (5,)])
def test_rows_by_index(heads, rest, rng):
    """Row 2i of a head in GGUF is row i here, row 2i + 1 is row i + HS/2."""
    size = 8
    ours = rng.standard_normal((heads * size, *rest))
    theirs = adjacent_rows(ours, heads)
    for head in range(heads):
        for i in range(size // 2):
            assert (theirs[head * size + 2 * i] == ours[head * size + i]).all()
            assert (theirs[head * size + 2 * i + 1] == ours[head * size + i + size // 2]).all()
    assert (split_half_rows(theirs, heads) == ours).all()


def test_rows_turn_one_rotation_into_the_other(rng):
    """Neighbours rotated in GGUF's order give the products of query and key that halves give in ours."""
    heads, size, theta = 2, 8, 100.0
    q, k = rng.standard_normal((2, heads * size))
    angle = 3 * theta ** (-np.arange(0, size, 2) / size)
    turn = np.exp(1j * angle)

    def halves(x):
        x = x.reshape(heads, size)
        out = (x[:, :size // 2] + 1j * x[:, size // 2:]) * turn
        return np.concatenate([out.real, out.imag], 1)

    def neighbours(x):
        x = adjacent_rows(x, heads).reshape(heads, size // 2, 2)
        out = (x[..., 0] + 1j * x[..., 1]) * turn
        return np.stack([out.real, out.imag], -1).reshape(heads, size)

    expected = (halves(q) * k.reshape(heads, size)).sum(1)
    found = (neighbours(q) * adjacent_rows(k, heads).reshape(heads, size)).sum(1)
    assert np.allclose(found, expected, rtol=1e-12)


def test_only_q_and_k_of_llama_are_reordered():
    names = [s.name for s in param_specs(LLAMA)]
    mistral = dataclasses.replace(LLAMA, hf_model_type="mistral", hf_architecture="MistralForCausalLM")
    for config in (LLAMA, mistral):  # one architecture in GGUF
        assert {n.split(".")[-2]: permuted_heads(n, config) for n in names if permuted_heads(n, config)} == {
            "q_proj": LLAMA.NH, "k_proj": LLAMA.NKV}
    for config in (QWEN2, QWEN3):
        assert not any(permuted_heads(s.name, config) for s in param_specs(config))


def test_reading_undoes_the_order(tmp_path, rng):
    arrays = random_arrays(LLAMA, rng)
    path, name = written(tmp_path, LLAMA, arrays), "model.layers.1.self_attn.k_proj.weight"
    with open_gguf(path) as raw, open_gguf_model(path) as source:
        assert (source.read(name) == arrays[name]).all()
        assert not (raw.read("blk.1.attn_k.weight") == arrays[name]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3], ids=lambda c: c.hf_model_type)
def test_model_as_stored(config, dtype, tmp_path, rng):
    arrays = random_arrays(config, rng, dtype)
    with open_gguf_model(written(tmp_path, config, arrays, eos_token_id=1)) as source:
        assert (source.config, source.format) == (config, "gguf")
        for name, a in arrays.items():
            found = source.read(name)
            assert found.dtype == (np.float32 if a.ndim == 1 else a.dtype)
            assert found.astype(np.float32).tobytes() == a.astype(np.float32).tobytes()


def test_facts_say_what_was_understood_and_from_where(tmp_path, rng):
    with open_gguf_model(written(tmp_path, LLAMA, random_arrays(LLAMA, rng), "BF16")) as source:
        facts = source.facts
    for fact in ("rope_theta 10000 from llama.rope.freq_base", "vocab_size 400 from the rows of token_embd.weight",
                 "q, k rows reordered from adjacent to split-half pairs", "stored as BF16: 16 tensors",
                 "stored as F32: 5 tensors", "head of its own: output.weight",
                 "rms_norm_eps 1e-06 from llama.attention.layer_norm_rms_epsilon"):
        assert fact in facts
    with open_gguf_model(written(tmp_path, QWEN2, random_arrays(QWEN2, rng))) as source:
        facts = source.facts
    assert "head tied to the embedding: no output.weight" in facts
    assert not any("reordered" in fact for fact in facts)


def test_ids_and_texts_become_assets(tmp_path, rng):
    texts = {**TOKENIZER, "chat_template.jinja": "{{ messages }}",
             "generation_config.json": '{"bos_token_id": 3, "eos_token_id": [1, 0], "pad_token_id": 2}'}
    write_gguf(tmp_path / "m.gguf", model_source(QWEN2, random_arrays(QWEN2, rng), texts), None)
    with open_gguf_model(tmp_path / "m.gguf") as source:
        assert source.assets["chat_template.jinja"] == "{{ messages }}"
        assert json.loads(source.assets["generation_config.json"]) == {"bos_token_id": 3, "eos_token_id": [1, 0],
                                                                       "pad_token_id": 2}
        assert source.hf_config["eos_token_id"] == [1, 0]
        settings = json.loads(source.assets["tokenizer_config.json"])
        assert (settings["eos_token"], settings["add_bos_token"]) == ("<|im_end|>", False)


@pytest.mark.parametrize("scaling", [llama3_2_1b.rope_scaling, RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)])
def test_rope_factors_are_those_of_the_reference(scaling):
    """Frequencies divided by the factors are the reference's, and the factors give the scaling back."""
    for size, theta in ((64, 5e5), (128, 5e5), (128, 1e4)):
        factors = rope_factors(scaling, theta, size)
        assert np.allclose(inverse_frequencies(size, theta, None) / factors, inverse_frequencies(size, theta, scaling),
                           rtol=1e-6)
        assert scaling_of(factors, theta, size, 8192) == scaling
        for wrong in (factors * np.float32(1.001), factors[::-1].copy(), np.full_like(factors, 8)):
            assert scaling_of(wrong, theta, size, 8192) is None
        assert scaling_of(factors, theta * 2, size, 8192) is None
        assert scaling_of(factors, theta, size, 4096) is None


def test_scaled_model(tmp_path, rng):
    for original in (8192, 16):
        scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                              original_max_position_embeddings=original)
        config = dataclasses.replace(LLAMA, rope_scaling=scaling, rope_theta=5e5, head_dim=64)
        with open_gguf_model(written(tmp_path, config, random_arrays(config, rng))) as source:
            assert source.config == config
            assert any("rope_scaling llama3, factor 8" in fact for fact in source.facts)


@pytest.mark.parametrize("value", [1e-6, 1e-5, 1e4, 5e5, 1e6, 1000000.0, 0.5, 1e38, 1e300])
def test_the_number_that_was_meant(value):
    with np.errstate(over="ignore"):
        stored = float(np.float32(value))
    assert shortest(stored if np.isfinite(stored) else value) == value


def test_number_that_float32_cannot_say_is_refused(tmp_path, rng):
    for change in ({"rms_norm_eps": 1.00000001e-5}, {"rope_theta": 16777217.0}):
        config = dataclasses.replace(QWEN2, **change)
        with pytest.raises(FormatError, match=r"epsilon|freq_base"):
            written(tmp_path, config, random_arrays(config, rng))
        assert not list(tmp_path.iterdir())


def test_the_least_keys_are_enough(tmp_path):
    """What llama.cpp computes from other keys may be absent; eps, theta and the sizes may not."""
    arch = "qwen2"
    for absent in ("attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size"):
        open_gguf_model(write_model(**{f"{arch}.{absent}": None})(tmp_path)).close()
    for absent in ("attention.layer_norm_rms_epsilon", "rope.freq_base", "block_count", "attention.head_count_kv"):
        with pytest.raises(FormatError, match=absent):
            open_gguf_model(write_model(**{f"{arch}.{absent}": None})(tmp_path))


def test_window_limits_the_length(tmp_path):
    with open_gguf_model(write_model(**{"qwen2.attention.sliding_window": 8})(tmp_path)) as source:
        assert source.config.max_position_embeddings == 8


def test_errors_close_the_file(tmp_path):
    """A refused model leaves no open file behind: an open one would warn, which is an error here."""
    for change in ({"qwen2.block_count": 2}, {"qwen2.context_length": 0}, {"general.architecture": "bert"}):
        with pytest.raises(AprError) as caught:
            open_gguf_model(write_model(**change)(tmp_path))
        assert isinstance(caught.value, FormatError | ConfigError)
