"""A model written as GGUF: bit-equal there and back, whole or not at all, read by the gguf library, and checked."""

import dataclasses
import json

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf_files import byte_level, model_source, random_arrays, sentencepiece
from models import FAMILIES

from apr.config import RopeScaling
from apr.errors import AprError, FormatError, GateError
from apr.formats import gguf_write
from apr.formats.apr_file import open_apr
from apr.formats.gguf_model import open_gguf_model
from apr.formats.gguf_write import check_gguf, write_gguf
from apr.formats.model_file import save_model

FAMILY = {name: dataclasses.replace(config, vocab_size=400) for name, config in FAMILIES.items()}
FAMILY["mistral"] = dataclasses.replace(FAMILY["llama"], hf_model_type="mistral", hf_architecture="MistralForCausalLM")
LLAMA, QWEN2 = FAMILY["llama"], FAMILY["qwen2"]
TEXTS = {"tokenizer.json": byte_level(size=390), "chat_template.jinja": "{% for m in messages %}{{ m }}{% endfor %}"}


def source(rng, config=QWEN2, texts=TEXTS, dtype=np.float32, change=lambda a: None, **ids):
    """A random model in memory."""
    arrays = random_arrays(config, rng, dtype)
    change(arrays)
    return model_source(config, arrays, texts, **ids)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["F32", "F16", "BF16"])
@pytest.mark.parametrize("family", FAMILY)
def test_apr_to_gguf_to_apr_is_bit_equal(family, dtype, tmp_path, rng):
    config = FAMILY[family]
    save_model(tmp_path / "a.apr", config, random_arrays(config, rng, dtype), "x")
    with open_apr(tmp_path / "a.apr") as f:
        given = model_source(config, f.read_all(), TEXTS)
    write_gguf(tmp_path / "m.gguf", given, None)
    check_gguf(tmp_path / "m.gguf", given, None)
    with open_gguf_model(tmp_path / "m.gguf") as back:
        assert back.config == config
        arrays = {n: back.read(n).astype(dtype) for n in back.shapes}  # vectors are F32 there
    save_model(tmp_path / "b.apr", back.config, arrays, "x")
    assert (tmp_path / "a.apr").read_bytes() == (tmp_path / "b.apr").read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_rounding_is_to_nearest_even(dtype, tmp_path, rng):
    given = source(rng)
    write_gguf(tmp_path / "m.gguf", given, dtype)
    with open_gguf_model(tmp_path / "m.gguf") as back:
        for name in given.shapes:
            exact = given.read(name).astype(np.float64)
            spacing = {"F32": 0, "F16": 2.0**-11, "BF16": 2.0**-8}[dtype] if exact.ndim > 1 else 0
            error = np.abs(back.read(name).astype(np.float64) - exact)
            assert (error <= spacing * np.abs(exact) + 2.0**-25 * (spacing > 0)).all()
            assert back.dtypes[name] == ("F32" if exact.ndim == 1 else dtype)


def test_q8_0_is_within_half_a_step_and_falls_back(tmp_path, rng):
    given = source(rng, LLAMA)
    facts = write_gguf(tmp_path / "m.gguf", given, "Q8_0")
    check_gguf(tmp_path / "m.gguf", given, "Q8_0")
    with open_gguf_model(tmp_path / "m.gguf") as back:
        kinds = {name: back.dtypes[name] for name in back.shapes}
        assert {kinds[n] for n, s in back.shapes.items() if len(s) == 1} == {"F32"}
        assert {kinds[n] for n, s in back.shapes.items() if len(s) > 1 and s[1] % 32} == {"F16"}  # down_proj: 48
        for name in [n for n, kind in kinds.items() if kind == "Q8_0"]:
            exact = given.read(name).reshape(-1, 32)
            step = np.abs(exact).max(1, keepdims=True) / 127
            assert (np.abs(back.read(name).reshape(-1, 32) - exact) <= step * (0.5 + 127 * 2.0**-11)).all()
    assert "14 matrices written as Q8_0" in facts
    assert "2 matrices written as F16" in facts
    assert any("no multiple of 32" in fact for fact in facts)


