"""The dtype table: one row per storage type, its NumPy type and its code in each file format."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class DType:
    """A storage type. `apr_code` is the byte in an .apr index, None where that format has none."""

    name: str  # also the safetensors code
    numpy: np.dtype
    apr_code: int | None

    @property
    def size(self) -> int:
        """Bytes per element."""
        return self.numpy.itemsize


DTYPES = (
    DType("F32", np.dtype("<f4"), 0),
    DType("F16", np.dtype("<f2"), 1),
    DType("F64", np.dtype("<f8"), 3),
    DType("I32", np.dtype("<i4"), 4),
    DType("I64", np.dtype("<i8"), 5),
    DType("I8", np.dtype("i1"), 6),
    DType("U8", np.dtype("u1"), 7),
    DType("BF16", np.dtype(ml_dtypes.bfloat16), 30),
)
BY_NAME = {d.name: d for d in DTYPES}
BY_APR_CODE = {d.apr_code: d for d in DTYPES if d.apr_code is not None}
BY_NUMPY = {d.numpy: d for d in DTYPES}

# Codes of the .apr format that name block-quantised types; refused by name until something here can dequantise them.
APR_QUANTISED = {8: "AprQ4 (legacy code)", 9: "AprQ8 (legacy code)", 12: "Q4_K", 14: "Q6_K", 128: "AprQ4", 129: "AprQ8"}
