"""Two files of one model before anything is computed: configurations field by field, weights bit by bit."""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from apr.errors import ConfigError
from apr.formats.source import ModelSource
from apr.params import param_specs
from apr.tools.weights import ByteFault

SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "use_bias", "qk_norm", "tie_word_embeddings")
NUMBERS = ("rms_norm_eps", "rope_theta", "rope_scaling")  # with SHAPE, all that scores depend on


@dataclass(frozen=True)
class TensorFault:
    """A parameter that differs: the first element that does (in the flattened array), how many of `elements` do."""

    name: str
    index: int
    count: int
    elements: int
    expected: float
    found: float


@dataclass(frozen=True)
class FieldFault:
    """A number of the configuration that differs; `computed`: scores depend on it (a family's name only says how)."""

    name: str
    expected: Any
    found: Any
    computed: bool


def check_shapes(expected: ModelSource, found: ModelSource) -> None:
    """Raise ConfigError naming the fields in which two models cannot be compared at all."""
    a, b = expected.config, found.config
    differing = [f"{name} {getattr(a, name)} and {getattr(b, name)}" for name in SHAPE
                 if getattr(a, name) != getattr(b, name)]
    if differing:
        raise ConfigError(f"{expected.path} and {found.path}", "two models of one shape", ", ".join(differing),
                          "compare two files of the same model")


def field_faults(expected: ModelSource, found: ModelSource) -> list[FieldFault]:
    """The fields of the configurations that differ, of two models of one shape."""
    a, b = expected.config, found.config
    return [FieldFault(f.name, _plain(getattr(a, f.name)), _plain(getattr(b, f.name)), f.name in NUMBERS)
            for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)]


def weight_faults(expected: ModelSource, found: ModelSource) -> Iterator[tuple[str, TensorFault | None]]:
    """(parameter, how it differs or None) for every parameter: by its bits where both store one type, else by value."""
    for spec in param_specs(expected.config):
        yield spec.name, tensor_fault(spec.name, expected.read(spec.name), found.read(spec.name))


def tensor_fault(name: str, expected: np.ndarray, found: np.ndarray) -> TensorFault | None:
    """How two arrays of one shape differ: in their bits if they have one dtype, else as float32 numbers."""
    a, b = (np.ascontiguousarray(x).reshape(-1) for x in (expected, found))
    if a.dtype == b.dtype:
        kind = np.dtype(f"u{a.dtype.itemsize}")
        bad = np.flatnonzero(a.view(kind) != b.view(kind))
    else:
        bad = np.flatnonzero(a.astype(np.float32) != b.astype(np.float32))
    if not bad.size:
        return None
    first = int(bad[0])
    return TensorFault(name, first, int(bad.size), a.size, float(a[first]), float(b[first]))


def uploaded(faults: Iterable[tuple[str, ByteFault | None]], source: ModelSource
             ) -> Iterator[tuple[str, TensorFault | None]]:
    """What `byte_faults` found of a GPU's weights, in the terms of this module: the file's value was expected."""
    sizes = {spec.name: spec.size for spec in param_specs(source.config)}
    for name, f in faults:
        yield name, None if f is None else TensorFault(name, f.index, f.count, sizes[name], f.file, f.gpu)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
