"""Malformed training data: token shards and their manifest, text, and corpora that no model should train on."""

import hashlib
import json
import os

import numpy as np
from hostile import CONFIG, FORMAT, GATE, INTEGRITY, NOT_FOUND, Case, put
from hostile_settings import yaml_text
from hostile_tensors import BAD_JSON, replaced, special_files
from hostile_tokenizers import WORDS, V, tokenizer

IDS = np.arange(2000) % V  # ids of a good corpus; 0 ends a document
MAX_LINE = 16 * 2**20


def shards(ids=IDS, stored="<u2", tail=b"", manifest=None, extra=None, entries=({},), **change):
    """A `write` of a folder of shards; its manifest fits, unless `entries` or `change` say otherwise or it is given."""
    def write(folder):
        path, data = folder / "shards", np.asarray(ids).astype(stored).tobytes() + tail
        path.mkdir()
        entry = {"file": "shard-0000.bin", "tokens": len(ids), "sha256": hashlib.sha256(data).hexdigest()}
        values = {"format": "apr-shards", "version": 1, "dtype": {"<u2": "u16", "<u4": "u32"}[stored],
                  "token_count": len(ids), "documents": 7, "vocab_size": V, "eos_id": 0, "tokenizer_sha256": "0" * 64,
                  "shards": [{**entry, **e} for e in entries], **change}
        files = {"shard-0000.bin": data,
                 "manifest.json": json.dumps(values).encode() if manifest is None else manifest, **(extra or {})}
        for name, content in files.items():
            (path / name).write_bytes(content)
        return path
    return write


def with_id(value, at=5):
    """Good ids with one bad one."""
    ids = IDS.astype(np.int64)
    ids[at] = value
    return ids


def shard_cases():
    def case(row, what, write, code=FORMAT, says="", cli=False):
        return Case(row, "shards", what, write, code, says, cli)

    for value in (V, V + 1, 65535):
        yield case("C3", f"u16 id {value}", shards(with_id(value)),
                   says=f"shard-0000.bin token 5: expected an id in [0, {V}), found {value}")
    for value in (-1, V, V + 1, 2**31 - 1, 2**31):
        yield case("C3", f"u32 id {value}", shards(with_id(value), "<u4"),
                   says=f"shard-0000.bin token 5: expected an id in [0, {V}), found {value % 2**32}",
                   cli=value == -1)
    yield case("C3", "the last id", shards(with_id(V, -1)), says=f"token {len(IDS) - 1}")
    yield case("C3", "headerless", put("x.bin", with_id(2**31 - 1).astype("<u4").tobytes()), says="x.bin token 5")
    yield case("C5", "empty", shards([]), says="shard-0000.bin", cli=True)
    yield case("C5", "empty, headerless", put("x.bin", b""), says="0 bytes")
    yield case("C5", "odd bytes", shards(tail=b"\0"), says=f"{2 * len(IDS) + 1} bytes")
    yield case("C5", "odd bytes, headerless", put("x.bin", bytes(6)), says="6 bytes")
    yield case("C5", "one token", shards([1]), GATE, "GATE-CORPUS-ENTROPY")
    yield case("C5", "no shards", shards(shards=[], token_count=0), says="token_count")
    yield case("ENTROPY", "one id", shards(np.full(999, 7)), GATE, "GATE-CORPUS-ENTROPY", cli=True)
    yield case("ENTROPY", "51 % one id", shards([7] * 51 + list(range(49))), GATE, "GATE-CORPUS-ENTROPY")
    yield case("ENTROPY", "one id, headerless", put("x.bin", bytes(4000)), GATE, "GATE-CORPUS-ENTROPY")
    for key, values in (("token_count", (-1, 0, 1999, 2**63, 10**400, True, 2000.0, "2000", None)),
                        ("vocab_size", (0, -1, 10**12, 2**63, True, "300")),
                        ("eos_id", (-1, V, 2**63, None, 0.0)), ("documents", ("x", None, True)),
                        ("dtype", ("u8", "i16", 5, [])), ("version", (2, True, "1", None)),
                        ("format", ("x", 5, None)), ("tokenizer_sha256", (5, None)),
                        ("shards", ({}, "x", None, [5], [None]))):
        for value in values:
            yield case("B3", f"{key} {str(value)[:9]!r}", shards(**{key: value}),
                       cli=(key, value) == ("vocab_size", 10**12))
    for key, values in (("tokens", (-1, 0, 1999, 10**400, True, "2000")), ("sha256", (5, None))):
        for value in values:
            yield case("B3", f"shard's {key} {str(value)[:9]!r}", shards(entries=[{key: value}]))
    yield case("B6", "u16 said to be u32", shards(dtype="u32"), says="2000 tokens")
    yield case("B6", "u32 said to be u16", shards(stored="<u4", dtype="u16"), says="2000 tokens")
    for name in ("../x.bin", "/etc/passwd", "a/../../b.bin", "a/b.bin", "..", ".", "", "a\0b", "n" * 300, "é.bin",
                 "a\nb", ".hidden.bin", 5, None):
        yield case("B10", f"shard named {str(name)[:15]!r}", shards(entries=[{"file": name}]), says="manifest.json",
                   cli=name == "../x.bin")
    yield case("B10", "a shard twice", shards(entries=[{}, {}], token_count=2 * len(IDS)), says="each once")
    yield case("B10", "a shard that is not there", shards(entries=[{"file": "shard-0001.bin"}]), NOT_FOUND,
               "shard-0001.bin")
    changed = put("shard-0000.bin", with_id(6).astype("<u2").tobytes())
    yield case("A8", "an id changed", replaced(shards(), "shard-0000.bin", changed), INTEGRITY, "SHA-256", cli=True)
    beside = shards(extra={"tokenizer.json": json.dumps(tokenizer()).encode()})
    yield case("C4", "another tokenizer beside them", beside, says="of this tokenizer", cli=True)
    for n in range(0, 300, 7):
        yield case("B1", f"manifest cut to {n} bytes", lambda folder, n=n: cut(shards()(folder), "manifest.json", n),
                   says="manifest.json")
    for n in (1, 2, 1998, 3998, 3999):
        yield case("B1", f"shard cut to {n} bytes", lambda folder, n=n: cut(shards()(folder), "shard-0000.bin", n),
                   says="shard-0000.bin", cli=n == 1998)
    yield case("B14", "two more tokens", shards(tail=bytes(4)), says="2002")
    for what, text in BAD_JSON.items():
        yield case("B8", f"manifest: {what}", shards(manifest=b'{"format": ' + text + b"}"), says="manifest.json")
    for name in ("manifest.json", "shard-0000.bin"):
        for what, write in special_files(name).items():
            yield case("B13", f"{name} is {what}", replaced(shards(), name, write), says=name,
                       cli=(name, what) in (("manifest.json", "FIFO"), ("shard-0000.bin", "/dev/zero")))


