"""A whole model in one .apr file: configuration, parameters, tokenizer, and the other text files of its maker.

The configuration is stored as its maker's config.json under `hf_config`; the flat keys beside it are for upstream's
readers. The text files are under `hf_assets` by their names, the tokenizer under `tokenizer.json`. Every parameter of
the model is filled from the file and every tensor of the file is used, or the load fails: a dropped bias cannot pass
unseen.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import TransformerConfig
from apr.errors import ConfigError, FormatError
from apr.formats.apr_file import open_apr, write_apr
from apr.formats.facts import eos_facts, eos_ids, tensor_facts
from apr.formats.source import ASSETS, FLOATS, ModelSource, check_finite, check_names
from apr.formats.stored import rounded_arrays, stored_arrays, written_config
from apr.formats.tensors import TensorFile, Writable
from apr.hf_config import config_facts, from_hf, to_hf, with_dtype
from apr.params import param_specs, parameter_count
from apr.paths import override_record
from apr.strict import MAX_JSON_BYTES

SPLIT_HALF = 2  # upstream's rope_type: 0 pairs neighbours, 2 pairs halves
TOKENIZER, OTHERS = "tokenizer.json", "hf_assets"  # keys of the metadata
MAX_TEXTS = MAX_JSON_BYTES - 2**20  # bytes of all text files; the rest is for configuration and flat keys
_JSON_SPACE = re.compile(r'("(?:[^"\\]++|\\.)*+")|[ \t\r\n]+', re.DOTALL)


def model_metadata(config: TransformerConfig, name: str, tokenizer_json: str | None, eos_id: int | None,
                   hf_config: Mapping[str, Any] | None = None,
                   assets: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The metadata of a model's .apr file; `hf_config` and `assets` are its maker's, where it has one."""
    out: dict[str, Any] = {
        "name": name, "version": "0.1.0", "format": "apr-model", "model_type": config.hf_model_type,
        "architecture": config.hf_model_type, "hf_architecture": config.hf_architecture,
        "hf_model_type": config.hf_model_type, "hidden_size": config.C, "num_layers": config.L, "num_heads": config.NH,
        "num_kv_heads": config.NKV, "head_dim": config.HS, "intermediate_size": config.F, "vocab_size": config.V,
        "max_position_embeddings": config.max_position_embeddings, "rope_theta": config.rope_theta,
        "rope_type": SPLIT_HALF, "rms_norm_eps": config.rms_norm_eps,
        "param_count": parameter_count(config), "hf_config": dict(hf_config or to_hf(config))}
    texts = dict(assets or {})
    if tokenizer_json is not None:
        texts[TOKENIZER] = tokenizer_json
    texts = fitting(texts)
    if TOKENIZER in texts:
        out.update({TOKENIZER: texts.pop(TOKENIZER), "tokenizer.eos_token_id": eos_id})
    if texts:
        out[OTHERS] = texts
    return out


def fitting(texts: dict[str, str]) -> dict[str, str]:
    """The text files as they are, or without the space between JSON's values where they would not fit into a file.

    Raises FormatError when they do not fit even so.
    """
    def size(of: dict[str, str]) -> int:
        return len(json.dumps(of, ensure_ascii=False).encode("utf-8"))

    if size(texts) <= MAX_TEXTS:
        return texts
    less = {name: _JSON_SPACE.sub(r"\1", text) if name.endswith(".json") else text for name, text in texts.items()}
    if size(less) > MAX_TEXTS:
        raise FormatError("text files of the model", f"at most {MAX_TEXTS} bytes in an .apr file", f"{size(less)}",
                          "leave out vocab.json and merges.txt, which tokenizer.json repeats")
    return less


def config_from_metadata(metadata: Mapping[str, Any], where: str) -> TransformerConfig:
    """The configuration in a file's metadata. Raises FormatError when there is none or its two spellings disagree."""
    if "hf_config" not in metadata:
        raise FormatError(f"{where}: metadata", "'hf_config', the model's configuration", "none",
                          "give a model that apr wrote")
    config = from_hf(metadata["hf_config"], f"{where}: hf_config")
    for key, value in model_metadata(config, "", None, None).items():
        if key not in ("name", "version", "format", "hf_config") and key in metadata and metadata[key] != value:
            raise FormatError(f"{where}: {key}", f"{value!r}, as in hf_config", repr(metadata[key])[:60],
                              "the file contradicts itself")
    return config


def assets_from_metadata(metadata: Mapping[str, Any], where: str) -> dict[str, str]:
    """The text files in a file's metadata, by Hugging Face's names. Raises FormatError for any other name or value."""
    others = metadata.get(OTHERS, {})
    if not isinstance(others, dict) or not others.keys() <= {*ASSETS} - {TOKENIZER}:
        raise FormatError(f"{where}: {OTHERS}", "texts by name: " + ", ".join(n for n in ASSETS if n != TOKENIZER),
                          ", ".join(map(repr, others))[:60] if isinstance(others, dict) else type(others).__name__,
                          "give a model that apr wrote")
    found = {**({TOKENIZER: metadata[TOKENIZER]} if TOKENIZER in metadata else {}), **others}
    for name, text in found.items():
        if not isinstance(text, str):
            raise FormatError(f"{where}: {name}", "a text", type(text).__name__, "give a model that apr wrote")
    return {name: found[name] for name in ASSETS if name in found}