@pytest.mark.parametrize("family", FAMILY)
def test_the_gguf_library_reads_it(family, tmp_path, rng):
    """Every tensor under its name, in ggml's type, with the same bytes; every key that llama.cpp asks for."""
    given = source(rng, FAMILY[family], eos_token_id=1)
    write_gguf(tmp_path / "m.gguf", given, "F16")
    found = gguf.GGUFReader(str(tmp_path / "m.gguf"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    tensors = {t.name: t for t in found.tensors}
    for name in given.shapes:
        stem, _, kind = name.rpartition(".")
        t = tensors.pop(f"{names.get_name(stem)}.{kind}")
        assert tuple(reversed(t.shape.tolist())) == given.shapes[name]
        if family.startswith("qwen") or not ("q_proj" in name or "k_proj" in name):
            expected = given.read(name)
            assert t.data.tobytes() == expected.astype(np.float32 if expected.ndim == 1 else np.float16).tobytes()
    assert not tensors
    arch = "llama" if family == "mistral" else family
    values = {k: f.contents() for k, f in found.fields.items()}
    c = FAMILY[family]
    assert {k.removeprefix(arch + "."): v for k, v in values.items() if k.startswith(arch + ".")} == {
        "block_count": 2, "context_length": 64, "embedding_length": c.C, "feed_forward_length": c.F, "vocab_size": 400,
        "attention.head_count": c.NH, "attention.head_count_kv": c.NKV, "attention.key_length": c.HS,
        "attention.value_length": c.HS, "rope.dimension_count": c.HS, "rope.freq_base": c.rope_theta,
        "attention.layer_norm_rms_epsilon": np.float32(c.rms_norm_eps)}
    for key, value in (("general.architecture", arch), ("general.file_type", 1), ("general.quantization_version", 2),
                       ("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "gpt-2"),
                       ("tokenizer.ggml.eos_token_id", 1), ("tokenizer.ggml.add_bos_token", False),
                       ("tokenizer.chat_template", TEXTS["chat_template.jinja"])):
        assert values[key] == value, key
    assert len(values["tokenizer.ggml.tokens"]) == len(values["tokenizer.ggml.token_type"]) == 400
    assert values["tokenizer.ggml.tokens"][390:392] == ["[PAD390]", "[PAD391]"]
    assert values["tokenizer.ggml.token_type"][390] == 5


def poke(name, value):
    """A change that sets the first element of a tensor."""
    return lambda a: a[name].reshape(-1).__setitem__(0, value)


EMBED = "model.embed_tokens.weight"
STRANGE = RopeScaling(factor=8.0, low_freq_factor=2.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
MANY = '{"eos_token_id": [0, 1, 2, 3]}'
REFUSED = {  # what, arguments of source, dtype, what the message says
    "a type that is not written": ({}, "Q4_K", "llama-quantize"),
    "too great for F16": ({"change": poke(EMBED, 1e6)}, "F16", EMBED),
    "too great for Q8_0": ({"change": poke(EMBED, 1e7)}, "Q8_0", EMBED),
    "too great for BF16": ({"change": poke(EMBED, 3.4e38)}, "BF16", EMBED),
    "NaN": ({"change": poke("model.norm.weight", np.nan)}, None, "model.norm.weight"),
    "another scaling": ({"config": dataclasses.replace(LLAMA, rope_scaling=STRANGE)}, None, "rope_scaling"),
    "more tokens than rows": ({"config": dataclasses.replace(QWEN2, vocab_size=300)}, None, "vocab_size 300"),
    "four ends": ({"texts": {**TEXTS, "generation_config.json": MANY}}, None, "eos_token_id"),
    "an end that is no id": ({"eos_token_id": 400}, None, "eos_token_id"),
    "no end": ({"texts": {"tokenizer.json": byte_level(special=())}}, None, "eos_token_id"),
    "vocab.json alone": ({"texts": {"vocab.json": "{}", "merges.txt": ""}}, None, "tokenizer.json"),
    "no tokenizer at all": ({"texts": {"tokenizer.json": "{}"}}, None, "tokenizer.json"),
}


@pytest.mark.parametrize(("arguments", "dtype", "says"), REFUSED.values(), ids=REFUSED)
def test_what_gguf_cannot_say_is_refused(arguments, dtype, says, tmp_path, rng):
    """And what was there before is still there, whole."""
    (tmp_path / "m.gguf").write_bytes(b"before")
    with pytest.raises(FormatError, match=says):
        write_gguf(tmp_path / "m.gguf", source(rng, **arguments), dtype)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


def test_without_a_tokenizer(tmp_path, rng):
    given = source(rng, texts={})
    assert "no tokenizer: llama.cpp will want token ids" in write_gguf(tmp_path / "m.gguf", given, None)
    check_gguf(tmp_path / "m.gguf", given, None)
    with open_gguf_model(tmp_path / "m.gguf") as back:
        assert "no tokenizer in the file" in back.facts
        assert not back.assets


def test_what_is_left_out_is_said(tmp_path, rng):
    texts = {**TEXTS, "generation_config.json": '{"eos_token_id": 0, "top_p": 0.8}', "merges.txt": "",
             "tokenizer_config.json": json.dumps({"chat_template": [{"name": "default", "template": "a"},
                                                                    {"name": "tools", "template": "b"}]})}
    facts = write_gguf(tmp_path / "m.gguf", source(rng, texts=texts), None)
    for fact in ("not in GGUF: generation_config.json's top_p", "said by the tokens: merges.txt",
                 "not in GGUF: the chat templates other than 'default'"):
        assert fact in facts


def tampered(monkeypatch, what):
    """A writer that makes a mistake."""
    keys, plain = gguf_write.config_keys, gguf_write.converted
    if what == "eps":
        monkeypatch.setattr(gguf_write, "config_keys", lambda c, w: keys(c, w) | {
            "llama.attention.layer_norm_rms_epsilon": 1e-3})
    elif what == "rows":
        monkeypatch.setattr(gguf_write, "adjacent_rows", lambda a, heads: a)
    elif what == "last bit":
        monkeypatch.setattr(gguf_write, "converted", lambda a, kind, where: plain(
            np.nextafter(a, np.float32(9)) if "layers.1.mlp.up" in where else a, kind, where))
    else:
        texts = gguf_write.text_keys
        change = {"merges": ("tokenizer.ggml.merges", lambda m: m[:-9]), "split": ("tokenizer.ggml.pre",
                                                                                   lambda _: "smollm"),
                  "template": ("tokenizer.chat_template", lambda t: t + " "),
                  "second end": ("tokenizer.ggml.eot_token_id", lambda _: 9),
                  "end": ("tokenizer.ggml.eos_token_id", lambda _: 7)}[what]

        def changed(given):
            out, facts = texts(given)
            return {**out, change[0]: change[1](out.get(change[0]))}, facts
        monkeypatch.setattr(gguf_write, "text_keys", changed)


@pytest.mark.parametrize(("what", "says"), [
    ("eps", "configuration"), ("rows", "q_proj"), ("last bit", "layers.1.mlp.up_proj"), ("merges", "token ids"),
    ("split", "token ids"), ("template", "chat template"), ("end", "special ids"), ("second end", "special ids")])
def test_the_check_sees_every_mistake(what, says, tmp_path, rng, monkeypatch):
    given = source(rng, LLAMA)
    write_gguf(tmp_path / "m.gguf", given, None)
    assert check_gguf(tmp_path / "m.gguf", given, None)[0] == "21 of 21 tensors equal"
    with monkeypatch.context() as patch:
        tampered(patch, what)
        write_gguf(tmp_path / "m.gguf", given, None)
    with pytest.raises(GateError, match=says):
        check_gguf(tmp_path / "m.gguf", given, None)


def test_sentencepiece_model(tmp_path, rng):
    given = source(rng, LLAMA, {"tokenizer.json": sentencepiece()})
    write_gguf(tmp_path / "m.gguf", given, None)
    assert any("token ids equal" in line for line in check_gguf(tmp_path / "m.gguf", given, None))


def test_file_is_the_same_each_time(tmp_path, rng):
    given = source(rng)
    for name in ("m.gguf", "n.gguf"):
        write_gguf(tmp_path / name, given, "BF16")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "n.gguf").read_bytes()
    with pytest.raises(AprError):
        write_gguf(tmp_path / "none" / "m.gguf", given, None)
