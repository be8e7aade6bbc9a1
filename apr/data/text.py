"""Documents from text files, source trees, JSONL and Parquet, in a fixed order.

A file named by the user must be readable, or the run ends; in a folder, what is no text is passed over and counted.
"""

import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from apr.errors import ConfigError, FormatError, NotFoundError
from apr.files import open_regular, os_errors, read_bytes
from apr.strict import MAX_JSON_BYTES, parse_json

MAX_DOCUMENT = 64 * 2**20  # bytes; a longer "text" is a mistake, and would be one training document
SOURCES_SKIPPED = {"test", "tests", "idle_test", "site-packages", "lib2to3", "idlelib", "turtledemo", "ensurepip",
                   "encodings", "pydoc_data"}  # tests, other packages, and tables that are no prose


def standard_library(skipped: Counter[str]) -> Iterator[str]:
    """The sources of this Python's standard library, a text that every machine has; see SOURCES_SKIPPED."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [p for p in root.rglob("*.py") if not SOURCES_SKIPPED & set(p.relative_to(root).parts[:-1])]
    for path in sorted(found, key=lambda p: p.relative_to(root).as_posix()):
        yield from _folder_member(path, "", skipped)


def documents(paths: list[Path], content_field: str, skipped: Counter[str]) -> Iterator[str]:
    """The texts under `paths`: a file is one document (JSONL and Parquet: one per row), a folder all its files, sorted.

    `content_field` names the text in JSONL and Parquet rows; `skipped` counts, by reason, the files of folders that are
    no text. Raises NotFoundError, FormatError naming file and offset or line, ConfigError for Parquet without pyarrow.
    """
    for path in paths:
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                if any(part.startswith(".") for part in file.relative_to(path).parts):
                    skipped["hidden"] += 1
                elif file.is_symlink():
                    skipped["link"] += 1
                else:
                    yield from _folder_member(file, content_field, skipped)
        elif path.exists():
            yield from _not_empty(_file(path, content_field), skipped)
        else:
            raise NotFoundError(str(path), "a file or folder of text", "nothing there", "check the path")


def _folder_member(path: Path, content_field: str, skipped: Counter[str]) -> Iterator[str]:
    if path.suffix in (".jsonl", ".parquet"):
        yield from _not_empty(_file(path, content_field), skipped)
        return
    try:
        text = read_text(path)
    except FormatError:
        skipped["not UTF-8 text"] += 1
        return
    yield from _not_empty([text], skipped)


def _not_empty(texts: Iterable[str], skipped: Counter[str]) -> Iterator[str]:
    for text in texts:
        if text:
            yield text
        else:
            skipped["empty"] += 1


def _file(path: Path, content_field: str) -> Iterator[str]:
    if path.suffix == ".jsonl":
        yield from _jsonl(path, content_field)
    elif path.suffix == ".parquet":
        yield from _parquet(path, content_field)
    else:
        text = read_text(path)
        if not text:
            raise FormatError(str(path), "some text", "an empty file", "give another file")
        yield text


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises FormatError with the offset of the first byte that is not text."""
    data = read_bytes(path, MAX_DOCUMENT)
    if b"\0" in data:
        raise FormatError(str(path), "UTF-8 text", f"a zero byte at offset {data.index(0)}",
                          "give text, or remove the file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise FormatError(str(path), "UTF-8 text", f"byte 0x{data[e.start]:02x} at offset {e.start}",
                          "convert the file to UTF-8") from None


def _content(row: Any, content_field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(content_field), str):
        found = f"fields {', '.join(map(str, row))}"[:80] if isinstance(row, dict) else type(row).__name__
        raise FormatError(where, f"an object with text in '{content_field}'", found, "set --content-field")
    return row[content_field]


def _jsonl(path: Path, content_field: str) -> Iterator[str]:
    f, _ = open_regular(path)
    with f, os_errors(str(path)):
        number = 0
        while line := f.readline(MAX_JSON_BYTES + 1):  # of which it holds two copies for a moment
            number += 1
            if not line.isspace():  # strip() would copy it
                where = f"{path} line {number}"
                yield _content(parse_json(line, where), content_field, where)


def _largest_chunk(file: Any, column: str) -> int:
    """Bytes of the column's largest chunk, without compression: no single text is larger."""
    groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    return max((c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column), default=0)


def _parquet(path: Path, content_field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ConfigError(str(path), "the 'parquet' extra for Parquet files", "no pyarrow",
                          "pip install 'apr[parquet]'") from None
    open_regular(path)[0].close()
    try:
        file = parquet.ParquetFile(path)
        if content_field not in file.schema_arrow.names:
            raise FormatError(str(path), f"a column '{content_field}'", ", ".join(file.schema_arrow.names)[:80],
                              "set --content-field")
        number = 0
        rows = max(1, min(256, MAX_DOCUMENT // max(1, _largest_chunk(file, content_field))))
        for batch in file.iter_batches(batch_size=rows, columns=[content_field]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield _content({content_field: text}, content_field, f"{path} row {number}")
    except (OSError, ValueError, ArrowException) as e:
        raise FormatError(str(path), "a Parquet file", str(e)[:120], "give a complete Parquet file") from None
