"""A file's parameters as the tools that compare want them, and whether a GPU holds their very bytes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from apr.dtypes import BY_NAME
from apr.formats.source import ModelSource
from apr.model import Model
from apr.params import param_specs

BF16 = BY_NAME["BF16"].numpy
AHEAD = 3  # layers whose weights are read before they are needed


class Weights:
    """The file's parameters in float32, rounded to the storage type of `precision` first, a few layers ahead of use."""

    def __init__(self, source: ModelSource, precision: str) -> None:
        self.source, self.precision = source, precision

    def read(self, name: str) -> np.ndarray:
        """One parameter."""
        return _float32(self.source.read(name), self.precision)

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """One layer's parameters by name."""
        return {s.name: self.read(s.name) for s in param_specs(self.source.config)
                if s.name.startswith(f"model.layers.{index}.")}

    def layers(self, count: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(layer, its parameters by name). One thread reads, others convert."""
        names: dict[int, list[str]] = {}
        for spec in param_specs(self.source.config):
            if spec.name.startswith("model.layers."):
                names.setdefault(int(spec.name.split(".")[2]), []).append(spec.name)
        with ThreadPoolExecutor(8) as pool:
            waiting: list[dict[str, Any]] = []

            def start(layer: int) -> None:
                waiting.append({n: pool.submit(_float32, self.source.read(n), self.precision) for n in names[layer]})

            for layer in range(min(AHEAD, count)):
                start(layer)
            for layer in range(count):
                if layer + AHEAD < count:
                    start(layer + AHEAD)
                yield layer, {name: job.result() for name, job in waiting.pop(0).items()}


@dataclass(frozen=True)
class TensorFault:
    """A parameter that differs: the first element that does (in the flattened array), how many of `elements` do."""

    name: str
    index: int
    count: int
    elements: int
    expected: float
    found: float


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


def byte_faults(net: Model, source: ModelSource) -> Iterator[tuple[str, TensorFault | None]]:
    """(parameter, its fault or None) for every parameter: the GPU's bytes against the file's (H4D.1 in upstream)."""
    wanted = BF16 if net.storage == "bf16" else np.dtype(np.float32)
    for spec in net.layout.specs:
        yield spec.name, tensor_fault(spec.name, source.read(spec.name).astype(wanted, copy=False), net.stored(spec))


def _float32(array: np.ndarray, precision: str) -> np.ndarray:
    """As float32, through bfloat16 where the GPU holds that."""
    return (array.astype(BF16, copy=False) if precision == "bf16" else array).astype(np.float32, copy=False)
