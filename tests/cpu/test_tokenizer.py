"""The tokenizer: any text there and back, special tokens as text, both file layouts, vocabularies that are refused."""

import json
import unicodedata
from pathlib import Path

import pytest

from apr.data import tokenizer as module
from apr.data.tokenizer import BYTES, END_OF_TEXT, PROBE, Tokenizer
from apr.errors import FormatError, NotFoundError

TEXTS = ["def add(first, second):\n    return first + second\n" * 20, "Die Größe der Wörter, naïve Köche. " * 20,
         "The quick brown fox's tail; it's 1234 times 5,678.\r\n" * 20, "日本語の文章です。🙂🙃" * 10]
SIZE = 340
GPT2_TEXT = ("I'll say: you're sure we've 1,234 things; they'd   be  fine.\n\n\tTabs\tand  trailing   \n"
             "snake_case camelCase ÀÉ 東京 x+=1;//comment 'quoted' \"double\" it's 50% off\u00a0now … — 🙂!!\r\n")


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A tokenizer of SIZE entries."""
    return Tokenizer.train(TEXTS, SIZE)


def hostile_texts() -> list[str]:
    """Every byte, every plane, everything that a tokenizer has been known to drop or to normalize."""
    bytes_as_text = bytes(range(256)).decode("latin-1")
    planes = "".join(chr(c) for c in range(0, 0x110000, 997) if not 0xD800 <= c < 0xE000)
    return ["", " ", "  ", "\n", "\r\n\r", "\t \t", "\x00", "\x00a\x00", bytes_as_text, bytes_as_text[::-1], planes,
            "a" * 1000, " " * 1000, "é", unicodedata.normalize("NFD", "éÅñ"), "👩‍👩‍👧‍👦🏳️‍🌈👍🏽", "\ufeffBOM",
            "\u202eright\u202c", "ﬁﬂ①Ⅷ", "Ġ Ċ ĉ", "▁ <0x41> <unk> <s> </s>", GPT2_TEXT, PROBE, *TEXTS, *END_OF_TEXT,
            "a<|endoftext|>b <|endoftext|>"]


@pytest.mark.parametrize("text", hostile_texts(), ids=lambda t: ascii(t[:12]))
def test_any_text_comes_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(0 <= i < trained.vocab_size for i in ids) and trained.eos_id not in ids


def test_random_text_comes_back(trained, rng):
    for _ in range(50):
        codes = rng.integers(0, [0x80, 0x800, 0x10000, 0x110000][_ % 4], 100)
        text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
        assert trained.decode(trained.encode(text)) == text


def test_end_of_text_inside_a_text_is_text(trained):
    inside = trained.encode("a<|endoftext|>b")
    assert trained.eos_id == trained.inner.token_to_id("<|endoftext|>") == trained.require_eos() == 0
    assert 0 not in inside and len(inside) > 3
    assert trained.decode([*inside, 0, *trained.encode("c")]) == "a<|endoftext|>bc"  # the real one is no text


def test_training_gives_the_size_asked_for_and_the_same_each_time(trained):
    assert trained.vocab_size == SIZE
    assert Tokenizer.train(iter(TEXTS), SIZE).sha256 == trained.sha256
    assert Tokenizer.train(TEXTS, SIZE - 1).sha256 != trained.sha256
    assert Tokenizer.train(["ab"], SIZE).vocab_size < 300  # the text allows no more


def test_batches_and_streams_give_what_encode_gives(trained, monkeypatch):
    texts = hostile_texts()
    expected = [trained.encode(t) for t in texts]
    assert trained.encode_batch(texts) == expected and trained.encode_batch([]) == []
    for at_once in (1, 3, len(texts), 1000):
        monkeypatch.setattr(module, "ENCODE_AT_ONCE", at_once)
        assert list(trained.encode_stream(iter(texts))) == expected
    assert list(trained.encode_stream([])) == []


def save(folder: Path, tokenizer: Tokenizer, **changes) -> Path:
    """tokenizer.json, with keys changed."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer.json) | changes), encoding="utf-8")
    return path


def save_gpt2(folder: Path, tokenizer: Tokenizer, vocab: dict | None = None, header: str = "#version: 0.2\n") -> Path:
    """vocab.json and merges.txt."""
    model = json.loads(tokenizer.json)["model"]
    merges = "".join(" ".join(m) + "\n" if isinstance(m, list) else m + "\n" for m in model["merges"])
    (folder / "vocab.json").write_text(json.dumps(model["vocab"] if vocab is None else vocab), encoding="utf-8")
    (folder / "merges.txt").write_text(header + merges, encoding="utf-8")
    return folder


def test_saved_and_loaded_it_is_the_same(tmp_path, trained):
    path = tmp_path / "tokenizer.json"
    path.write_text(trained.json, encoding="utf-8")
    for loaded in (Tokenizer.load(path), Tokenizer.load(tmp_path), Tokenizer.from_json(trained.json.encode(), "x")):
        assert (loaded.sha256, loaded.vocab_size, loaded.eos_id) == (trained.sha256, SIZE, 0)
        assert loaded.encode(GPT2_TEXT) == trained.encode(GPT2_TEXT)


