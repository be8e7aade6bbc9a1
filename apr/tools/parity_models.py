"""Two files of one model before anything is computed: configurations field by field, weights bit by bit."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from apr.formats.source import ModelSource
from apr.params import param_specs
from apr.tools.config_diff import differing_fields
from apr.tools.weights import TensorFault, tensor_fault

NUMBERS = ("rms_norm_eps", "rope_theta", "rope_scaling")  # with PARAMS of config_diff, all that scores depend on


@dataclass(frozen=True)
class FieldFault:
    """A number of the configuration that differs; `computed`: scores depend on it (a family's name only says how)."""

    name: str
    expected: Any
    found: Any
    computed: bool


def field_faults(expected: ModelSource, found: ModelSource) -> list[FieldFault]:
    """The fields of the configurations that differ, of two models of one shape."""
    return [FieldFault(name, a, b, name in NUMBERS)
            for name, (a, b) in differing_fields(expected.config, found.config).items()]


def weight_faults(expected: ModelSource, found: ModelSource) -> Iterator[tuple[str, TensorFault | None]]:
    """(parameter, how it differs or None) for every parameter: by its bits where both store one type, else by value."""
    for spec in param_specs(expected.config):
        yield spec.name, tensor_fault(spec.name, expected.read(spec.name), found.read(spec.name))
