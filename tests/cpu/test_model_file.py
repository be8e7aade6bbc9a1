"""A model as an .apr file: every parameter is filled from it and every tensor of it used, or it is refused by name."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from models import FAMILIES

from apr.errors import ConfigError, FormatError
from apr.formats.apr_file import write_apr
from apr.formats.model_file import check_coverage, load_model, model_metadata, save_model
from apr.hf_config import to_hf
from apr.params import param_specs

QWEN2, LLAMA = FAMILIES["qwen2"], FAMILIES["llama"]  # biases and a tied head; neither
NORM, BIAS = "model.norm.weight", "model.layers.1.self_attn.k_proj.bias"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def arrays(config, rng):
    """Random parameters of a model."""
    return {s.name: rng.standard_normal(s.shape).astype(np.float32) for s in param_specs(config)}


@pytest.mark.parametrize("family", FAMILIES)
def test_model_round_trip(family, tmp_path, rng):
    config = FAMILIES[family]
    given = arrays(config, rng)
    save_model(tmp_path / "m.apr", config, given, "a name", '{"version": "1.0"}', 7)
    found, tensors, metadata = load_model(tmp_path / "m.apr")
    assert found == config
    assert {k: t.tobytes() for k, t in tensors.items()} == {k: a.tobytes() for k, a in given.items()}
    assert (metadata["name"], metadata["tokenizer.json"], metadata["tokenizer.eos_token_id"]) == ("a name",
            '{"version": "1.0"}', 7)
    save_model(tmp_path / "n.apr", config, given, "a name", '{"version": "1.0"}', 7)
    assert (tmp_path / "m.apr").read_bytes() == (tmp_path / "n.apr").read_bytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_model_of_another_precision_becomes_float32(dtype, tmp_path, rng):
    given = {k: a.astype(dtype) for k, a in arrays(QWEN2, rng).items()}
    save_model(tmp_path / "m.apr", QWEN2, given, "")
    _, tensors, _ = load_model(tmp_path / "m.apr")
    assert all(t.dtype == np.float32 and (t == given[k].astype(np.float32)).all() for k, t in tensors.items())


def changed(config, rng, change):
    out = arrays(config, rng)
    change(out)
    return out


def put(name, index, value):
    """A change that sets elements of a tensor."""
    return lambda a: a[name].__setitem__(index, value)


def replace(name, make):
    """A change that makes another tensor of a tensor."""
    return lambda a: a.update({name: make(a[name])})


FINITE = "expected finite values, found"
WRONG = {  # model, change, what the message says
    "missing bias": (QWEN2, lambda a: a.pop(BIAS), rf"missing \['{BIAS}'\]"),
    "missing norm": (QWEN2, lambda a: a.pop(NORM), rf"missing \['{NORM}'\]"),
    "missing head": (LLAMA, lambda a: a.pop(HEAD), rf"missing \['{HEAD}'\]"),
    "tied head given": (QWEN2, lambda a: a.update({HEAD: a[EMBED]}), rf"not used \['{HEAD}'\]"),
    "bias of a model without": (LLAMA, lambda a: a.update({BIAS: np.zeros(16, "f4")}), rf"not used \['{BIAS}'\]"),
    "extra": (LLAMA, lambda a: a.update(extra=np.zeros(1, "f4")), r"missing \[\].*not used \['extra'\]"),
    "renamed": (LLAMA, lambda a: a.update(gamma=a.pop(NORM)), rf"missing \['{NORM}'\].*not used \['gamma'\]"),
    "transposed": (LLAMA, replace(EMBED, np.transpose), rf"'{EMBED}': expected shape \[97, 32\], found \[32, 97\]"),
    "shorter": (LLAMA, replace(NORM, lambda t: t[:-1]), rf"'{NORM}': expected shape \[32\], found \[31\]"),
    "two dimensions": (LLAMA, replace(NORM, lambda t: t[None]), rf"'{NORM}': expected shape \[32\], found \[1, 32\]"),
    "whole numbers": (LLAMA, replace(NORM, np.int32), rf"'{NORM}': expected a floating-point dtype, found int32"),
    "NaN": (LLAMA, put(NORM, 5, np.nan), rf"'{NORM}': {FINITE} nan at element 5"),
    "-Inf": (LLAMA, put(EMBED, (3, 4), -np.inf), rf"'{EMBED}': {FINITE} -inf at element 100"),
    "Inf and -Inf": (LLAMA, put(NORM, [3, 4], [np.inf, -np.inf]), rf"'{NORM}': {FINITE} inf at element 3"),
    "1e300": (LLAMA, replace(NORM, lambda t: np.full(32, 1e300)), rf"'{NORM}': {FINITE} inf at element 0"),
}


@pytest.mark.parametrize(("config", "change", "says"), WRONG.values(), ids=WRONG)
def test_model_with_wrong_tensors_is_refused(config, change, says, tmp_path, rng):
    save_model(tmp_path / "m.apr", config, changed(config, rng, change), "")
    with pytest.raises(FormatError, match=says) as caught:
        load_model(tmp_path / "m.apr")
    assert "m.apr" in str(caught.value)


def test_model_of_great_values_is_no_fault(rng):
    """float32's greatest value in every element sums to more than float32 can hold, and is still finite."""
    given = changed(LLAMA, rng, lambda a: a.update({EMBED: np.full((97, 32), np.finfo(np.float32).max)}))
    assert (check_coverage(LLAMA, given, "test")[EMBED] == np.finfo(np.float32).max).all()


