"""Malformed tokenizers: tokenizer.json, and the pair of vocab.json and merges.txt."""

import functools
import json

from hostile import FORMAT, NOT_FOUND, Case, put
from hostile_tensors import BAD_JSON, special_files

from apr.data.tokenizer import Tokenizer

V = 300
WORDS = "the cat sat on a mat, 'naïve' and 日本語 🙂\n" * 20


@functools.cache
def tokenizer():
    """A good byte-level tokenizer, as plain data."""
    return json.loads(Tokenizer.train([WORDS], V).json)


def json_file(**change):
    """A `write` of the good tokenizer.json, changed; `model` is merged."""
    def write(folder):
        values = {**tokenizer(), **change}
        if isinstance(change.get("model"), dict):
            values["model"] = {**tokenizer()["model"], **change["model"]}
        return put("tokenizer.json", json.dumps(values).encode())(folder)
    return write


def vocab_files(name="vocab.json", edit=dict, **files):
    """A `write` of GPT-2's pair of files: the vocabulary edited, and files (by stem) replaced or removed (None).

    The path is their folder, which bears the name of the one at fault.
    """
    def write(folder):
        path, model = folder / name, tokenizer()["model"]
        path.mkdir()
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"])
        content = {"vocab": json.dumps(edit(model["vocab"])).encode(), "merges": merges.encode(), **files}
        for stem, suffix in (("vocab", "json"), ("merges", "txt")):
            if content[stem] is not None:
                (path / f"{stem}.{suffix}").write_bytes(content[stem])
        return path
    return write


def hexadecimal(vocab):
    """The vocabulary of upstream's bug 1585, in which no text is found again."""
    return {"".join(f"\\x{byte:02x}" for byte in token.encode()): number for token, number in vocab.items()}


def replacements(key, times):
    """A normalizer or decoder that doubles a letter so many times."""
    step = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    first = [tokenizer()["decoder"]] if key == "decoders" else []
    return {"type": "Sequence", key: first + [step] * times}


MODELS = {
    "id -1": {"vocab": {"a": -1}},
    "id true": {"vocab": {"a": True}},
    "id 2^32": {"vocab": {"a": 2**32}},
    "id text": {"vocab": {"a": "1"}},
    "empty vocabulary": {"vocab": {}, "merges": []},
    "merge of unknown": {"merges": [["qq", "zz"]]},
    "merge of three": {"merges": [["a", "b", "c"]]},
    "merges are numbers": {"merges": [5]},
    "unknown token missing": {"unk_token": "nope", "vocab": {"a": 0}, "merges": []},
    "prefix, a panic": {"continuing_subword_prefix": "####"},
    "prefix inside a letter, a panic": {"continuing_subword_prefix": "é"},
    "dropout": {"dropout": 0.5},
    "dropout 2": {"dropout": 2.0},
    "model of no kind": {"type": "X"},
}
OTHER_MODELS = {
    "WordLevel": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"},
    "Unigram": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None},
    "Unigram, empty": {"type": "Unigram", "vocab": [], "unk_id": 0},
    "WordPiece": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 9},
    "null": None,
}
PARTS = {
    "charsmap, a panic": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "no decoder": {"decoder": None},
    "lowercase": {"normalizer": {"type": "Lowercase"}},
    "bad pattern": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(((("}, "behavior": "Isolated",
                                      "invert": False}},
    "version": {"version": "9.0"},
    "a field more": {"more": 1},
}
MERGES = {"three symbols": b"a b c\n", "one symbol": b"a\n", "unknown symbol": b"qq zz\n", "not UTF-8": b"a \xff\n",
          "merge into nothing known": b"t Q\n"}


def cases():
    def case(row, what, write, code=FORMAT, says="", cli=False):
        return Case(row, "tokenizer", what, write, code, says, cli)

    vocab, text = tokenizer()["model"]["vocab"], json.dumps(tokenizer()).encode()
    yield case("HEXVOCAB", "hexadecimal", vocab_files(edit=hexadecimal, merges=b""), says="hexadecimal", cli=True)
    yield case("HEXVOCAB", "hexadecimal with merges", vocab_files(edit=hexadecimal))
    without = {k: v for k, v in vocab.items() if k != "Q"}
    yield case("HEXVOCAB", "one letter missing", vocab_files(edit=lambda _: without), says="none for 1 of them")
    yield case("C1", "ids to 2^32-1", json_file(model={"vocab": {**vocab, "zzz": 2**32 - 1}}), says=str(2**32 - 1))
    yield case("C1", "ids to 2^31-1", vocab_files(edit=lambda v: {**v, "zzz": 2**31 - 1}), says=str(2**31 - 1),
               cli=True)
    yield case("C1", "an id of 2^31", vocab_files(edit=lambda v: {**v, "zzz": 2**31}))
    yield case("B7", "two tokens of one id", json_file(model={"vocab": {**vocab, "zzz": 5}}), says="each for one token")
    twice = json.dumps(vocab).encode()[:-1] + b', "the": 9, "the": 9}'
    yield case("B7", "a token twice", vocab_files(vocab=twice), says="twice")
    for what, model in MODELS.items():
        yield case("B8", what, json_file(model=model), cli=what == "prefix, a panic")
    for what, model in OTHER_MODELS.items():
        yield case("B8", f"model {what}", put("tokenizer.json", json.dumps({**tokenizer(), "model": model}).encode()))
    doubled = json_file(normalizer=replacements("normalizers", 24))
    yield case("B9", "a text doubled 24 times", doubled, says="1024", cli=True)
    yield case("B9", "a decoded text doubled 24 times", json_file(decoder=replacements("decoders", 24)), says="1024")
    yield case("B9", "a megabyte put first", json_file(normalizer={"type": "Prepend", "prepend": "x" * 2**20}))
    for what, change in PARTS.items():
        yield case("C4", what, json_file(**change))
    endless = {k: v for k, v in vocab.items() if "endoftext" not in k}
    yield case("C4", "no end of text", json_file(added_tokens=[], model={"vocab": endless}), says="end-of-text")
    for what, bad in BAD_JSON.items():
        yield case("B8", what, put("tokenizer.json", text[:-1] + b', "truncation": ' + bad + b"}"))
        yield case("B8", f"vocab.json: {what}", vocab_files(vocab=b'{"a": ' + bad + b"}"))
    for bad in (b"[]", b"5", b"null", b'"x"', b"{}"):
        yield case("B8", f"tokenizer.json {bad!r}", put("tokenizer.json", bad))
        yield case("B8", f"vocab.json {bad!r}", vocab_files(vocab=bad))
    for what, lines in MERGES.items():
        yield case("B6", f"merges.txt: {what}", vocab_files("merges.txt", merges=lines))
    yield case("B15", "no merges.txt", vocab_files(merges=None), NOT_FOUND, "merges.txt")
    for n in range(0, len(text), 97):
        yield case("B1", f"cut to {n} bytes", put("tokenizer.json", text[:n]))
    for what, write in special_files("tokenizer.json").items():
        yield case("B13", what, write, NOT_FOUND if what == "folder" else FORMAT, cli=what == "/dev/zero")
