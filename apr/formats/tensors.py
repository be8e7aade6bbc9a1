"""What the tensor files have in common: an entry of their index, and the checks that keep a hostile index harmless."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from apr.dtypes import DType
from apr.errors import FormatError
from apr.files import os_errors

MAX_DIMENSIONS = 8
MAX_NAME = 256  # bytes


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file: `start` is its first byte in the file, `nbytes` its length."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class TensorFile:
    """An open, fully checked file of tensors, also a context manager.

    `entries` by name, in the file's order; `metadata` (texts only in safetensors); `flags` (.apr only).
    """

    path: Path
    file: BinaryIO
    metadata: dict[str, Any]
    entries: dict[str, TensorEntry]
    flags: int = 0

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own. Raises StorageError, FormatError when the file has become shorter."""
        entry = self.entries[name]
        out = np.empty(entry.shape, entry.dtype.numpy)
        with os_errors(str(self.path)):
            self.file.seek(entry.start)
            got = self.file.readinto(raw_bytes(out)) if entry.nbytes else 0  # type: ignore[attr-defined]
        if got != entry.nbytes:
            raise FormatError(f"{self.path}: tensor '{entry.name}'", f"{entry.nbytes} bytes", f"{got}",
                              "the file was cut; get it again")
        return out

    def read_all(self) -> dict[str, np.ndarray]:
        """Every tensor by name."""
        return {name: self.read(name) for name in self.entries}

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked_name(where: str, name: str) -> str:
    """The name, if it is one that can be shown and kept."""
    if not 1 <= len(name.encode("utf-8")) <= MAX_NAME or "\0" in name:
        raise FormatError(f"{where}: tensor {name[:40]!r}", f"a name of 1 to {MAX_NAME} bytes, none of them zero",
                          f"{len(name)} characters", "rename the tensor")
    return name


def checked_shape(where: str, shape: Any, dtype: DType, nbytes: int) -> tuple[int, ...]:
    """The shape, if it is one and fills exactly `nbytes`; products are Python integers, which do not wrap."""
    if not (isinstance(shape, (list, tuple)) and len(shape) <= MAX_DIMENSIONS
            and all(type(d) is int and d >= 0 for d in shape)):
        raise FormatError(where, f"a shape of at most {MAX_DIMENSIONS} sizes, 0 or more", repr(shape)[:60],
                          "write the file again")
    if math.prod(d for d in shape if d) * dtype.size >= 2**63:  # NumPy makes no such array, not even an empty one
        raise FormatError(where, "a shape that fits in memory", f"{list(shape)}", "write the file again")
    if math.prod(shape) * dtype.size != nbytes:
        raise FormatError(where, f"{math.prod(shape) * dtype.size} bytes for {dtype.name} {list(shape)}", f"{nbytes}",
                          "write the file again")
    return tuple(shape)


def checked_tiling(where: str, entries: Mapping[str, TensorEntry], start: int, end: int, align: int) -> None:
    """Demand that the tensors, each rounded up to `align`, cover [start, end) without gap, overlap or rest."""
    position = start
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.nbytes)):
        if entry.start != position:
            kind = "an overlap" if entry.start < position else "a gap"
            raise FormatError(f"{where}: tensor '{entry.name}'", f"its data at offset {position}",
                              f"{kind}: {entry.start}", "write the file again")
        position = entry.start + -(-entry.nbytes // align) * align
    if position != end:
        raise FormatError(where, f"tensors that end with their section, at byte {end}", f"byte {position}",
                          "the file is cut short or has something appended; get it again")


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in row-major order; a view where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