@pytest.mark.parametrize("header", ["#version: 0.2\n", ""])
def test_vocab_and_merges_are_the_same_tokenizer(tmp_path, trained, header):
    loaded = Tokenizer.load(save_gpt2(tmp_path, trained, header=header))
    assert (loaded.vocab_size, loaded.eos_id) == (SIZE, 0)
    for text in hostile_texts():
        assert loaded.encode(text) == trained.encode(text), ascii(text[:40])
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.decode([0]) == trained.decode([0]) == ""
    assert any(len(loaded.encode(t)) < len(t.encode()) for t in TEXTS), "no merge was used"


def test_tokenizer_json_goes_before_vocab_json(tmp_path, trained):
    save_gpt2(tmp_path, Tokenizer.train(TEXTS, 300))
    save(tmp_path, trained)
    assert Tokenizer.load(tmp_path).vocab_size == SIZE


@pytest.mark.parametrize("changes", [
    {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
    {"padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<|endoftext|>"}},
    {"post_processor": {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}}}],
    ids=lambda c: next(iter(c)))
def test_settings_of_a_file_neither_cut_nor_add(tmp_path, trained, changes):
    loaded = Tokenizer.load(save(tmp_path, trained, **changes))
    assert loaded.encode(GPT2_TEXT) == trained.encode(GPT2_TEXT)
    assert loaded.encode_batch([GPT2_TEXT, "a"]) == [trained.encode(GPT2_TEXT), trained.encode("a")]


def test_a_hexadecimal_vocabulary_is_refused(tmp_path, trained):
    vocab = {f"{i:04x}" if t not in END_OF_TEXT else t: i for t,
             i in json.loads(trained.json)["model"]["vocab"].items()}
    save_gpt2(tmp_path, trained, vocab)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    with pytest.raises(FormatError, match="not in hexadecimal"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("changes", [
    {"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Whitespace"}}, {"decoder": None},
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}},
    {"normalizer": {"type": "Replace", "pattern": {"String": "\n"}, "content": " "}}], ids=str)
def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path, trained, changes):
    with pytest.raises(FormatError, match="gives any text back unchanged"):
        Tokenizer.load(save(tmp_path, trained, **changes))


def test_composed_characters_are_no_change(tmp_path, trained):
    """Qwen2's tokenizer composes accents (NFC)."""
    assert Tokenizer.load(save(tmp_path, trained, normalizer={"type": "NFC"})).vocab_size == SIZE


def without(tokenizer: Tokenizer, token: str) -> bytes:
    """The tokenizer less one token and the merges that need it."""
    values = json.loads(tokenizer.json)
    values["model"]["vocab"] = {t: i for t, i in values["model"]["vocab"].items() if t != token}
    values["model"]["merges"] = []
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] != token]
    return json.dumps(values).encode()


@pytest.mark.parametrize("byte", [sorted(BYTES[0])[i] for i in (0, 77, 255)])
def test_a_vocabulary_without_a_byte_is_refused(trained, byte):
    with pytest.raises(FormatError, match="a token for each of the 256 bytes, found none for 1 of them"):
        Tokenizer.from_json(without(trained, byte), "x")


def test_the_end_of_text_is_found_by_name_or_asked_for(trained):
    none = Tokenizer.from_json(without(trained, "<|endoftext|>"), "some.json")
    assert none.eos_id is None
    with pytest.raises(FormatError, match=r"an end-of-text token: <\|endoftext\|>, "):
        none.require_eos()
    for name in END_OF_TEXT[1:]:
        renamed = Tokenizer.from_json(trained.json.replace("<|endoftext|>", name).encode(), "x")
        assert renamed.eos_id == 0 and 0 not in renamed.encode(f"a{name}b")


@pytest.mark.parametrize("data", [b"", b"{}", b"null", b"not json", b"\xff\xfe", b'{"model": {"type": "BPE"}}', "cut"])
def test_what_is_no_tokenizer_is_refused(tmp_path, trained, data, capfd):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(trained.json.encode()[:-100] if data == "cut" else data)
    with pytest.raises(FormatError, match=r"a tokenizer\.json") as caught:
        Tokenizer.load(path)
    assert str(caught.value).startswith(str(path)) and capfd.readouterr().err == ""


@pytest.mark.parametrize(("vocab", "merges", "where"), [
    ('["a"]', "", "vocab.json"), ('{"a": "0"}', "", "vocab.json"), ('{"a": -1}', "", "vocab.json"),
    ('{"a": true}', "", "vocab.json"), ('{"a": 0, "a": 1}', "", "vocab.json"),
    (None, "a b\nonlyone\n", "merges.txt line 2"), (None, "a b c\n", "merges.txt line 1"),
    (None, "zz qq\n", "vocab.json, merges.txt"), (None, b"\xff\n", "merges.txt")])
def test_bad_vocab_and_merges_are_refused(tmp_path, trained, vocab, merges, where):
    save_gpt2(tmp_path, trained)
    if vocab is not None:
        (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_bytes(merges if isinstance(merges, bytes) else merges.encode())
    with pytest.raises(FormatError) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/{where}: ")


def test_nothing_there_is_not_found(tmp_path, trained):
    for path in (tmp_path, tmp_path / "x.json"):
        with pytest.raises(NotFoundError):
            Tokenizer.load(path)
    save_gpt2(tmp_path, trained)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(NotFoundError, match=r"tokenizer.json, or vocab.json and merges.txt"):
        Tokenizer.load(tmp_path)
