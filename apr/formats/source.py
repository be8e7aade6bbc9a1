"""ModelSource: a model as it lies on disk, whatever the format: what it computes, its parameters, its text files.

Every reader (.apr, Hugging Face folder, GGUF) gives one, and everything that takes a model (run, export, --init) takes
one. It can only be made if every parameter is there, in its shape, and every tensor of the file is used: a dropped bias
cannot pass unseen. Values are read one parameter at a time, in the type that they are stored in.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import TransformerConfig
from apr.dtypes import BY_NUMPY
from apr.errors import FormatError
from apr.params import param_specs

# The text files of a Hugging Face folder that are kept, byte for byte, by every format that has room for them.
ASSETS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "merges.txt", "generation_config.json", "chat_template.jinja")
FLOATS = ("F32", "F16", "BF16")
EXPONENTS = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
UNSIGNED = {2: np.uint16, 4: np.uint32}
BLOCK = 1 << 18  # elements
COVERAGE, ARCH_MATCH = "POPULATE-COVERAGE", "INIT-ARCH-MATCH-001"  # gates, by upstream's names


@dataclass(frozen=True)
class ModelSource:
    """An open model; also a context manager.

    `hf_config` is the config.json as its maker wrote it; `assets` text files by Hugging Face's names; `shapes` and
    `dtypes` (F32, F16, BF16, or a GGUF type such as Q4_K) are of the stored tensors by Hugging Face's names; `facts`
    what was understood, and from where. Raises FormatError unless the tensors are exactly the model's.
    """

    path: Path
    format: str  # apr, hf or gguf
    config: TransformerConfig
    hf_config: dict[str, Any]
    assets: dict[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    read_stored: Callable[[str], np.ndarray]
    close_files: Callable[[], None]
    facts: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        try:
            check_names(self.config, self.shapes, str(self.path))
        except BaseException:
            self.close_files()
            raise

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer came with the model."""
        return bool(self.assets.keys() & {"tokenizer.json", "vocab.json"})

    def read(self, name: str) -> np.ndarray:
        """One parameter, F32, F16 or BF16, in memory of its own.

        Raises FormatError for values that are not finite, or a file that changed while it was read; StorageError.
        """
        array = self.read_stored(name)
        where = f"{self.path}: tensor '{name}'"
        if array.shape != self.shapes[name] or BY_NUMPY[array.dtype].name not in FLOATS:
            raise FormatError(where, f"a floating-point array of shape {list(self.shapes[name])}",
                              f"{array.dtype} {list(array.shape)}", "give the file of this model")
        check_finite(array, where)
        return array

    def close(self) -> None:
        """Close the files."""
        self.close_files()

    def __enter__(self) -> "ModelSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_names(config: TransformerConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise FormatError unless `shapes` are exactly the model's parameters: none missing, none left over.

    The place begins with POPULATE-COVERAGE, or with INIT-ARCH-MATCH-001 where the names are those of another family.
    """
    if len(shapes) < config.L:  # a few bytes can claim thousands of layers, whose table would take its time
        raise FormatError(f"{COVERAGE} {where}", f"the tensors of {config.L} layers", f"{len(shapes)} tensors",
                          "give the file of this model")
    specs, family = {s.name: s.shape for s in param_specs(config)}, config.hf_model_type
    missing, extra = sorted(specs.keys() - shapes.keys()), sorted(shapes.keys() - specs.keys())
    if missing or extra:
        odd = f"missing {missing[:5]} ({len(missing)}), not used {extra[:5]} ({len(extra)})"
        named = families_of(shapes)
        if family not in named:
            raise FormatError(f"{ARCH_MATCH} {where}", f"the tensors of a {family}, as the configuration says",
                              f"those of a {' or '.join(named)}: {odd}", "give configuration and tensors of one model")
        raise FormatError(f"{COVERAGE} {where}", f"exactly the {len(specs)} tensors of this {family}", odd,
                          "give the file of this model")
    for name, shape in specs.items():
        if tuple(shapes[name]) != shape:
            raise FormatError(f"{COVERAGE} {where}: tensor '{name}'", f"shape {list(shape)}", f"{list(shapes[name])}",
                              "give the file of this model")


def families_of(names: Iterable[str]) -> tuple[str, ...]:
    """The families that a model of these tensors can be of: a norm of the queries is Qwen3's, their bias Qwen2's."""
    ends = {".".join(name.split(".")[-2:]) for name in names}
    return ("qwen3",) if "q_norm.weight" in ends else ("qwen2",) if "q_proj.bias" in ends else ("llama", "mistral")


def check_finite(array: np.ndarray, where: str) -> None:
    """Raise FormatError naming the first element of an F32, F16 or BF16 array that is NaN or infinite.

    Those have every bit of the exponent set. Looked at a block at a time, which stays in the cache: six times as quick
    as a sum of bfloat16.
    """
    bits = np.ascontiguousarray(array).reshape(-1).view(UNSIGNED[array.dtype.itemsize])
    exponent = EXPONENTS[BY_NUMPY[array.dtype].name]
    for start in range(0, bits.size, BLOCK):
        block = bits[start:start + BLOCK] & exponent
        if int(block.max()) == exponent:
            bad = start + int(block.argmax())
            raise FormatError(where, "finite values", f"{array.reshape(-1)[bad]} at element {bad}",
                              "the weights are damaged")

