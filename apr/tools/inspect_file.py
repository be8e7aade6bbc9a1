"""What a file or folder holds, verified: .apr, safetensors, model folder, checkpoint, run, tokenizer, token shards."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from apr.data.shards import open_shards, read_manifest
from apr.data.tokenizer import MAX_VOCABULARY, Tokenizer
from apr.dtypes import BY_NAME
from apr.errors import FormatError, NotFoundError
from apr.files import sha256_file
from apr.formats.apr_file import FLAGS, open_apr
from apr.formats.gguf_file import open_gguf
from apr.formats.gguf_model import open_gguf_model
from apr.formats.model_file import config_from_metadata
from apr.formats.open_model import open_model
from apr.formats.safetensors import open_safetensors
from apr.formats.tensors import TensorEntry
from apr.hf_config import to_hf
from apr.params import parameter_count
from apr.strict import parse_json
from apr.train.checkpoint import MANIFEST, read_checkpoint, steps
from apr.train.log import NAME


def inspect(path: Path) -> dict[str, Any]:
    """A description of `path` as plain data; `kind` says what it is. Everything that has a checksum is verified.

    Raises NotFoundError, FormatError, IntegrityError, ConfigError, StorageError.
    """
    if not path.exists():
        raise NotFoundError(str(path), "a file or folder", "nothing there", "check the path")
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".apr":
        return _apr(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.suffix == ".json":
        return _tokenizer(path)
    if path.suffix == ".bin":
        return _shards(path)
    raise FormatError(str(path), ".apr, .safetensors, .gguf, tokenizer .json, .bin or a folder", f"'{path.suffix}'",
                      "check the path")


def _folder(path: Path) -> dict[str, Any]:
    if (path / "run.json").is_file():
        return _run(path)
    if (path / "state.json").is_file() or (path / "optimizer.safetensors").is_file():
        return _checkpoint(path)
    if any(path.glob("*.bin")):
        return _shards(path)
    if (path / MANIFEST).is_file():
        read_manifest(path / MANIFEST)
    if (path / "config.json").is_file():
        return _model(path)
    if (path / "tokenizer.json").is_file() or (path / "vocab.json").is_file():
        return _tokenizer(path)
    raise FormatError(str(path), "a run, checkpoint, model, shard folder or tokenizer folder", "none of these",
                      "check the path")


def _tensors(entries: dict[str, TensorEntry]) -> list[dict[str, Any]]:
    return [{"name": e.name, "dtype": e.dtype.name, "shape": list(e.shape), "bytes": e.nbytes}
            for e in entries.values()]


def _apr(path: Path) -> dict[str, Any]:
    opened = open_apr(path)
    opened.close()
    out: dict[str, Any] = {"kind": "apr", "path": str(path), "sha256": sha256_file(path), "checksum": "ok",
                           "flags": [name for bit, name in FLAGS.items() if opened.flags & bit]}
    meta = opened.metadata
    if "hf_config" in meta:
        config = config_from_metadata(meta, str(path))
        out.update(config=to_hf(config), parameters=parameter_count(config))
    if "tokenizer.json" in meta:
        out["tokenizer"] = _describe(Tokenizer.from_json(str(meta["tokenizer.json"]).encode(), str(path)))
    if isinstance(meta.get("hf_assets"), dict):
        out["text_files"] = sorted(meta["hf_assets"])
    out["metadata"] = {k: v for k, v in meta.items() if k not in ("hf_config", "tokenizer.json", "hf_assets")}
    out["tensors"] = _tensors(opened.entries)
    return out


def _safetensors(path: Path) -> dict[str, Any]:
    opened = open_safetensors(path)
    opened.close()
    return {"kind": "safetensors", "path": str(path), "sha256": sha256_file(path), "metadata": opened.metadata,
            "tensors": _tensors(opened.entries)}


def _model(path: Path) -> dict[str, Any]:
    """A Hugging Face folder. Its values are not read: nothing in it says what they should be."""
    with open_model(path) as source:
        return {"kind": "model", "path": str(path), "config": to_hf(source.config),
                "parameters": parameter_count(source.config), "facts": list(source.facts),
                "tensors": [{"name": name, "dtype": source.dtypes[name], "shape": list(shape),
                             "bytes": math.prod(shape) * BY_NAME[source.dtypes[name]].size}
                            for name, shape in source.shapes.items()]}


def _gguf(path: Path) -> dict[str, Any]:
    with open_gguf(path) as opened:
        metadata = {key: value if not isinstance(value, (list, np.ndarray)) else f"{len(value)} values"
                    for key, value in opened.metadata.items()}
        out: dict[str, Any] = {"kind": "gguf", "path": str(path), "sha256": sha256_file(path),
                               "version": opened.version}
        tensors = [{"name": e.name, "dtype": e.type, "shape": list(e.shape), "bytes": e.nbytes}
                   for e in opened.entries.values()]
    with open_gguf_model(path) as source:
        out.update(config=to_hf(source.config), parameters=parameter_count(source.config), facts=list(source.facts))
    return {**out, "metadata": metadata, "tensors": tensors}


def _checkpoint(path: Path) -> dict[str, Any]:
    found = read_checkpoint(path)
    s = found.state
    for key in ("parameters_sha256", "optimizer_sha256", "loop", "data"):
        if key not in s:
            raise FormatError(f"{path / 'state.json'}: {key}", "a value", "none", "use another checkpoint")
    return {"kind": "checkpoint", "path": str(path), "checksum": "ok", "step": s["step"], "config": to_hf(found.config),
            "parameters": parameter_count(found.config), "parameters_sha256": s["parameters_sha256"],
            "optimizer_sha256": s["optimizer_sha256"], "loop": s["loop"], "data": s["data"],
            "tensors": [{"name": n, "dtype": "F32", "shape": list(a.shape), "bytes": a.nbytes}
                        for n, a in found.params.items()]}


def _run(path: Path) -> dict[str, Any]:
    events = _events(path / NAME) if (path / NAME).is_file() else []
    checkpoints = []
    for folder in steps(path / "ckpt"):
        read_checkpoint(folder)
        checkpoints.append(folder.name)
    return {"kind": "run", "path": str(path), "steps": sum(e.get("event") == "step" for e in events),
            "checkpoints": checkpoints, "checksum": "ok",
            "end": next((e for e in reversed(events) if e.get("event") == "end"), None)}


def _events(path: Path) -> list[dict[str, Any]]:
    events = []
    data = path.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]  # a killed run may have left half a line; resuming cuts it off
    for number, line in enumerate(whole.splitlines(), 1):
        event = parse_json(line, f"{path} line {number}")
        if not isinstance(event, dict):
            raise FormatError(f"{path} line {number}", "an event, a JSON object", type(event).__name__,
                              "restore the log")
        events.append(event)
    return events


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id, "sha256": tokenizer.sha256}


def _tokenizer(path: Path) -> dict[str, Any]:
    return {"kind": "tokenizer", "path": str(path), **_describe(Tokenizer.load(path))}


def _shards(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path / MANIFEST) if os.path.lexists(path / MANIFEST) else None
    tokenizer = Tokenizer.load(path) if manifest and (path / "tokenizer.json").is_file() else None
    source = open_shards(path, tokenizer, manifest["vocab_size"] if manifest else MAX_VOCABULARY)
    out = {"kind": "shards", "path": str(path), "tokens": source.tokens,
           "documents": len(source.starts) if manifest else None,
           "largest_id": int(source.histogram.nonzero()[0].max()), "entropy_bits": round(source.check_entropy(), 4)}
    if manifest is not None:
        out.update(checksum="ok", vocab_size=manifest["vocab_size"], tokenizer_sha256=manifest["tokenizer_sha256"],
                   dtype=manifest["dtype"])
    return out