def save_model(path: Path, config: TransformerConfig, arrays: Mapping[str, np.ndarray], name: str,
               tokenizer_json: str | None = None, eos_id: int | None = None, *, dtype: str | None = None,
               hf_config: Mapping[str, Any] | None = None, assets: Mapping[str, str] | None = None) -> None:
    """Write a model that was computed here, active overrides in its metadata; `path` is replaced whole or not at all.

    arrays by name, rounded to `dtype` (F32, F16, BF16; None: as they are). `hf_config` and `assets` are what the
    model's maker gave, to be kept; `tokenizer_json` takes the place of theirs. Raises StorageError, FormatError for a
    value that dtype cannot hold, ConfigError when hf_config is of another model.
    """
    if hf_config is not None and from_hf(dict(hf_config), "hf_config") != config:
        raise ConfigError("hf_config", "the configuration of this model", "another", "give its own")
    values = dict(hf_config or {**to_hf(config), **({} if eos_id is None else {"eos_token_id": eos_id})})
    metadata = {**model_metadata(config, name, tokenizer_json, eos_id,
                                 with_dtype(values, dtype) if dtype is not None else values, assets),
                **override_record()}
    written: Mapping[str, Writable] = arrays if dtype is None else rounded_arrays(arrays, dtype)
    write_apr(path, written, metadata)


def write_apr_model(path: Path, source: ModelSource, dtype: str | None = None, name: str | None = None,
                    done: Callable[[str], None] = lambda tensor: None) -> None:
    """Write an open model, one tensor in memory at a time; `path` is replaced whole or not at all.

    dtype F32, F16, BF16, or None for each tensor's own (F32 where that is a quantised one); `name` of the model, that
    of its folder or file if None; `done` is told the name of each tensor. Raises as save_model.
    """
    home = source.path.resolve()
    ids, _ = eos_ids(source.assets, source.hf_config, str(source.path))
    metadata = model_metadata(source.config, name or (home.name if home.is_dir() else home.stem), None,
                              ids[0] if ids else None, written_config(source, dtype), source.assets)
    write_apr(path, stored_arrays(source, dtype, done), metadata)


def open_apr_model(path: Path) -> ModelSource:
    """Open a model's .apr file; every checksum is verified, and tensors are read when asked for.

    Raises NotFoundError, FormatError, IntegrityError, ConfigError, StorageError.
    """
    return _source(open_apr(path))


def _source(opened: TensorFile) -> ModelSource:
    where, metadata = str(opened.path), opened.metadata
    try:
        config = config_from_metadata(metadata, where)
        assets = assets_from_metadata(metadata, where)
        for name, entry in opened.entries.items():
            if entry.dtype.name not in (*FLOATS, "F64"):
                raise FormatError(f"{where}: tensor '{name}'", "a floating-point dtype", str(entry.dtype.numpy),
                                  "give the file of this model")
        values = dict(metadata["hf_config"])
        dtypes = {name: _as_read(e.dtype.name) for name, e in opened.entries.items()}
        facts = [*config_facts(values, config), *eos_facts(assets, values, where), *tensor_facts(config, dtypes),
                 "text files: " + (", ".join(assets) or "none")]
    except BaseException:
        opened.close()
        raise

    def read(name: str) -> np.ndarray:
        array = opened.read(name)
        with np.errstate(all="ignore"):  # a float64 beyond float32 is found below, as the infinity that it becomes
            return array.astype(np.float32) if array.dtype == np.float64 else array

    return ModelSource(opened.path, "apr", config, values, assets, {n: e.shape for n, e in opened.entries.items()},
                       dtypes, read, opened.close, tuple(facts))


def _as_read(stored: str) -> str:
    """Upstream wrote float64 too; it is read as float32."""
    return "F32" if stored == "F64" else stored


def load_model(path: Path) -> tuple[TransformerConfig, dict[str, np.ndarray], dict[str, Any]]:
    """Configuration, parameters (float32 by name) and metadata of a model file.

    Raises NotFoundError, FormatError, IntegrityError, ConfigError.
    """
    opened = open_apr(path)
    with _source(opened) as source:
        params = {s.name: source.read(s.name).astype(np.float32, copy=False) for s in param_specs(source.config)}
        return source.config, params, opened.metadata


def check_coverage(config: TransformerConfig, arrays: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """`arrays` as float32 by name, if they are exactly the model's parameters, of the right shapes and finite.

    Raises FormatError naming the tensors that are missing, not wanted, of another shape or not finite.
    """
    check_names(config, {name: array.shape for name, array in arrays.items()}, where)
    out = {}
    for spec in param_specs(config):
        place, array = f"{where}: tensor '{spec.name}'", arrays[spec.name]
        if array.dtype.kind in "iub":
            raise FormatError(place, "a floating-point dtype", str(array.dtype), "give the file of this model")
        with np.errstate(all="ignore"):  # a float64 beyond float32 is found below, as the infinity that it becomes
            out[spec.name] = array.astype(np.float32, copy=False)
        check_finite(out[spec.name], place)
    return out
