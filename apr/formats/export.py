"""Models written for others: Hugging Face folders, safetensors files, .apr files; each read again and compared first.

A new file or folder gets its name only when that comparison has passed: what carries the name is the model.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apr.errors import IntegrityError
from apr.files import new_path, os_errors, write_durable
from apr.formats.gguf_write import check_gguf, write_gguf
from apr.formats.hf_folder import CONFIG, INDEX, SINGLE, open_hf
from apr.formats.model_file import fitting, open_apr_model, write_apr_model
from apr.formats.safetensors import open_safetensors, write_safetensors
from apr.formats.source import ModelSource
from apr.formats.stored import rounded, stored_arrays, written_config, written_dtype
from apr.formats.tensors import StoredArray, raw_bytes

SHARD_BYTES = 5 * 10**9  # of a model's weights in one file; the hub refuses very large ones
LABEL = {"format": "pt"}  # transformers reads no safetensors file without it

Done = Callable[[str], None]


def _nothing(name: str) -> None:
    """The default of `done`."""


def export_hf(source: ModelSource, folder: Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES,
              done: Done = _nothing) -> list[str]:
    """Write a Hugging Face folder; returns the names of its files.

    dtype F32, F16, BF16, or None for each tensor's own. config.json is the maker's, its dtype following the weights;
    text files are verbatim; a tied head is not written, as its maker did not; weights beyond `shard_bytes` are split.
    `done` is told each tensor's name twice: written, compared. Raises ConfigError when `folder` exists, FormatError for
    a value that dtype cannot hold, IntegrityError when what was written reads differently, StorageError.
    """
    with new_path(folder) as temporary:
        with os_errors(str(folder)):
            temporary.mkdir()
        text = json.dumps(written_config(source, dtype), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_durable(temporary / CONFIG, text.encode())
        for name, asset in source.assets.items():
            write_durable(temporary / name, asset.encode())
        _write_shards(temporary, stored_arrays(source, dtype, done), shard_bytes)
        with open_hf(temporary) as written:
            check_written(source, written, dtype, source.assets, done)
        return sorted(p.name for p in temporary.iterdir())


def _write_shards(folder: Path, arrays: dict[str, StoredArray], limit: int) -> None:
    shards: list[dict[str, StoredArray]] = [{}]
    size = 0
    for name, array in arrays.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    if len(shards) == 1:
        write_safetensors(folder / SINGLE, arrays, LABEL)
        return
    table = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, LABEL)
        table.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": sum(a.nbytes for a in arrays.values())}, "weight_map": table}
    write_durable(folder / INDEX, json.dumps(index, indent=2).encode())


def export_safetensors(source: ModelSource, path: Path, dtype: str | None = None, done: Done = _nothing) -> list[str]:
    """Write the weights alone into one safetensors file; arguments, result and errors as export_hf."""
    with new_path(path) as temporary:
        write_safetensors(temporary, stored_arrays(source, dtype, done), LABEL)
        with open_safetensors(temporary) as written:
            _compare(source, written.entries, written.read, dtype, str(path), done)
    return [path.name]


def export_apr(source: ModelSource, path: Path, dtype: str | None = None, name: str | None = None,
               done: Done = _nothing) -> list[str]:
    """Write an .apr file; arguments, result and errors as export_hf. `name` is the model's, kept in the file."""
    with new_path(path) as temporary:
        write_apr_model(temporary, source, dtype, name, done)
        with open_apr_model(temporary) as written:
            check_written(source, written, dtype, fitting(source.assets), done)
    return [path.name]


def export_gguf(source: ModelSource, path: Path, dtype: str | None = None, done: Done = _nothing
                ) -> tuple[list[str], list[str]]:
    """Write a GGUF file; dtype may be Q8_0 too. Arguments and errors as export_hf; returns the file, and facts."""
    with new_path(path) as temporary:
        written = write_gguf(temporary, source, dtype, done)
        return [path.name], [*written, *check_gguf(temporary, source, dtype, done)]


def check_written(source: ModelSource, written: ModelSource, dtype: str | None, assets: Mapping[str, str],
                  done: Done = _nothing) -> None:
    """Raise IntegrityError unless `written` is `source` rounded to `dtype`: tensors, configuration and text files."""
    where = str(written.path)
    if _text(written.hf_config) != _text(written_config(source, dtype)) or written.config != source.config:
        raise _differs(f"{where}: configuration")
    for name in sorted({*assets, *written.assets}):
        if written.assets.get(name) != assets.get(name):
            raise _differs(f"{where}: {name}")
    _compare(source, written.shapes, written.read, dtype, where, done)


def _compare(source: ModelSource, names: Mapping[str, Any], read: Callable[[str], np.ndarray], dtype: str | None,
             where: str, done: Done) -> None:
    if names.keys() != source.shapes.keys():
        raise _differs(f"{where}: names of the tensors")
    for name in source.shapes:
        expected = rounded(source.read(name), written_dtype(source, name, dtype), f"{source.path}: tensor '{name}'")
        found = read(name)
        if (found.dtype, found.shape) != (expected.dtype, expected.shape) or raw_bytes(found) != raw_bytes(expected):
            raise _differs(f"{where}: tensor '{name}'")
        done(name)


def _text(values: Any) -> str:
    return json.dumps(values, sort_keys=True)  # in which 1, 1.0 and true differ


def _differs(where: str) -> IntegrityError:
    return IntegrityError(where, "what was written", "something else on reading it again",
                          "the disk or this program is at fault; run again")