CONTRADICTIONS = {
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_type": 0, "num_layers": 3, "num_heads": 8, "num_kv_heads": 4,
    "head_dim": 16, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 98, "max_position_embeddings": 65,
    "architecture": "llama", "hf_architecture": "LlamaForCausalLM", "hf_model_type": "llama", "model_type": "llama",
    "param_count": 1,
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_model_that_contradicts_itself_is_refused(key, tmp_path, rng):
    """Upstream's readers see the flat keys, ours hf_config: a file that says two things would be two models."""
    metadata = {**model_metadata(QWEN2, "", None, None), key: CONTRADICTIONS[key]}
    write_apr(tmp_path / "m.apr", arrays(QWEN2, rng), metadata)
    with pytest.raises(FormatError, match=rf"m\.apr: {key}: expected .*, as in hf_config, found .*contradicts"):
        load_model(tmp_path / "m.apr")


def test_contradictions_cover_every_flat_key():
    flat = model_metadata(QWEN2, "", None, None).keys() - {"name", "version", "format", "hf_config"}
    assert flat == CONTRADICTIONS.keys()


def test_model_whose_configuration_is_another_is_refused(tmp_path, rng):
    """Tensors of a Qwen2 under the configuration of a Llama of the same sizes: its biases would be dropped."""
    other = dataclasses.replace(LLAMA, tie_word_embeddings=True)
    save_model(tmp_path / "m.apr", other, arrays(QWEN2, rng), "")
    with pytest.raises(FormatError, match=r"not used \['model\.layers\.0\.self_attn\.k_proj\.bias'"):
        load_model(tmp_path / "m.apr")


@pytest.mark.parametrize(("change", "says"), [
    ({"rope_theta": None}, r"m\.apr: hf_config: rope_theta"),
    ({"rms_norm_eps": None}, r"m\.apr: hf_config: rms_norm_eps"),
    ({"rms_norm_epsilon": 1e-6}, "did you mean 'rms_norm_eps'"),
    ({"model_type": "bert"}, "ARCH-007"),
    ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers"),
])
def test_model_with_a_bad_configuration_is_refused(change, says, tmp_path, rng):
    metadata = {**model_metadata(QWEN2, "", None, None), "hf_config": {**to_hf(QWEN2), **change}}
    write_apr(tmp_path / "m.apr", arrays(QWEN2, rng), metadata)
    with pytest.raises(ConfigError, match=says):
        load_model(tmp_path / "m.apr")


def test_file_without_a_model_is_refused(tmp_path):
    write_apr(tmp_path / "m.apr", {"a": np.zeros(3, np.float32)}, {"name": "x"})
    with pytest.raises(FormatError, match=r"m\.apr: metadata: expected 'hf_config'"):
        load_model(tmp_path / "m.apr")
