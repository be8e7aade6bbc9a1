"""Token shards: little-endian u16 or u32 files and a manifest; also upstream's headerless u32 `.bin` files.

    manifest.json   format, version, dtype, token_count, documents, vocab_size, eos_id, tokenizer_sha256,
                    shards: [{file, tokens, sha256}]
    shard-0000.bin  token ids, documents one after the other, each ended by eos_id

A folder of shards appears whole or not at all. Reading checks every id, every hash and every length before training
starts; files are read by offset, never mapped, so that a file cut short while in use is an error and not a signal.
"""

import hashlib
import json
import os
import re
import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apr.data.tokenizer import MAX_VOCABULARY, Tokenizer
from apr.errors import ConfigError, FormatError, GateError, IntegrityError, NotFoundError, StorageError
from apr.files import fsync_dir, make_folder, open_regular, os_errors, write_durable
from apr.strict import read_json

TOKENS_PER_SHARD = 10_000_000
SCAN = 1 << 20  # tokens read at a time when a shard is checked
DTYPES: dict[str, np.dtype[Any]] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4")}
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")  # no folder, nothing hidden, no byte a path cannot hold
MANIFEST_KEYS = {"format": str, "version": int, "dtype": str, "token_count": int, "documents": int, "vocab_size": int,
                 "eos_id": int, "tokenizer_sha256": str, "shards": list}


@dataclass(frozen=True)
class MemoryShard:
    """Tokens held in memory: (n,) int32."""

    array: np.ndarray

    @property
    def tokens(self) -> int:
        """How many there are."""
        return int(self.array.size)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int32."""
        return self.array[start:stop]


class FileShard:
    """Tokens of a file, read by offset."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        file, size = open_regular(path)
        with file:
            self.fd = os.dup(file.fileno())  # kept open: a file replaced meanwhile stays the one that was checked
        weakref.finalize(self, os.close, self.fd)
        if size == 0 or size % dtype.itemsize:
            raise FormatError(str(path), f"a positive multiple of {dtype.itemsize} bytes", f"{size} bytes",
                              "write the shard again")
        self.tokens, self.state = size // dtype.itemsize, self._state()

    def _state(self) -> tuple[int, int]:
        info = os.fstat(self.fd)
        return info.st_size, info.st_mtime_ns

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64-safe unsigned values. Raises StorageError when the file has become shorter."""
        width = self.dtype.itemsize
        with os_errors(f"{self.path} at offset {start * width}"):
            data = os.pread(self.fd, (stop - start) * width, start * width)
        if len(data) != (stop - start) * width:
            raise StorageError(str(self.path), f"{(stop - start) * width} bytes at offset {start * width}",
                               f"{len(data)}", "the file was cut while in use; restore it and resume")
        if self._state() != self.state:
            raise StorageError(str(self.path), "a file that stays as it is", "changed while in use",
                               "restore it and resume")
        return np.frombuffer(data, self.dtype)


class TokenSource:
    """A corpus: shards end to end, checked, with the places where documents start.

    `tokens` in all; `starts` (documents,) int64; `histogram` (vocab_size,) of token counts; `fingerprint` of the
    contents.
    """

    def __init__(self, shards: list[Any], names: list[str], vocab_size: int, eos_id: int | None,
                 expected_sha256: list[str] | None = None, own_vocabulary: int = MAX_VOCABULARY) -> None:
        limit = min(vocab_size, own_vocabulary)
        self.shards, self.vocab_size = shards, vocab_size
        self.name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        self.offsets = np.cumsum([0] + [s.tokens for s in shards])
        self.tokens = int(self.offsets[-1])
        self.histogram = np.zeros(vocab_size, np.int64)
        ends, whole = [], hashlib.sha256()
        for index, (shard, name) in enumerate(zip(shards, names, strict=True)):
            digest = hashlib.sha256()
            for start in range(0, shard.tokens, SCAN):
                chunk = shard.read(start, min(start + SCAN, shard.tokens))
                digest.update(chunk.tobytes())
                if int(chunk.max()) >= limit or int(chunk.min()) < 0:
                    at = int(np.argmax((chunk >= limit) | (chunk < 0)))
                    raise FormatError(f"{name} token {start + at}", f"an id in [0, {limit})", str(int(chunk[at])),
                                      "these shards are for another tokenizer or model")
                self.histogram += np.bincount(chunk, minlength=vocab_size)
                if eos_id is not None:
                    ends.append(np.flatnonzero(chunk == eos_id) + self.offsets[index] + start + 1)
            if expected_sha256 is not None and digest.hexdigest() != expected_sha256[index]:
                raise IntegrityError(name, f"SHA-256 {expected_sha256[index][:16]}…", f"{digest.hexdigest()[:16]}…",
                                     "write the shards again")
            whole.update(digest.digest())
        self.fingerprint = whole.hexdigest()
        self.starts = np.unique(np.concatenate([self.offsets[:1], *ends]))
        self.starts = self.starts[self.starts < self.tokens]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the whole corpus, int32."""
        out, filled = np.empty(stop - start, np.int32), 0
        index = int(np.searchsorted(self.offsets, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.offsets[index + 1]))
            base = int(self.offsets[index])
            out[filled:filled + end - start] = self.shards[index].read(start - base, end - base)
            filled, start, index = filled + end - start, end, index + 1
        return out

    def check_entropy(self) -> float:
        """Entropy of the token distribution in bits.

        Raises GateError (GATE-CORPUS-ENTROPY) when one token is over half of the corpus or the entropy is below 1 bit:
        a model would reach a splendid loss on it and have learnt nothing.
        """
        share = self.histogram[self.histogram > 0] / self.tokens
        entropy = abs(float((share * np.log2(share)).sum()))
        if not (share.max() <= 0.5 and entropy >= 1.0):
            raise GateError(f"GATE-CORPUS-ENTROPY {self.name}", "no token over 50 % and at least 1 bit per token",
                            f"token {int(self.histogram.argmax())} is {share.max():.2%} of {self.tokens} tokens, "
                            f"{entropy:.3f} bits",
                            "check that the tokenizer fits the text")
        return entropy


