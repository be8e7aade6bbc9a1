"""Byte-level BPE by the `tokenizers` library: train, load, encode, decode, and the checks that upstream lacked.

Upstream once read a vocabulary of another spelling, and 99.99 % of its corpus became <unk>, unnoticed. Here a tokenizer
that cannot carry arbitrary text there and back is refused when it is loaded.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from apr.config import END_OF_TEXT
from apr.errors import AprError, FormatError, NotFoundError
from apr.files import read_bytes
from apr.strict import parse_json

MAX_FILE = 64 * 2**20
MAX_VOCABULARY = 2**20
MAX_VALUES = 2**21  # of a tokenizer.json: a vocabulary, and merges that are pairs
MAX_GROWTH = 1024  # times that normalizing or decoding may lengthen a text; a chain of doublings knows no end
ENCODE_AT_ONCE = 256  # documents
PROBE = "def f(x):\n\treturn 'Naïve' + \"日本語\"  # 1 + 2 = 3 🙂\r\n"
BYTES = (pre_tokenizers.ByteLevel.alphabet(), [f"<0x{b:02X}>" for b in range(256)])  # a byte as a token: two spellings
BYTE_LEVEL = "check that vocab.json is spelt as GPT-2's (byte-level), not in hexadecimal"


class Tokenizer:
    """A tokenizer and what is known of it.

    `vocab_size` is one more than the largest id; `eos_id` ends a document (None if there is no such token); `sha256` is
    of its JSON, which is how shards and checkpoints name it.
    """

    def __init__(self, inner: tokenizers.Tokenizer, where: str) -> None:
        self.inner, self.where = inner, where
        inner.encode_special_tokens = True  # "<|endoftext|>" inside a text is text; only we end documents
        inner.no_truncation()
        inner.no_padding()
        vocab = inner.get_vocab(with_added_tokens=True)
        if not vocab:
            raise FormatError(where, "a vocabulary", "an empty one", "give a trained tokenizer")
        self.vocab_size = max(vocab.values()) + 1
        if self.vocab_size > MAX_VOCABULARY or len(set(vocab.values())) != len(vocab):
            raise FormatError(where, f"ids below {MAX_VOCABULARY}, each for one token",
                              f"{len(vocab)} tokens with ids to {self.vocab_size - 1}", "give a trained tokenizer")
        self.json = inner.to_str()  # not before: it makes a table as long as the largest id
        self.sha256 = hashlib.sha256(self.json.encode()).hexdigest()
        if getattr(inner.model, "dropout", None):
            raise FormatError(where, "no dropout, which gives a text other tokens each time", str(inner.model.dropout),
                              "set it to null")
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            if getattr(inner.model, name, None):  # bytes whose pieces lack it would vanish from a text
                raise FormatError(where, f"no {name}", repr(getattr(inner.model, name))[:40], BYTE_LEVEL)
        missing = min(([b for b in spelling if b not in vocab] for spelling in BYTES), key=len)
        if missing:  # such bytes would vanish from every text
            raise FormatError(where, "a token for each of the 256 bytes", f"none for {len(missing)} of them",
                              BYTE_LEVEL)
        if _growth(inner.normalizer) * _growth(inner.decoder) > MAX_GROWTH:
            raise FormatError(where, f"replacements that lengthen a text at most {MAX_GROWTH} times", "more",
                              "give a trained tokenizer")
        for i, token in inner.get_added_tokens_decoder().items():
            text = decoders.ByteLevel().decode([token.content])  # what it stands for as a piece of text
            if token.special and (i in self.encode(text) or i in self.encode(token.content)):
                raise FormatError(f"{where}: special token {token.content[:40]!r}", "one that no text is encoded to",
                                  f"id {i}, as text has it: it would vanish from what is decoded", BYTE_LEVEL)
        self.eos_id = next((vocab[t] for t in END_OF_TEXT if t in vocab), None)
        back = self.decode(self.encode(PROBE))
        if back.strip() != PROBE.strip():
            raise FormatError(where, "a tokenizer that gives any text back unchanged (byte-level BPE)",
                              f"{PROBE[:20]!r}… came back as {back[:20]!r}…", BYTE_LEVEL)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of `vocab_size` entries, 256 bytes and the end of text included; fewer for a short text."""
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT[0]], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        return cls(inner, "trained tokenizer")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """From a tokenizer.json, or a folder that has one, or else vocab.json and merges.txt (split as GPT-2 does).

        Raises NotFoundError, FormatError.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.is_file() or not path.is_dir():
            return cls.from_json(read_bytes(file, MAX_FILE), str(file))
        vocab, merges = path / "vocab.json", path / "merges.txt"
        if not (vocab.is_file() and merges.is_file()):
            raise NotFoundError(str(path), "tokenizer.json, or vocab.json and merges.txt", "neither", "check the path")
        return cls.from_gpt2(read_bytes(vocab, MAX_FILE), read_bytes(merges, MAX_FILE), f"{path}/")

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Tokenizer":
        """From the bytes of a tokenizer.json. Raises FormatError, also for what the library would pass over.

        Of two equal keys it takes the last; an added token gets the next id, whatever the file says.
        """
        with _library(where, "a tokenizer.json"):
            inner = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
            for added in parse_json(data, where, MAX_FILE, MAX_VALUES).get("added_tokens") or ():
                if (found := inner.token_to_id(added["content"])) != added["id"]:
                    raise FormatError(f"{where}: added token {added['content'][:40]!r}", f"id {added['id']}",
                                      f"{found} by its place", "number the added tokens in their order")
            return cls(inner, where)

    @classmethod
    def from_gpt2(cls, vocab: bytes, merges: bytes, where: str) -> "Tokenizer":
        """From the bytes of GPT-2's vocab.json and merges.txt; `where` goes before their names. Raises FormatError."""
        with _library(f"{where}vocab.json, merges.txt", "two files of one tokenizer"):
            return cls(_gpt2(vocab, merges, where), f"{where}vocab.json")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_templated(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens are meant: a prompt, or what a chat template wrote."""
        self.inner.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self.inner.encode_special_tokens = True

    @property
    def first_id(self) -> int | None:
        """The id that the tokenizer's own post-processor puts before a text, None if it puts none."""
        plain, whole = (self.inner.encode("a", add_special_tokens=add).ids for add in (False, True))
        return whole[0] if len(whole) > len(plain) and whole[0] != plain[0] else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """encode of each text, in parallel."""
        return [e.ids for e in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_stream(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """encode of each text of a stream, ENCODE_AT_ONCE at a time."""
        stream = iter(texts)
        while part := list(islice(stream, ENCODE_AT_ONCE)):
            yield from self.encode_batch(part)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def require_eos(self) -> int:
        """The id that ends a document. Raises FormatError when the tokenizer has none."""
        if self.eos_id is None:
            raise FormatError(self.where, "an end-of-text token: " + ", ".join(END_OF_TEXT), "none of them",
                              "add one to the tokenizer")
        return self.eos_id


@contextlib.contextmanager
def _library(where: str, expected: str) -> Iterator[None]:
    """Turn whatever the library raises on a bad file into a FormatError.

    It raises bare Exception, and PanicException from Rust, which by then has printed a report of its own to
    descriptor 2.
    """
    try:
        saved: int | None = os.dup(2)
    except OSError:  # closed
        saved = None
    try:
        if saved is not None:
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), 2)
        yield
    except (AprError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise FormatError(where, expected, str(e)[:160], "give what the tokenizers library wrote") from None
    finally:
        if saved is not None:
            os.dup2(saved, 2)
            os.close(saved)


def _growth(part: Any) -> int:
    """How many times longer the replacements of a normalizer or decoder can make a text."""
    def walk(node: Any) -> int:
        below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        longer = math.prod(walk(item) for item in below)
        if isinstance(node, dict) and node.get("type") in ("Replace", "Prepend"):
            text = node.get("content") or node.get("prepend") or ""
            # One more, since an empty pattern keeps what was there.
            return longer * (len(text) + 1 if len(text) > 1 else 1)
        return longer

    return walk(json.loads(part.__getstate__())) if part is not None else 1


def _gpt2(vocab: bytes, merges: bytes, where: str) -> tokenizers.Tokenizer:
    table, place = parse_json(vocab, f"{where}vocab.json", MAX_FILE), f"{where}merges.txt"
    if not isinstance(table, dict) or not all(type(v) is int and 0 <= v < 2**31 for v in table.values()):
        raise FormatError(f"{where}vocab.json", "an object of token to id", type(table).__name__,
                          "give GPT-2's vocab.json")
    try:
        lines = merges.decode("utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise FormatError(place, "UTF-8", f"a bad byte at offset {e.start}", "give GPT-2's merges.txt") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#version"):
            left, _, right = line.partition(" ")
            if not left or not right or " " in right:
                raise FormatError(f"{place} line {number}", "two symbols", repr(line[:40]), "give GPT-2's merges.txt")
            pairs.append((left, right))
    inner = tokenizers.Tokenizer(models.BPE(vocab=table, merges=pairs))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([t for t in END_OF_TEXT if t in table])
    return inner
