"""GGUF v2 and v3, little endian: metadata and a tensor index in binary, then aligned tensors, many of them in blocks.

    "GGUF" | u32 version | u64 tensors | u64 keys | keys | tensors | padding | data
    key: string, u32 type, value    tensor: string, u32 sizes, u64 sizes[] (fastest first), u32 type, u64 offset
    string: u64 bytes, UTF-8        array: u32 type, u64 length, values

Every count and length is compared with the bytes that remain before anything is made of it, and the tensors must cover
the data section, each at a multiple of the alignment. The `gguf` library maps the file and believes it, so only its
tables and its arithmetic of blocks are used.

SOURCE  the GGUF specification in ggml-org/ggml, docs/gguf.md; what must be refused: llama.cpp's tests/test-gguf.cpp.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from apr.errors import FormatError
from apr.formats.tensors import OpenFile, checked_tiling, file_state, open_checked
from apr.strict import MAX_JSON_BYTES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS, MAX_TENSORS, MAX_STRINGS = 2**16, 2**17, 2**20  # a string costs 60 bytes of memory, against 9 in the file
MAX_KEY, MAX_NAME, MAX_DIMENSIONS = 65_535, 63, 4
ALIGNMENT, MIN_ALIGNMENT, MAX_ALIGNMENT = 32, 8, 2**16
ROWS_AT_ONCE = 2**22  # elements; the library's arithmetic needs several times their size
UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
SCALARS = {code: np.dtype(name) for code, name in (
    (0, "u1"), (1, "i1"), (2, "<u2"), (3, "<i2"), (UINT32, "<u4"), (5, "<i4"), (FLOAT32, "<f4"), (BOOL, "?"),
    (10, "<u8"), (11, "<i8"), (12, "<f8"))}
STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
TYPES = {int(t): t for t in map(GGMLQuantizationType.__getitem__, (*STORED, *BLOCKS))}
AGAIN = "write the file again"


@dataclass(frozen=True)
class GgufEntry:
    """A tensor of a file: `type` is ggml's name, `shape` NumPy's (the file's reversed), `start` its first byte."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile(OpenFile):
    """An open, fully checked GGUF file.

    `metadata` holds int, float, bool, str, a list of str, or an array of numbers; `entries` are in the file's order.
    """

    metadata: dict[str, Any]
    entries: dict[str, GgufEntry]
    version: int
    alignment: int

    def read(self, name: str) -> np.ndarray:
        """One tensor in memory of its own: F32, F16 and BF16 as stored, blocks as float32. Raises as read_span."""
        entry = self.entries[name]
        raw = self.read_span(entry)
        if entry.type in STORED:
            return raw.view(STORED[entry.type]).reshape(entry.shape)
        return dequantised(raw, entry.type, entry.shape)


def dequantised(raw: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values, shape `shape`, of the bytes of blocks; scales that are not finite give values that are not."""
    out = np.empty((math.prod(shape[:-1]), shape[-1]), np.float32)
    rows, step = raw.reshape(len(out), -1), max(1, ROWS_AT_ONCE // shape[-1])
    with np.errstate(all="ignore"):
        for at in range(0, len(out), step):
            out[at:at + step] = dequantize(rows[at:at + step], GGMLQuantizationType[kind])
    return out.reshape(shape)


class _Cursor:
    """The header of a file, read forwards. `take` is only given numbers that `room` has checked, or small ones."""

    def __init__(self, file: BinaryIO, size: int, where: str) -> None:
        self.file, self.size, self.where, self.position, self.strings = file, size, where, 0, 0

    def take(self, n: int) -> bytes:
        part = self.file.read(n)
        if len(part) != n:
            raise FormatError(f"{self.where}: offset {self.position}", f"{n} more bytes", f"{len(part)}",
                              "the file is cut short or damaged")
        self.position += n
        return part

    def number(self, nbytes: int) -> int:
        return int.from_bytes(self.take(nbytes), "little")

    def room(self, what: str, count: int, each: int, most: int) -> int:
        """A count, if that many things of at least `each` bytes can follow."""
        if count > most or count * each > self.size - self.position:
            raise FormatError(f"{self.where}: offset {self.position}",
                              f"at most {min(most, (self.size - self.position) // each)} {what}", f"{count}",
                              "the file is cut short or damaged")
        return count

    def text(self, what: str, most: int) -> str:
        at = self.position
        raw = self.take(self.room(f"bytes of {what}", self.number(8), 1, most))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise FormatError(f"{self.where}: {what} at offset {at}", "UTF-8",
                              f"byte 0x{raw[e.start]:02x} at {e.start}", AGAIN) from None


def open_gguf(path: Path) -> GgufFile:
    """Open a file and check its whole header before anything is allocated for tensors.

    Raises NotFoundError, StorageError, FormatError naming the key or tensor and the rule.
    """
    return open_checked(path, _checked)


def _checked(path: Path, file: BinaryIO, size: int) -> GgufFile:
    where, state = str(path), file_state(file)
    cursor = _Cursor(file, size, where)
    magic = file.read(4)
    if magic != MAGIC:
        raise FormatError(where, "a GGUF file (magic GGUF)", repr(magic), "check the path")
    cursor.position = 4
    version = cursor.number(4)
    if version not in VERSIONS:
        found = f"{version}, big endian" if version and version & 0xFFFF == 0 else f"{version}"
        raise FormatError(where, "version 2 or 3", found, "convert it with llama.cpp of today")
    count, keys = cursor.number(8), cursor.number(8)
    cursor.room("tensors", count, 33, MAX_TENSORS)
    cursor.room("keys", keys, 14, MAX_KEYS)
    metadata: dict[str, Any] = {}
    alignment = ALIGNMENT
    for _ in range(keys):
        key = cursor.text("a key", MAX_KEY)
        if not key or key in metadata or "\0" in key:
            raise FormatError(f"{where}: key {key[:80]!r}", "keys that are not empty, each once", "another", AGAIN)
        kind = cursor.number(4)
        metadata[key] = _value(cursor, f"{where}: key '{key[:80]}'", kind)
        if key == "general.alignment":
            alignment = metadata[key]
            if kind != UINT32 or alignment & (alignment - 1) or not MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT:
                raise FormatError(f"{where}: general.alignment",
                                  f"a UINT32 power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}",
                                  f"{alignment}" if kind == UINT32 else f"type {kind}", AGAIN)
    cursor.room("tensors", count, 33, MAX_TENSORS)
    entries: dict[str, GgufEntry] = {}
    for _ in range(count):
        entry = _entry(cursor, where)
        if entry.name in entries:
            raise FormatError(f"{where}: tensor '{entry.name}'", "each name once", "a second one", AGAIN)
        entries[entry.name] = entry
    start = -(-cursor.position // alignment) * alignment
    entries = {name: replace(e, start=start + e.start) for name, e in entries.items()}
    _check_data(cursor, entries, start, alignment)
    return GgufFile(path, file, state, metadata, entries, version, alignment)


def _value(cursor: _Cursor, place: str, kind: int) -> Any:
    """A value of a key. Arrays of arrays are refused, as llama.cpp does, so there is no recursion to run away."""
    if kind == STRING:
        return cursor.text("a text", MAX_JSON_BYTES)
    if kind in SCALARS:
        return _numbers(cursor, place, kind, 1)[0].item()
    if kind != ARRAY:
        raise FormatError(place, "a value type from 0 to 12", f"{kind}", AGAIN)
    inner, length = cursor.number(4), cursor.number(8)
    if inner == STRING:
        cursor.strings += cursor.room("texts", length, 8, MAX_STRINGS - cursor.strings)
        return [cursor.text("a text", MAX_JSON_BYTES) for _ in range(length)]
    if inner not in SCALARS:
        raise FormatError(place, "an array of numbers or of texts", f"type {inner}", AGAIN)
    return _numbers(cursor, place, inner, length)


def _numbers(cursor: _Cursor, place: str, kind: int, count: int) -> np.ndarray:
    dtype = SCALARS[kind]
    raw = cursor.take(cursor.room("numbers", count, dtype.itemsize, cursor.size) * dtype.itemsize)
    if kind == BOOL and any(raw.translate(None, b"\0\1")):
        raise FormatError(place, "0 or 1 for true and false", "another byte", AGAIN)
    out = np.frombuffer(raw, dtype)
    if dtype.kind == "f" and not np.isfinite(out).all():
        raise FormatError(place, "finite numbers", f"{out[~np.isfinite(out)][0]}", AGAIN)
    return out


def _entry(cursor: _Cursor, where: str) -> GgufEntry:
    """An entry of the index; its `start` is still relative to the data, and not yet compared with the file's size."""
    name = cursor.text("a tensor's name", MAX_NAME)
    place = f"{where}: tensor '{name}'"
    if not name or "\0" in name:
        raise FormatError(place, f"a name of 1 to {MAX_NAME} bytes, none of them zero", "another", AGAIN)
    ndim = cursor.number(4)
    if not 1 <= ndim <= MAX_DIMENSIONS:
        raise FormatError(place, f"1 to {MAX_DIMENSIONS} sizes", f"{ndim}", AGAIN)
    sizes = struct.unpack(f"<{ndim}Q", cursor.take(8 * ndim))
    code, offset = cursor.number(4), cursor.number(8)
    if 0 in sizes:
        raise FormatError(place, "sizes of 1 or more", f"{list(sizes)}", AGAIN)
    kind = TYPES.get(code)
    if kind is None:
        known = f" ({GGMLQuantizationType(code).name})" if code in {*GGMLQuantizationType} else ""
        raise FormatError(place, "a type that apr reads: " + ", ".join((*STORED, *BLOCKS)), f"{code}{known}",
                          "convert it with llama-quantize")
    block, nbytes = GGML_QUANT_SIZES[kind]
    if sizes[0] % block:
        raise FormatError(place, f"rows of a multiple of {block} for {kind.name}", f"{sizes[0]}", AGAIN)
    return GgufEntry(name, kind.name, sizes[::-1], offset, math.prod(sizes) // block * nbytes)


def _check_data(cursor: _Cursor, entries: Mapping[str, GgufEntry], start: int, alignment: int) -> None:
    """The tensors cover the data, whatever their sizes claim: Python's integers do not wrap.

    All other bytes are the zeros that align them, of which those after the last tensor may be absent.
    """
    end = max((e.start + e.nbytes for e in entries.values()), default=cursor.position)
    padded = -(-end // alignment) * alignment
    checked_tiling(cursor.where, entries, start, padded if cursor.size in (end, padded) else cursor.size, alignment)
    for at in (cursor.position, *(e.start + e.nbytes for e in entries.values())):
        cursor.file.seek(at)
        if any(cursor.file.read(-at % alignment)):
            raise FormatError(f"{cursor.where}: offset {at}", "zeros up to the next tensor", "other bytes", AGAIN)
