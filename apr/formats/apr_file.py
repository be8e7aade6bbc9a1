"""The .apr v2 container: JSON metadata, an index sorted by name, aligned tensors, a checksum over everything.

    off size                                    header, 64 bytes, little endian
     0   4  magic "APR\\0"                      40  4  CRC32 of bytes 0..39 and 44..63
     4   2  version 2, 0                        44 20  reserved, zero
     6   2  flags                               then   metadata (JSON, padded to 64)
     8   4  tensor count                               index (padded to 64): u16 name length, name, u8 dtype, u8 ndim,
    12   8  metadata offset (64)                               u64 sizes, u64 offset in the data section, u64 bytes
    20   4  metadata size, without padding             data: each tensor at a multiple of 64, zero-padded
    24   8  index offset                               u32 CRC32 of everything before it
    32   8  data offset

SOURCE  the published crate apr-format; this reader also refuses what that one lets pass: duplicate and unsorted names,
        names that are not UTF-8, overlaps, gaps, sizes that do not match shapes, non-zero padding, a bad payload.
"""

import io
import itertools
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from apr.dtypes import APR_QUANTISED, BY_APR_CODE, BY_NUMPY
from apr.errors import FormatError, IntegrityError
from apr.files import CHUNK, replacing
from apr.formats.tensors import (
    MAX_DIMENSIONS,
    MAX_NAME,
    TensorEntry,
    TensorFile,
    Writable,
    checked_name,
    checked_shape,
    checked_tiling,
    file_state,
    open_checked,
    raw_bytes,
)
from apr.strict import MAX_JSON_BYTES, parse_json

MAGIC, HEADER = b"APR\0", struct.Struct("<4sBBHIQIQQI20s")
ALIGN = 64
MAX_ENTRY = 2 + MAX_NAME + 2 + 8 * MAX_DIMENSIONS + 16
FLAGS = {1: "LZ4", 2: "ZSTD", 4: "ENCRYPTED", 8: "SIGNED", 16: "SHARDED", 32: "QUANTIZED", 64: "FILTERBANK",
         128: "MODEL_CARD", 256: "STREAMING", 512: "HAS_VOCAB", 1024: "ROW_MAJOR", 2048: "COLUMN_MAJOR"}
ROW_MAJOR, HAS_VOCAB = 1024, 512
ACCEPTED_FLAGS = ROW_MAJOR | HAS_VOCAB | 32 | 128


