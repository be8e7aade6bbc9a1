"""What the tensor files have in common: an entry of their index, and the checks that keep a hostile index harmless."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self, TypeVar

import numpy as np

from apr.dtypes import DType
from apr.errors import FormatError, ShapeError
from apr.files import CHUNK, open_regular, os_errors

MAX_DIMENSIONS = 8
MAX_NAME = 256  # bytes
F = TypeVar("F")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file: `start` is its first byte in the file, `nbytes` its length."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Span(Protocol):
    """What has a name and a place in a file."""

    @property
    def name(self) -> str:
        """The tensor's name."""

    @property
    def start(self) -> int:
        """Its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Its length."""


@dataclass(frozen=True)
class OpenFile:
    """An open, fully checked file of tensors, also a context manager; `state` is file_state at the opening."""

    path: Path
    file: BinaryIO
    state: tuple[int, int]

    def read_span(self, span: Span) -> np.ndarray:
        """A tensor's bytes, in memory of their own. Raises StorageError, FormatError when the file has changed."""
        out = np.empty(span.nbytes, np.uint8)
        with os_errors(f"{self.path}: tensor '{span.name}' at byte {span.start}"):
            self.file.seek(span.start)
            got = self.file.readinto(out.data) if span.nbytes else 0  # type: ignore[attr-defined]
        self.check_read(span, got)
        return out

    def pieces_of(self, span: Span) -> Iterator[bytes]:
        """The same bytes, CHUNK at a time."""
        got = 0
        with os_errors(f"{self.path}: tensor '{span.name}' at byte {span.start}"):
            while got < span.nbytes:
                self.file.seek(span.start + got)  # another tensor may be read in between
                part = self.file.read(min(CHUNK, span.nbytes - got))
                if not part:
                    break
                got += len(part)
                yield part
        self.check_read(span, got)

    def check_read(self, span: Span, got: int) -> None:
        """Demand that all bytes came, and that nobody has written to the file since it was opened."""
        if got != span.nbytes:
            raise FormatError(f"{self.path}: tensor '{span.name}'", f"{span.nbytes} bytes", f"{got}",
                              "the file was cut; get it again")
        if file_state(self.file) != self.state:
            raise FormatError(f"{self.path}: tensor '{span.name}'", "a file that stays as it is",
                              "changed while it was read", "wait for its writer to end, and run again")

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class TensorFile(OpenFile):
    """A file of arrays: `entries` by name, in its order; `metadata`, texts only in safetensors; `flags`, .apr only."""

    metadata: dict[str, Any]
    entries: dict[str, TensorEntry]
    flags: int = 0

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own. Raises as read_span."""
        entry = self.entries[name]
        return self.read_span(entry).view(entry.dtype.numpy).reshape(entry.shape)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor, CHUNK at a time. Raises as read."""
        return self.pieces_of(self.entries[name])

    def read_all(self) -> dict[str, np.ndarray]:
        """Every tensor by name."""
        return {name: self.read(name) for name in self.entries}


def open_checked(path: Path, check: Callable[[Path, BinaryIO, int], F]) -> F:
    """What `check` makes of an open regular file and its size; the file is closed again when that raises.

    Raises NotFoundError, StorageError, and what `check` raises.
    """
    file, size = open_regular(path)
    try:
        with os_errors(str(path)):
            return check(path, file, size)
    except BaseException:
        file.close()
        raise


@dataclass(frozen=True)
class StoredArray:
    """An array that a writer reads when its turn comes: a model need not fit in memory to be written."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        """Number of sizes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


Writable = np.ndarray | StoredArray


def file_state(file: BinaryIO) -> tuple[int, int]:
    """Size and time of change (ns) of an open file: they differ when somebody wrote to it."""
    with os_errors("the open file"):
        info = os.fstat(file.fileno())
    return info.st_size, info.st_mtime_ns


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


def checked_tiling(where: str, entries: Mapping[str, Span], start: int, end: int, align: int) -> None:
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


def raw_bytes(array: Writable) -> memoryview:
    """The bytes of an array in row-major order; a view where it is contiguous. A StoredArray is read."""
    if isinstance(array, StoredArray):
        announced, array = array, array.read()
        if (array.shape, array.dtype) != (announced.shape, announced.dtype):
            raise ShapeError("array to write", f"{announced.dtype} {list(announced.shape)}",
                             f"{array.dtype} {list(array.shape)}", "this is a defect of its reader")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
