"""Tokenizers in GGUF metadata: rebuilt so that they give the ids of the tokenizer.json that they were made from."""

import dataclasses
import json

import numpy as np
import pytest
from gguf_files import byte_level, model_source, random_arrays, sentencepiece
from models import FAMILIES
from tokenizers import Tokenizer

from apr.data.tokenizer import Tokenizer as AprTokenizer
from apr.errors import FormatError
from apr.formats.gguf_keys import text_keys
from apr.formats.gguf_tokenizer import SPLITTINGS, merges_of_scores, read_tokenizer
from apr.formats.gguf_write import PROBES

V = 420
G = "tokenizer.ggml."


def keys(text, rng, **assets):
    """The metadata that the writer makes of a tokenizer.json."""
    config = dataclasses.replace(FAMILIES["qwen2"], vocab_size=V)
    return text_keys(model_source(config, random_arrays(config, rng), {"tokenizer.json": text, **assets}))[0]


def changed(text, change):
    """A tokenizer.json after `change(data)`."""
    data = json.loads(text)
    change(data)
    return json.dumps(data)


def random_texts(rng):
    """Texts of letters, digits, spaces, marks and signs of many scripts, in random order."""
    signs = [*"abcXYZ019 \n\t\r.,'\"!?-_/()=<>^~|$+é日本Жßǅ🙂\u00a0٣Ⅷ\u200dʰ", "  ", "'s", "'LL", "e\u0301",
             "<|im_end|>"]
    return ["".join(rng.choice(signs, 40)) for _ in range(60)]


@pytest.mark.parametrize("name", SPLITTINGS)
def test_rebuilt_tokenizer_gives_the_same_ids(name, rng):
    original = byte_level(name)
    metadata = {**keys(original, rng), G + "pre": name}
    rebuilt = read_tokenizer(metadata, "x")
    old, new = Tokenizer.from_str(original), Tokenizer.from_str(rebuilt.json)
    assert new.get_vocab(with_added_tokens=True) == old.get_vocab(with_added_tokens=True)  # no [PAD419]
    for as_text in (False, True):
        old.encode_special_tokens = new.encode_special_tokens = as_text
        for text in [*PROBES, *random_texts(rng)]:
            ids = old.encode(text, add_special_tokens=False).ids
            assert new.encode(text, add_special_tokens=False).ids == ids, text
            assert new.decode(ids) == old.decode(ids)
    assert json.loads(rebuilt.json)["model"]["ignore_merges"] == (name in ("llama-bpe", "llama3", "llama-v3", "tekken"))
    assert AprTokenizer.from_json(rebuilt.json.encode(), "x").eos_id == old.token_to_id("<|endoftext|>")


PIECES = {  # how each splits a text, by hand
    "gpt-2": ("I'll pay 12345  now!!\n\nOK", ["I", "'ll", " pay", " 12345", " ", " now", "!!", "\n", "\n", "OK"]),
    "smollm": ("x 1234", ["x", " ", "1", "2", "3", "4"]),
    "qwen2": ("It'S 123\n\n a.\nb", ["It", "'S", " ", "1", "2", "3", "\n\n", " a", ".\n", "b"]),
    "llama-bpe": ("It'S 12345!!\r\n x", ["It", "'S", " ", "123", "45", "!!\r\n", " x"]),
    "tekken": ("HelloWorld ABc 12/\n", ["Hello", "World", " ABc", " ", "1", "2", "/\n"]),
    "default": ("a+b=1234.x", ["a", "+", "b", "=", "123", "4", ".", "x"]),
}


@pytest.mark.parametrize("name", PIECES)
def test_texts_are_split_as_llama_cpp_splits_them(name, rng):
    text, pieces = PIECES[name]
    inner = Tokenizer.from_str(read_tokenizer({**keys(byte_level(name), rng), G + "pre": name}, "x").json)
    found = [text[a:b] for _, (a, b) in inner.pre_tokenizer.pre_tokenize_str(text)]
    assert found == pieces


def test_bos_is_put_first_only_where_the_file_says_so(rng):
    metadata = keys(byte_level(), rng)
    for said, bos, expected in ((True, 3, [3]), (False, 3, []), (None, 3, []), (False, None, [])):
        now = {**metadata, G + "add_bos_token": said, G + "bos_token_id": bos}
        found = read_tokenizer({k: v for k, v in now.items() if v is not None}, "x")
        assert Tokenizer.from_str(found.json).encode("", add_special_tokens=True).ids == expected
        assert found.add_bos == bool(expected)
    llama3 = {**keys(byte_level("llama-bpe"), rng), G + "bos_token_id": 3}
    del llama3[G + "add_bos_token"]
    assert read_tokenizer(llama3, "x").add_bos  # as llama.cpp does by itself


