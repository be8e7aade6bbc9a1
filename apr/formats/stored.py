"""A model as arrays to write: in its own types or in one asked for, each read and rounded when its turn comes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from apr.dtypes import BY_NAME
from apr.errors import FormatError
from apr.formats.source import FLOATS, ModelSource
from apr.formats.tensors import StoredArray
from apr.hf_config import with_dtype
from apr.params import param_specs


def rounded(array: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """`array` (finite floats) as `dtype` (F32, F16, BF16), to nearest, ties to even; itself if it is that already.

    Raises FormatError naming `where` when a value is too large for the type.
    """
    wanted = BY_NAME[dtype].numpy
    if array.dtype == wanted:
        return array
    with np.errstate(all="ignore"):
        out = array.astype(wanted)
        lost = np.flatnonzero(~np.isfinite(out.reshape(-1)))
    if lost.size:
        raise FormatError(where, f"values that {dtype} can hold", f"{array.reshape(-1)[lost[0]]} at element {lost[0]}",
                          "take bf16 or f32" if dtype == "F16" else "take f32")
    return out


def written_dtype(source: ModelSource, name: str, dtype: str | None) -> str:
    """The type that a tensor is written in: the one asked for, else its own, F32 where that is a quantised one."""
    own = source.dtypes[name]
    return dtype or (own if own in FLOATS else "F32")


def written_config(source: ModelSource, dtype: str | None) -> dict[str, Any]:
    """The maker's config.json; its dtype key follows the weights where their type changes."""
    if all(written_dtype(source, name, dtype) == own for name, own in source.dtypes.items()):
        return source.hf_config
    return with_dtype(source.hf_config, dtype or "F32")


def stored_arrays(source: ModelSource, dtype: str | None,
                  done: Callable[[str], None] = lambda name: None) -> dict[str, StoredArray]:
    """Every parameter, to be read when it is written; `done` is then told its name."""
    def read(name: str, wanted: str) -> np.ndarray:
        array = rounded(source.read(name), wanted, f"{source.path}: tensor '{name}'")
        done(name)
        return array

    out = {}
    for spec in param_specs(source.config):
        wanted = written_dtype(source, spec.name, dtype)
        out[spec.name] = StoredArray(BY_NAME[wanted].numpy, spec.shape, partial(read, spec.name, wanted))
    return out


def rounded_arrays(arrays: Mapping[str, np.ndarray], dtype: str) -> dict[str, StoredArray]:
    """Arrays in memory, each rounded to `dtype` when it is written."""
    return {name: StoredArray(BY_NAME[dtype].numpy, array.shape, partial(rounded, array, dtype, f"tensor '{name}'"))
            for name, array in arrays.items()}
