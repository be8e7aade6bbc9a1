"""Hugging Face folders made by hand, without apr's writers, for the tests of what reads them."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from models import FAMILIES

from apr.config import TransformerConfig
from apr.hf_config import to_hf
from apr.params import param_specs

CODES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16",
         np.dtype(np.float64): "F64", np.dtype(np.int32): "I32"}
BF16 = np.dtype(ml_dtypes.bfloat16)
QWEN2, LLAMA, QWEN3 = FAMILIES["qwen2"], FAMILIES["llama"], FAMILIES["qwen3"]
MISTRAL = dataclasses.replace(LLAMA, hf_model_type="mistral", hf_architecture="MistralForCausalLM")
ALL = {**FAMILIES, "mistral": MISTRAL}
TEXTS = {"tokenizer.json": '{"version": "1.0",\n  "é": "a  b\\"  c"}\n', "merges.txt": "#version: 0.2\na b\n",
         "generation_config.json": '{\n  "eos_token_id": [5, 3],\n  "temperature": 0.7\n}\n',
         "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}\n",
         "tokenizer_config.json": '{"eos_token": "<|im_end|>"}'}


def random_arrays(config: TransformerConfig, dtype=np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters of a model."""
    rng = np.random.default_rng(seed)
    return {s.name: rng.standard_normal(s.shape).astype(dtype) for s in param_specs(config)}


def safetensors_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """A safetensors file as its description says, in few lines."""
    header, position = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape),
                        "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(a.tobytes() for a in arrays.values())


def write_folder(folder: Path, config: TransformerConfig, arrays: dict[str, np.ndarray], shards: int = 1,
                 values: dict | None = None, assets: dict[str, str] | None = None) -> Path:
    """A folder as transformers writes it, the weights in one file or in `shards`; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf(config) if values is None else values))
    for name, text in (assets or {}).items():
        (folder / name).write_bytes(text.encode())
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(arrays))
        return folder
    names, table = list(arrays), {}
    for n in range(shards):
        part, file = names[n::shards], f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        (folder / file).write_bytes(safetensors_bytes({k: arrays[k] for k in part}))
        table |= dict.fromkeys(part, file)
    write_index(folder, table)
    return folder


def write_index(folder: Path, table) -> None:
    """The index of a sharded model."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1},
                                                                     "weight_map": table}))


def read_all(source) -> dict[str, tuple]:
    """(dtype, shape, bytes) of every parameter of an open model."""
    return {name: bits(source.read(name)) for name in source.shapes}


def bits(array: np.ndarray) -> tuple:
    """What makes two arrays the same, bit for bit."""
    return array.dtype, array.shape, array.tobytes()
