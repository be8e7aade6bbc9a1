"""A whole model in one .apr file: configuration, parameters, tokenizer.

The configuration is stored as a Hugging Face config.json under `hf_config`; the flat keys beside it are for upstream's
readers. Every parameter of the model is filled from the file and every tensor of the file is used, or the load fails: a
dropped bias cannot pass unseen.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import TransformerConfig
from apr.errors import FormatError
from apr.formats.apr_file import open_apr, write_apr
from apr.hf_config import from_hf, to_hf
from apr.params import param_specs, parameter_count

SPLIT_HALF = 2  # upstream's rope_type: 0 pairs neighbours, 2 pairs halves


def model_metadata(config: TransformerConfig, name: str, tokenizer_json: str | None,
                   eos_id: int | None) -> dict[str, Any]:
    """The metadata of a model's .apr file."""
    out: dict[str, Any] = {
        "name": name, "version": "0.1.0", "format": "apr-model", "model_type": config.hf_model_type,
        "architecture": config.hf_model_type, "hf_architecture": config.hf_architecture,
        "hf_model_type": config.hf_model_type, "hidden_size": config.C, "num_layers": config.L, "num_heads": config.NH,
        "num_kv_heads": config.NKV, "head_dim": config.HS, "intermediate_size": config.F, "vocab_size": config.V,
        "max_position_embeddings": config.max_position_embeddings, "rope_theta": config.rope_theta,
        "rope_type": SPLIT_HALF, "rms_norm_eps": config.rms_norm_eps,
        "param_count": parameter_count(config), "hf_config": to_hf(config)}
    if tokenizer_json is not None:
        out.update({"tokenizer.json": tokenizer_json, "tokenizer.eos_token_id": eos_id})
    return out


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


def save_model(path: Path, config: TransformerConfig, arrays: Mapping[str, np.ndarray], name: str,
               tokenizer_json: str | None = None, eos_id: int | None = None) -> None:
    """Write a model. Raises StorageError; `path` is replaced whole or not at all."""
    write_apr(path, arrays, model_metadata(config, name, tokenizer_json, eos_id))


def load_model(path: Path) -> tuple[TransformerConfig, dict[str, np.ndarray], dict[str, Any]]:
    """Configuration, parameters (float32 by name) and metadata of a model file.

    Raises NotFoundError, FormatError, IntegrityError, ConfigError.
    """
    with open_apr(path) as opened:
        config = config_from_metadata(opened.metadata, str(path))
        return config, check_coverage(config, opened.read_all(), str(path)), opened.metadata


def check_coverage(config: TransformerConfig, arrays: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """`arrays` as float32 by name, if they are exactly the model's parameters, of the right shapes and finite.

    Raises FormatError naming the tensors that are missing, not wanted, of another shape or not finite.
    """
    specs = {s.name: s for s in param_specs(config)}
    missing, extra = sorted(specs.keys() - arrays.keys()), sorted(arrays.keys() - specs.keys())
    if missing or extra:
        raise FormatError(where, f"exactly the {len(specs)} tensors of this {config.hf_model_type}",
                          f"missing {missing[:5]} ({len(missing)}), not used {extra[:5]} ({len(extra)})",
                          "give the file of this model")
    out = {}
    for name, spec in specs.items():
        array = arrays[name]
        if array.shape != spec.shape:
            raise FormatError(f"{where}: tensor '{name}'", f"shape {list(spec.shape)}", f"{list(array.shape)}",
                              "give the file of this model")
        if array.dtype.kind in "iub":
            raise FormatError(f"{where}: tensor '{name}'", "a floating-point dtype", str(array.dtype),
                              "give the file of this model")
        with np.errstate(all="ignore"):  # what overflows or is no number is found below, and no warning on a terminal
            values = array.astype(np.float32, copy=False)
            total = float(values.sum(dtype=np.float64))
        if not math.isfinite(total):
            bad = int(np.argmax(~np.isfinite(values.reshape(-1))))
            raise FormatError(f"{where}: tensor '{name}'", "finite values",
                              f"{values.reshape(-1)[bad]} at element {bad}", "the weights are damaged")
        out[name] = values
    return out
