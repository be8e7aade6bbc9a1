"""safetensors: a JSON header and raw arrays. Strict reader with FormatErrors of its own; writing by the same rules.

    u64 header length | JSON {name: {dtype, shape, data_offsets}, "__metadata__": {str: str}} | data

The tensors must cover the data section exactly: no gap, no overlap, nothing after it. (The `safetensors` package is the
oracle in the tests. It is not used here because its NumPy side reads no BF16 from bytes, its errors are of many types,
and it writes in place.)
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from apr.dtypes import BY_NAME, BY_NUMPY, DType
from apr.errors import FormatError
from apr.files import replacing
from apr.formats.tensors import (
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

ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


def open_safetensors(path: Path) -> TensorFile:
    """Open a file and check all of its header before anything is allocated for tensors.

    Raises NotFoundError, StorageError, FormatError naming the tensor and the rule.
    """
    return open_checked(path, _checked)


def _checked(path: Path, file: BinaryIO, size: int) -> TensorFile:
    where, state = str(path), file_state(file)
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(size - 8, MAX_JSON_BYTES):
        raise FormatError(where, f"a header length of at most {min(max(size - 8, 0), MAX_JSON_BYTES)}",
                          f"{length} in a file of {size} bytes", "this is no complete safetensors file")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise FormatError(where, "a header that starts with '{'", repr(text[:8]), "this is no safetensors file")
    header = parse_json(text, where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{where}: __metadata__", "texts by key", "something else", "write the file again")
    data_start = 8 + length
    entries = {name: _entry(where, name, value, data_start) for name, value in header.items()}
    checked_tiling(where, entries, data_start, size, align=1)
    return TensorFile(path, file, state, metadata, entries)


def _entry(where: str, name: str, value: Any, data_start: int) -> TensorEntry:
    place = f"{where}: tensor '{checked_name(where, name)}'"
    if not isinstance(value, dict) or value.keys() != ENTRY_KEYS:
        raise FormatError(place, "dtype, shape and data_offsets", "other fields", "write the file again")
    dtype = BY_NAME.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise FormatError(place, "dtype " + ", ".join(BY_NAME), repr(value["dtype"])[:40], "convert the tensor")
    offsets = value["data_offsets"]
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int and o >= 0 for o in offsets)):
        raise FormatError(place, "two offsets, 0 or more", repr(offsets)[:60], "write the file again")
    shape = checked_shape(place, value["shape"], dtype, offsets[1] - offsets[0])
    return TensorEntry(name, dtype, shape, data_start + offsets[0], offsets[1] - offsets[0])


def encode_header(arrays: Mapping[str, Writable], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds `arrays` in this order, padded so that the data starts at a multiple of 64."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, array in arrays.items():
        if checked_name("safetensors", name) in header:
            raise FormatError(f"tensor '{name}'", "a name that the format leaves free", "its own", "rename the tensor")
        header[name] = {"dtype": _dtype(name, array).name, "shape": list(array.shape),
                        "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, arrays: Mapping[str, Writable], metadata: Mapping[str, str]) -> None:
    """Write `arrays` in this order; `path` is replaced whole or not at all. Raises StorageError, FormatError.

    A StoredArray is read when its turn comes.
    """
    with replacing(path) as f:
        f.write(encode_header(arrays, metadata))
        for array in arrays.values():
            f.write(raw_bytes(array))


def _dtype(name: str, array: Writable) -> DType:
    dtype = BY_NUMPY.get(array.dtype)
    if dtype is None:
        raise FormatError(f"tensor '{name}'", "a dtype of apr/dtypes.py", str(array.dtype), "convert it first")
    return dtype