def memory_source(documents: Iterable[list[int]], vocab_size: int, eos_id: int) -> TokenSource:
    """A corpus in memory; each document is ended by eos_id."""
    flat = [np.append(np.asarray(d, np.int32), np.int32(eos_id)) for d in documents]
    if not flat:
        raise FormatError("dataset", "at least one document", "none", "give some text")
    return TokenSource([MemoryShard(np.concatenate(flat))], ["dataset"], vocab_size, eos_id)


def write_shards(out: Path, documents: Iterable[list[int]], tokenizer: Tokenizer,
                 tokens_per_shard: int = TOKENS_PER_SHARD,
                 progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write a folder of shards, its manifest and tokenizer.json; returns the manifest.

    `progress(documents, tokens)` is called after each document. Raises ConfigError when `out` exists, FormatError for
    no documents, StorageError; in every failure `out` does not exist afterwards.
    """
    if out.exists():
        raise ConfigError(str(out), "a folder that does not exist yet", "something there", "choose another --output")
    eos, vocab = tokenizer.require_eos(), tokenizer.vocab_size
    dtype = "u16" if vocab <= 2**16 else "u32"
    shards: list[dict[str, Any]] = []
    tally: Counter[str] = Counter()
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with os_errors(str(out)):
            make_folder(out.parent)
            temporary.mkdir()
        for piece in _pieces(documents, eos, tokens_per_shard, tally, progress):
            data, name = piece.astype(DTYPES[dtype]).tobytes(), f"shard-{len(shards):04d}.bin"
            shards.append({"file": name, "tokens": int(piece.size), "sha256": write_durable(temporary / name, data)})
        if not shards:
            raise FormatError("input", "at least one document", "none", "give some text")
        manifest = {"format": "apr-shards", "version": 1, "dtype": dtype, "token_count": tally["tokens"],
                    "documents": tally["documents"], "vocab_size": vocab, "eos_id": eos,
                    "tokenizer_sha256": tokenizer.sha256, "shards": shards}
        write_durable(temporary / "tokenizer.json", tokenizer.json.encode())
        write_durable(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        with os_errors(str(out)):
            fsync_dir(temporary)
            os.rename(temporary, out)
            fsync_dir(out.parent)
        return manifest
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _pieces(documents: Iterable[list[int]], eos: int, size: int, tally: Counter[str],
            progress: Callable[[int, int], None] | None) -> Iterator[np.ndarray]:
    """The documents end to end, each ended by eos, in pieces of `size` tokens and a rest; `tally` counts both."""
    parts: list[np.ndarray] = []
    held = 0
    for document in documents:
        parts.append(np.asarray([*document, eos], np.int64))
        held += len(document) + 1
        tally.update(documents=1, tokens=len(document) + 1)
        if held >= size:
            joined, whole = np.concatenate(parts), held // size * size
            yield from joined[:whole].reshape(-1, size)
            parts, held = [joined[whole:]], held - whole
        if progress:
            progress(tally["documents"], tally["tokens"])
    if held:
        yield np.concatenate(parts)


def is_shards(path: Path) -> bool:
    """Whether `path` is a shard, or a folder of shards, rather than text."""
    return path.suffix == ".bin" or (path.is_dir() and ((path / "manifest.json").is_file() or any(path.glob("*.bin"))))


def open_shards(path: Path, tokenizer: Tokenizer | None, vocab_size: int) -> TokenSource:
    """The corpus in a folder of shards or in one headerless .bin file, every token checked against vocab_size.

    Raises NotFoundError, FormatError (also when the shards were made with another tokenizer), IntegrityError.
    """
    if not path.exists():
        raise NotFoundError(str(path), "shards", "nothing there", "check the path")
    if not os.path.lexists(path / "manifest.json"):  # one that cannot be read is an error, not headerless shards
        files = sorted(path.glob("*.bin")) if path.is_dir() else [path]
        if not files:
            raise NotFoundError(str(path), "manifest.json or *.bin files", "neither", "check the path")
        shards = [FileShard(f, DTYPES["u32"]) for f in files]
        return TokenSource(shards, [str(f) for f in files], vocab_size, tokenizer.eos_id if tokenizer else None)
    where, manifest = str(path / "manifest.json"), read_manifest(path / "manifest.json")
    if tokenizer is not None and tokenizer.sha256 != manifest["tokenizer_sha256"]:
        raise FormatError(where, f"shards of this tokenizer ({tokenizer.sha256[:16]}…)",
                          f"{manifest['tokenizer_sha256'][:16]}…",
                          "give the tokenizer that made them, or tokenize again")
    shards = [FileShard(path / s["file"], DTYPES[manifest["dtype"]]) for s in manifest["shards"]]
    for shard, entry in zip(shards, manifest["shards"], strict=True):
        if shard.tokens != entry["tokens"]:
            raise FormatError(str(shard.path), f"{entry['tokens']} tokens", f"{shard.tokens}", "write the shards again")
    return TokenSource(shards, [str(s.path) for s in shards], vocab_size, manifest["eos_id"],
                       [s["sha256"] for s in manifest["shards"]], manifest["vocab_size"])


def read_manifest(path: Path) -> dict[str, Any]:
    """A checked manifest. Raises FormatError naming the key."""
    values, where = read_json(path), str(path)
    if not isinstance(values, dict) or values.get("format") != "apr-shards" or values.get("version") != 1:
        raise FormatError(where, "format 'apr-shards' version 1", "something else", "tokenize again")
    for key, kind in MANIFEST_KEYS.items():
        if type(values.get(key)) is not kind:
            raise FormatError(f"{where}: {key}", kind.__name__, repr(values.get(key))[:40], "tokenize again")
    if values["dtype"] not in DTYPES:
        raise FormatError(f"{where}: dtype", "u16 or u32", repr(values["dtype"])[:40], "tokenize again")
    if not 1 <= values["vocab_size"] <= MAX_VOCABULARY:  # a histogram of this size is made
        raise FormatError(f"{where}: vocab_size", f"1 to {MAX_VOCABULARY}", str(values["vocab_size"]), "tokenize again")
    if values["documents"] < 0:
        raise FormatError(f"{where}: documents", "0 or more", str(values["documents"])[:40], "tokenize again")
    if not 0 <= values["eos_id"] < values["vocab_size"]:
        raise FormatError(f"{where}: eos_id", f"an id in [0, {values['vocab_size']})", str(values["eos_id"]),
                          "tokenize again")
    names = set()
    for entry in values["shards"]:
        good = (isinstance(entry, dict) and type(entry.get("file")) is str and type(entry.get("tokens")) is int
                and type(entry.get("sha256")) is str and SHARD_NAME.fullmatch(entry["file"])
                and entry["file"] not in names)
        if not good:
            raise FormatError(f"{where}: shards", "file (a bare name, each once), tokens, sha256", repr(entry)[:80],
                              "tokenize again")
        names.add(entry["file"])
    if not names or sum(s["tokens"] for s in values["shards"]) != values["token_count"]:
        raise FormatError(f"{where}: token_count", "the sum of the shards' tokens", str(values["token_count"])[:40],
                          "tokenize again")
    return values