def starting_with(*ids):
    """A change that puts these tokens before every text."""
    def change(data):
        named = {t["id"]: t["content"] for t in data["added_tokens"]}
        first = [{"SpecialToken": {"id": named[i], "type_id": 0}} for i in ids]
        data["post_processor"] = {
            "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {named[i]: {"id": named[i], "ids": [i], "tokens": [named[i]]} for i in ids}}
    return change


def test_bos_of_the_original_is_kept(rng):
    metadata = keys(changed(byte_level(), starting_with(1)), rng)
    assert (metadata[G + "add_bos_token"], metadata[G + "bos_token_id"]) == (True, 1)
    with pytest.raises(FormatError, match="bos token alone"):
        keys(changed(byte_level(), starting_with(1, 0)), rng)
    with pytest.raises(FormatError, match="bos token alone"):
        keys(changed(byte_level(), starting_with(1)), rng, **{"generation_config.json": '{"bos_token_id": 0}'})


def test_added_tokens_are_control_or_user_defined(rng):
    def add(data):
        n = len(data["model"]["vocab"])
        data["added_tokens"].append({"id": n, "content": "<tool>", "single_word": False, "lstrip": False,
                                     "rstrip": False, "normalized": False, "special": False})

    text = changed(byte_level(), add)
    metadata = keys(text, rng)
    n = metadata[G + "tokens"].index("<tool>")
    assert metadata[G + "token_type"][[0, 1, 2, n]].tolist() == [3, 3, 1, 4]
    new = Tokenizer.from_str(read_tokenizer(metadata, "x").json)
    for sample in ("a<tool>b", "<|im_end|><tool>", " <tool> "):
        assert new.encode(sample).ids == Tokenizer.from_str(text).encode(sample).ids
    assert new.decode([n]) == "<tool>"


def normalizer(data):
    data["normalizer"] = {"type": "Lowercase"}


def pattern(data):
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"


def strips(data):
    data["added_tokens"][0]["lstrip"] = True


def decoder(data):
    data["decoder"] = {"type": "Fuse"}


@pytest.mark.parametrize(("name", "change", "says"), [
    ("gpt-2", normalizer, "Lowercase"), ("qwen2", pattern, "pre_tokenizer"), ("gpt-2", strips, "lstrip"),
    ("gpt-2", decoder, "decoder"), ("qwen2", lambda d: d.update(normalizer=None, pre_tokenizer=None), "pre_tokenizer"),
    ("qwen2", lambda d: d["model"].update(ignore_merges=True), "ignore_merges"),
    ("gpt-2", lambda d: d["model"].update(dropout=0.1), "BPE")])
def test_tokenizers_that_gguf_cannot_say_are_refused(name, change, says, rng):
    with pytest.raises(FormatError, match=says):
        keys(changed(byte_level(name), change), rng)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_rebuilt_from_scores(prefix, rng):
    original = sentencepiece(prefix)
    metadata = keys(original, rng)
    assert metadata[G + "model"] == "llama"
    assert metadata[G + "token_type"][[0, 1, 2, 3, 258, 259]].tolist() == [2, 3, 3, 6, 6, 1]
    rebuilt = read_tokenizer(metadata, "x")
    old, new = Tokenizer.from_str(original), Tokenizer.from_str(rebuilt.json)
    for text in [*PROBES, *random_texts(rng), "the cat in the", "  thethe catat", "cat<s>the"]:
        assert new.encode(text).ids == old.encode(text).ids, text
        assert new.decode(new.encode(text).ids) == old.decode(old.encode(text).ids)
    assert json.loads(rebuilt.json)["model"]["merges"] == json.loads(original)["model"]["merges"]
    assert json.loads(rebuilt.json)["model"]["merges"][:2] == [["\u2581th", "e"], ["\u2581t", "he"]]


def test_sentencepiece_with_merges_that_no_scores_give_is_refused(rng):
    with pytest.raises(FormatError, match="merges"):
        keys(changed(sentencepiece(), lambda d: d["model"]["merges"].reverse()), rng)


def test_merges_go_by_score_then_by_length():
    tokens = {t: i for i, t in enumerate(["a", "b", "c", "ab", "bc", "abc", "zz"])}
    scores = np.array([0, 0, 0, -3, -2, -1, -9], np.float32)
    assert merges_of_scores(tokens, scores) == [["ab", "c"], ["a", "bc"], ["b", "c"], ["a", "b"]]
