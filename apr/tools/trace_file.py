"""A saved trace: a safetensors file with a tensor per point, named as the tap, and what they are of in its metadata.

Any safetensors library reads it. What apr reads must be whole: exactly the points that the metadata lists, each of the
shape that the configuration gives it.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from apr.config import TransformerConfig, decode, encode
from apr.errors import ConfigError, FormatError
from apr.files import new_path, os_errors
from apr.formats.hf_folder import CONFIG
from apr.formats.safetensors import open_safetensors, write_safetensors
from apr.formats.tensors import TensorFile
from apr.strict import parse_json
from apr.tools.trace import Trace, statistics
from apr.tools.trace_points import all_points, point_shape

NAME, KEY, VERSION = "trace.safetensors", "apr_trace", 1
KEYS = {"version", "model", "stored", "config", "weights_sha256", "device", "precision", "tokens", "loss", "stages",
        "points"}
FIX = "save the trace again"


def is_trace(path: Path) -> bool:
    """Whether a path is to be opened as a saved trace: a folder of one and no model, or any single safetensors file."""
    if not path.is_dir():
        return path.suffix == ".safetensors"
    return os.path.lexists(path / NAME) and not os.path.lexists(path / CONFIG)


def trace_path(path: Path) -> Path:
    """The file of a saved trace, given it or its folder."""
    return path / NAME if path.is_dir() else path


def check_free(folder: Path) -> None:
    """Raise ConfigError when a trace cannot be saved in the folder: one is there, or no folder can be made."""
    with os_errors(str(folder)):
        taken = os.path.lexists(folder / NAME)
        possible = folder.is_dir() or (folder.parent.is_dir() and not os.path.lexists(folder))
    if taken or not possible:
        raise ConfigError(str(folder / NAME if taken else folder), "a folder without a trace, or to be made in another",
                          "a trace there" if taken else "neither", "choose another")


def save_trace(trace: Trace, folder: Path) -> Path:
    """Write the arrays of a trace into `folder`, which is made; the file is there whole or not at all.

    Raises ConfigError for a trace that keeps no arrays or when the file exists, StorageError.
    """
    if not trace.arrays:
        raise ConfigError("trace to save", "at least one point", "none", "choose other stages or layers")
    points = list(trace.arrays)
    values = {"version": VERSION, "model": trace.model, "stored": trace.stored, "config": encode(trace.config),
              "weights_sha256": trace.weights_sha256, "device": trace.device, "precision": trace.precision,
              "tokens": trace.tokens, "loss": trace.loss if trace.loss is None or math.isfinite(trace.loss) else None,
              "stages": list(dict.fromkeys(p.rpartition(".")[2] for p in points)), "points": points}
    with os_errors(str(folder)):
        folder.mkdir(exist_ok=True)
    with new_path(folder / NAME) as temporary:
        write_safetensors(temporary, trace.arrays, {KEY: json.dumps(values, allow_nan=False)})
    return folder / NAME


def open_trace(path: Path) -> Trace:
    """A saved trace, all of it in memory; `path` is its folder or file.

    Raises NotFoundError, StorageError, FormatError: cut, no trace, tensors that were renamed, removed or added, a shape
    that is not the configuration's.
    """
    with open_safetensors(trace_path(path)) as opened:
        values = _values(opened)
        config, tokens, points = values["config"], values["tokens"], values["points"]
        _check_points(opened, config, points, len(tokens))
        arrays = {name: opened.read(name) for name in points}
    return Trace(values["model"], tuple(values["stored"]), config, values["device"], values["precision"], tuple(tokens),
                 values["loss"], values["weights_sha256"], {n: statistics(a) for n, a in arrays.items()}, arrays)


def _values(opened: TensorFile) -> dict[str, Any]:
    """The metadata, every value of its type; `config` decoded."""
    where = f"{opened.path}: {KEY}"

    def refuse(expected: str, found: str) -> NoReturn:
        raise FormatError(where, expected, found, FIX)

    if KEY not in opened.metadata:
        raise FormatError(str(opened.path), "a trace that apr saved", "a safetensors file of something else",
                          "check the path")
    values = parse_json(opened.metadata[KEY].encode(), where)
    if not isinstance(values, dict) or values.get("version") != VERSION:
        refuse(f"version {VERSION}", repr(values.get("version") if isinstance(values, dict) else values)[:40])
    if values.keys() != KEYS:
        refuse("its keys", f"others: {sorted(values.keys() ^ KEYS)[0]!r}")
    try:
        config = decode(TransformerConfig, values["config"], "config")
    except ConfigError as e:
        refuse("the configuration of a model", str(e))
    texts = all(isinstance(values[key], str) for key in ("model", "device"))
    hashed = values["weights_sha256"] is None or isinstance(values["weights_sha256"], str)
    loss = values["loss"] is None or type(values["loss"]) in (int, float)
    lists = all(isinstance(values[key], list) and all(isinstance(v, str) for v in values[key])
                for key in ("stored", "stages", "points"))
    if not (texts and hashed and loss and lists and values["precision"] in ("fp32", "bf16")):
        refuse("values of their types", "others")
    tokens = values["tokens"]
    if not (isinstance(tokens, list) and 1 <= len(tokens) <= config.max_position_embeddings
            and all(type(t) is int and 0 <= t < config.V for t in tokens)):
        refuse("token ids of the model", "others")
    return {**values, "config": config}


def _check_points(opened: TensorFile, config: TransformerConfig, points: list[str], tokens: int) -> None:
    """Demand known points in their order, and exactly their tensors, float32, in their shapes."""
    listed = set(points)
    ordered = [name for name in all_points(config, True) if name in listed]
    if not points or points != ordered:
        odd = next((name for name in points if name not in ordered), "twice, in another order, or none")
        raise FormatError(f"{opened.path}: {KEY}", "points of the model, each once, in the order of computation",
                          repr(odd)[:80], FIX)
    for names, expected, found in ((listed - opened.entries.keys(), "a tensor for each point", "none"),
                                   (opened.entries.keys() - listed, "only the points that the metadata lists", "more")):
        if names:
            raise FormatError(f"{opened.path}: tensor {min(names)!r}", expected, found, FIX)
    for name in points:
        entry, shape = opened.entries[name], point_shape(name, config, tokens)
        if entry.dtype.name != "F32" or entry.shape != shape:
            raise FormatError(f"{opened.path}: tensor '{name}'", f"F32 {list(shape)}, by the configuration",
                              f"{entry.dtype.name} {list(entry.shape)}", FIX)


def facts(trace: Trace) -> Mapping[str, Any]:
    """What a report says of a trace, as plain data."""
    return {"model": trace.model, "family": trace.config.hf_model_type, "stored": list(trace.stored),
            "weights_sha256": trace.weights_sha256, "device": trace.device, "precision": trace.precision,
            "tokens": list(trace.tokens), "loss": trace.loss}