def _up(position: int) -> int:
    return -(-position // ALIGN) * ALIGN


def open_apr(path: Path) -> TensorFile:
    """Open a file and check everything about it, the checksum of the payload included.

    Raises NotFoundError, StorageError, FormatError naming the rule and the tensor, IntegrityError for a checksum.
    """
    return open_checked(path, _checked)


def _checked(path: Path, file: BinaryIO, size: int) -> TensorFile:
    where, state = str(path), file_state(file)

    def refuse(expected: str, found: str, fix: str = "write the file again") -> NoReturn:
        raise FormatError(where, expected, found, fix)

    head = file.read(HEADER.size)
    if head[:4] == b"APRN":
        refuse("version 2 of the .apr format", "version 1 (APRN)", "convert it with the tool that wrote it")
    if head[:4] != MAGIC:
        refuse("an .apr file (magic APR\\0)", repr(head[:4]), "check the path")
    if len(head) < HEADER.size:
        refuse(f"a header of {HEADER.size} bytes", f"{len(head)}", "the file is cut short; get it again")
    _, major, minor, flags, count, meta_at, meta_size, index_at, data_at, crc, reserved = HEADER.unpack(head)
    if (major, minor) != (2, 0):
        refuse("version 2.0", f"{major}.{minor}", "convert it with the tool that wrote it")
    if zlib.crc32(head[44:], zlib.crc32(head[:40])) != crc:
        raise IntegrityError(f"{where}: header", f"CRC32 {crc:08x}",
                             f"{zlib.crc32(head[44:], zlib.crc32(head[:40])):08x}", "the file is damaged; get it again")
    if flags & ~ACCEPTED_FLAGS or not flags & ROW_MAJOR:
        names = [name for bit, name in FLAGS.items() if flags & bit] + [f"bit {flags & ~4095:#x}"] * bool(flags & ~4095)
        refuse("a plain row-major file", "flags " + ", ".join(names), "convert it with the tool that wrote it")
    if reserved != bytes(20):
        refuse("20 reserved bytes of zero", "others", "the file is newer than this reader, or damaged")
    if (meta_at != HEADER.size or meta_size > MAX_JSON_BYTES or index_at != _up(meta_at + meta_size)
            or not index_at <= data_at <= size - 4):
        refuse(f"metadata, index, data and checksum in turn within {size} bytes",
               f"offsets {meta_at}, {index_at}, {data_at}, size {meta_size}")
    index_size = data_at - index_at
    if data_at % ALIGN or not 20 * count <= index_size < MAX_ENTRY * count + ALIGN:  # it is read whole
        refuse("room for the index", f"{count} tensors in {index_size} bytes")

    metadata = parse_json(file.read(meta_size), f"{where}: metadata")
    if not isinstance(metadata, dict):
        refuse("metadata that is an object", type(metadata).__name__)
    if any(file.read(index_at - meta_at - meta_size)):
        refuse("zero padding after the metadata", "other bytes")
    entries = _index(where, file.read(index_size), count, data_at, size - 4)
    if not entries and size - 4 != data_at:
        refuse("no data without tensors", f"{size - 4 - data_at} bytes")
    checked_tiling(where, entries, data_at, size - 4, ALIGN)
    for entry in entries.values():
        end = entry.start + entry.nbytes
        file.seek(end)
        if any(file.read(_up(end) - end)):
            refuse("zero padding after each tensor", f"other bytes after '{entry.name}'")
    _check_payload(where, file, size)
    return TensorFile(path, file, state, metadata, entries, flags)


def _index(where: str, data: bytes, count: int, data_at: int, end: int) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    stream, last = io.BytesIO(data), b""

    def take(n: int) -> bytes:
        part = stream.read(n)
        if len(part) != n:
            raise FormatError(f"{where}: index entry {len(entries)}", f"{n} more bytes", f"{len(part)}",
                              "write the file again")
        return part

    for _ in range(count):
        length = int.from_bytes(take(2), "little")
        raw = take(length)
        place = f"{where}: tensor {raw[:80]!r}"
        if not 1 <= length <= MAX_NAME or b"\0" in raw or raw <= last:
            raise FormatError(place, f"names of 1 to {MAX_NAME} bytes, ascending, each once", "another",
                              "write the file again")
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(place, "a name in UTF-8", "other bytes", "write the file again") from None
        code, ndim = take(2)
        if code in APR_QUANTISED:
            raise FormatError(place, "an unquantised dtype", APR_QUANTISED[code],
                              "dequantise it with the tool that wrote it")
        if code not in BY_APR_CODE or ndim > MAX_DIMENSIONS:
            raise FormatError(place, f"a known dtype and at most {MAX_DIMENSIONS} sizes", f"dtype {code}, {ndim} sizes",
                              "write the file again")
        sizes = struct.unpack(f"<{ndim}Q", take(8 * ndim))
        offset, nbytes = struct.unpack("<QQ", take(16))
        if offset % ALIGN or data_at + offset + nbytes > end:
            raise FormatError(place, f"aligned data within {end - data_at} bytes", f"offset {offset}, {nbytes} bytes",
                              "the file is cut short or damaged")
        entries[name] = TensorEntry(name, BY_APR_CODE[code], checked_shape(place, sizes, BY_APR_CODE[code], nbytes),
                                    data_at + offset, nbytes)
        last = raw
    rest = stream.read()
    if len(rest) >= ALIGN or any(rest):
        raise FormatError(f"{where}: index", "nothing but padding after the last entry", f"{len(rest)} bytes",
                          "write the file again")
    return entries


def _check_payload(where: str, file: BinaryIO, size: int) -> None:
    """The footer's CRC32 over everything before it, read in pieces."""
    file.seek(0)
    crc, left = 0, size - 4
    while left:
        part = file.read(min(CHUNK, left))
        if not part:
            raise FormatError(where, f"{left} more bytes", "the end of the file", "the file was cut; get it again")
        crc, left = zlib.crc32(part, crc), left - len(part)
    stored = int.from_bytes(file.read(4), "little")
    if crc != stored:
        raise IntegrityError(f"{where}: contents", f"CRC32 {stored:08x}", f"{crc:08x}",
                             "the file is damaged; get it again")


def write_apr(path: Path, arrays: Mapping[str, Writable], metadata: Mapping[str, Any]) -> None:
    """Write a file; the same arrays and metadata give the same bytes. `path` is replaced whole or not at all.

    A StoredArray is read once, when its turn comes, and one is in memory at a time. Raises FormatError for a name or
    dtype that the format lacks, StorageError.
    """
    names = sorted(arrays, key=lambda n: n.encode("utf-8"))
    index, position = b"", 0
    for name in names:
        raw, array = checked_name(str(path), name).encode("utf-8"), arrays[name]
        dtype = BY_NUMPY.get(array.dtype)
        if dtype is None or dtype.apr_code is None or array.ndim > MAX_DIMENSIONS:
            raise FormatError(f"tensor '{name}'", f"a dtype of apr/dtypes.py and at most {MAX_DIMENSIONS} sizes",
                              f"{array.dtype}, {array.ndim} sizes", "convert it")
        index += struct.pack(f"<H{len(raw)}sBB{array.ndim}QQQ", len(raw), raw, dtype.apr_code, array.ndim, *array.shape,
                             position, array.nbytes)
        position = _up(position + array.nbytes)
    text = json.dumps(metadata, ensure_ascii=False, sort_keys=True, allow_nan=False).encode("utf-8")
    if len(text) > MAX_JSON_BYTES:
        raise FormatError(f"{path}: metadata", f"at most {MAX_JSON_BYTES} bytes", f"{len(text)}", "store less in it")
    index_at = _up(HEADER.size + len(text))
    data_at = _up(index_at + len(index))
    flags = ROW_MAJOR | (HAS_VOCAB if "tokenizer.json" in metadata or "tokenizer.vocabulary" in metadata else 0)
    fields = (MAGIC, 2, 0, flags, len(names), HEADER.size, len(text), index_at, data_at)
    head = HEADER.pack(*fields, 0, bytes(20))
    head = HEADER.pack(*fields, zlib.crc32(head[44:], zlib.crc32(head[:40])), bytes(20))
    with replacing(path) as f:
        crc = 0
        prefix = (head + text).ljust(index_at, b"\0") + index
        for part in itertools.chain([memoryview(prefix)], (raw_bytes(arrays[n]) for n in names)):
            for piece in (part, memoryview(bytes(-part.nbytes % ALIGN))):
                f.write(piece)
                crc = zlib.crc32(piece, crc)
        f.write(crc.to_bytes(4, "little"))
