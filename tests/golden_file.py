"""Reads the golden files: NumPy, the standard library, and nothing of apr but the config decoder under test."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apr.config import TransformerConfig
from apr.hf_config import from_hf

FOLDER = Path(__file__).parent / "golden"
NAMES = ("llama", "llama3", "qwen2", "qwen3", "mistral")


@dataclass
class Golden:
    """One golden file: the arrays by name and the settings that made them."""

    config: TransformerConfig
    adamw: dict
    arrays: dict[str, np.ndarray]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose name starts with `prefix.`, without it."""
        return {k.removeprefix(prefix + "."): v for k, v in self.arrays.items() if k.startswith(prefix + ".")}


def load(name: str) -> Golden:
    """The golden file of this name, its hash checked."""
    data = (FOLDER / f"{name}.safetensors").read_bytes()
    expected = dict(reversed(line.split()) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    assert hashlib.sha256(data).hexdigest() == expected[f"{name}.safetensors"], "a golden file was altered"
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    meta = header.pop("__metadata__")
    kinds = {"F32": "<f4", "F64": "<f8", "I32": "<i4"}
    arrays = {}
    for key, entry in header.items():
        start, end = (8 + size + o for o in entry["data_offsets"])
        arrays[key] = np.frombuffer(data[start:end], kinds[entry["dtype"]]).reshape(entry["shape"])
    return Golden(from_hf(json.loads(meta["config"]), f"{name} config"), json.loads(meta["adamw"]), arrays)
