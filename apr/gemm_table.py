"""Which algorithm of cuBLASLt a matrix product runs, as data: 64 bytes in hex, for a GPU and a version of the library.

A table's keys are names of products (Shape.name). benchmarks/tune_gemm.py makes them.
"""

import json
import re
from pathlib import Path

from apr.errors import AprError, KernelError

TABLES = Path(__file__).parent / "gemm_tables"
ALGO_BYTES = 64
HEX = re.compile(rf"[0-9a-f]{{{2 * ALGO_BYTES}}}")


def table_path(gpu: str, version: int) -> Path:
    """Where the choices for a GPU and a version of the library are kept."""
    return TABLES / f"{gpu.lower().replace(' ', '-')}-cublaslt-{version}.json"


def read_table(gpu: str, version: int) -> dict[str, str]:
    """The shipped choices for a GPU and a version of the library; empty where none were made."""
    path = table_path(gpu, version)
    if not path.is_file():
        return {}
    try:
        return {str(k): str(v) for k, v in json.loads(path.read_text())["algorithms"].items()}
    except (ValueError, KeyError, AttributeError) as e:
        raise AprError(str(path), "a table of algorithms", str(e), "reinstall apr") from None


def algorithm(name: str, text: str) -> bytes:
    """The algorithm of the product `name` that a table or a checkpoint holds as `text`. Raises KernelError."""
    if not HEX.fullmatch(text):
        raise KernelError(f"algorithm of {name}", f"{ALGO_BYTES} bytes in hex", repr(text)[:60],
                          "correct the table of products, or the checkpoint")
    return bytes.fromhex(text)