def cut(path, name, n):
    (path / name).write_bytes((path / name).read_bytes()[:n])
    return path


def endless_line(folder):
    """A line of 256 MB, sparse on the disk: it must not be read to its end."""
    path = put("x.jsonl", b'{"content": "')(folder)
    os.truncate(path, 2**28)
    return path


def text_cases():
    def case(row, what, name, data, says="", cli=False):
        return Case(row, "text", what, put(name, data), FORMAT, says, cli)

    yield case("C9", "not UTF-8", "x.txt", b"hello \xff world", "byte 0xff at offset 6", cli=True)
    yield case("C9", "cut in a letter", "x.txt", "é".encode()[:1], "offset 0")
    yield case("C9", "surrogate", "x.txt", b"a\xed\xa0\x80", "offset 1")
    yield case("C9", "UTF-16", "x.txt", "hello".encode("utf-16"))
    yield case("C9", "zero byte", "x.txt", b"hello\0", "offset 5")
    yield case("C9", "empty", "x.txt", b"", "empty")
    yield case("C9", "a line of 16 MB", "x.jsonl", lambda: b'{"content": "' + b"a" * MAX_LINE + b'"}\n',
               f"at most {MAX_LINE} bytes")
    yield Case("C9", "text", "a line of 256 MB", endless_line, FORMAT, f"at most {MAX_LINE} bytes", cli=True)
    first = b'{"content": "x"}\n'
    for what, line in (("a list", b"[]"), ("a number", b"5"), ("no content", b'{"text": "x"}'),
                       ("content null", b'{"content": null}'), ("content a number", b'{"content": 5}'),
                       *((w, b'{"content": ' + t + b"}") for w, t in BAD_JSON.items() if w != "key twice"),
                       ("key twice", b'{"content": "x", "content": "y"}')):
        yield case("B8", f"JSONL: {what}", "x.jsonl", first + line + b"\n", "x.jsonl line 2", cli=what == "no content")
    for name in ("x.txt", "x.jsonl"):
        for what, write in special_files(name).items():
            if what not in ("folder", "empty") and (name, what) not in (("x.txt", "HTML"), ("x.txt", "LFS pointer")):
                yield Case("B13", "text", f"{name} is {what}", write, FORMAT)


def corpus(files=lambda folder: None, vocab=320, **names):
    """A `write` of the configuration of a run on these data; text and tokenizer are good unless others are named."""
    def write(folder):
        files(folder)
        (folder / "run.txt").write_text(WORDS * 20, encoding="utf-8")
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer()), encoding="utf-8")
        paths = {k: str(folder / v) for k, v in {"dataset": "run.txt", "tokenizer": "tokenizer.json", **names}.items()}
        train = {"max_seq_len": 16, "batch_size": 1}
        return put("run.yaml", yaml_text(model={"vocab_size": vocab}, train=train, synthetic=False, **paths))(folder)
    return write


def corpus_cases():
    def case(row, what, code, says, write, cli=False):
        return Case(row, "corpus", what, write, code, says, cli)

    size = max(tokenizer()["model"]["vocab"].values()) + 1
    yield case("C1", "a tokenizer of more ids than the model", GATE, "GATE-ARCH-370M-011", corpus(vocab=270), cli=True)
    yield case("C1", "one id fewer", GATE, "GATE-ARCH-370M-011", corpus(vocab=size - 1))
    yield case("C4", "shards of another tokenizer", FORMAT, "manifest.json: expected shards of this tokenizer",
               corpus(shards(), dataset="shards"))

    manifest = replaced(shards(), "manifest.json", special_files("manifest.json")["folder"])
    yield case("B13", "a manifest that is a folder", FORMAT, "manifest.json", corpus(manifest, dataset="shards"))
    yield case("ENTROPY", "shards of one id", GATE, "x.bin", corpus(put("x.bin", bytes(4000)), dataset="x.bin"),
               cli=True)
    yield case("C5", "too short to hold anything out", CONFIG, "tokens",
               corpus(put("x.txt", b"short"), dataset="x.txt"))


def cases():
    return [*shard_cases(), *text_cases(), *corpus_cases()]
