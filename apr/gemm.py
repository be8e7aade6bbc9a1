"""Matrix products: the only caller of cuBLASLt, by cffi, since CuPy refuses its own wrappers while a graph is captured.

Arrays are row-major and weights are [out, in], as Hugging Face stores them; the library is column-major, so every
product is handed to it transposed, which costs nothing. bf16 operands are summed in float32; float32 ones too, with
TF32 off. Sums that are split over K are only allowed in float32.

    linear            out  = inp · weightᵀ          (N, O) = (N, I) (O, I)
    linear_dinp       dinp = dout · weight          (N, I) = (N, O) (O, I)
    linear_dweight    dweight (+)= doutᵀ · inp      (O, I) = (N, O) (N, I), float32; set, or added to

Which algorithm runs decides the last bits, so it is data: a table that ships with the package for a GPU and a version
of the library, else the library's first candidate. An algorithm does not depend on beta, so a product with beta 0 that
has no entry takes that of the same product with beta 1. `choices` says what ran; checkpoints keep it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi
import numpy as np

from apr import driver
from apr.device import Device
from apr.errors import AprError, KernelError, LaunchError, UnavailableError

TABLES = Path(__file__).parent / "gemm_tables"
CANDIDATES = 16
R_32F, R_16BF, COMPUTE_32F = 0, 14, 68  # cudaDataType_t, cublasComputeType_t
KINDS: dict[int, np.dtype[Any]] = {R_32F: np.dtype(np.float32), R_16BF: np.dtype(np.uint16)}
TRANSA, TRANSB, WORKSPACE_BYTES, REDUCTION_MASK = 3, 4, 1, 3  # attributes
SPLIT_IN_FLOAT = 2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; never OUTPUT_TYPE, which would round partial sums to bf16
ALGO_BYTES = 64
HEX = re.compile(rf"[0-9a-f]{{{2 * ALGO_BYTES}}}")

_ffi = cffi.FFI()
_ffi.cdef("""
typedef struct { uint64_t data[8]; } algo_t;
typedef struct { algo_t algo; size_t workspace; int state; float waves; int reserved[4]; } result_t;
size_t cublasLtGetVersion(void);
int cublasLtCreate(void **handle);
int cublasLtMatmulDescCreate(void **desc, int compute, int scale);
int cublasLtMatmulDescSetAttribute(void *desc, int attribute, const void *value, size_t size);
int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t stride);
int cublasLtMatmulPreferenceCreate(void **preference);
int cublasLtMatmulPreferenceSetAttribute(void *preference, int attribute, const void *value, size_t size);
int cublasLtMatmulPreferenceDestroy(void *preference);
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *desc, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, result_t *results, int *found);
int cublasLtMatmulAlgoCheck(void *handle, void *desc, void *a, void *b, void *c, void *d, const algo_t *algo,
                            result_t *result);
int cublasLtMatmul(void *handle, void *desc, const void *alpha, uintptr_t A, void *a, uintptr_t B, void *b,
                   const void *beta, uintptr_t C, void *c, uintptr_t D, void *d, const algo_t *algo,
                   uintptr_t workspace, size_t size, uintptr_t stream);
""")


@dataclass(frozen=True)
class Shape:
    """A product as the library sees it, column-major: D (m, n) = op(A) op(B) + beta D, and the types of in and out."""

    m: int
    n: int
    k: int
    transpose_a: bool
    transpose_b: bool
    inputs: int
    output: int

    def name(self, beta: float) -> str:
        """Its key in tables: "1152x16384x896-TN-bf16-bf16-0"."""
        letters = "".join("T" if t else "N" for t in (self.transpose_a, self.transpose_b))
        kinds = "-".join("bf16" if t == R_16BF else "f32" for t in (self.inputs, self.output))
        return f"{self.m}x{self.n}x{self.k}-{letters}-{kinds}-{beta:g}"


@dataclass
class Product:
    """A prepared product: the library's descriptors, and the algorithm that was chosen."""

    desc: Any
    layouts: tuple[Any, Any, Any]
    algo: Any
    name: str


class Gemm:
    """Products on one device's stream, in one workspace.

    `chosen` is the `record` that a checkpoint kept: its algorithms come before the shipped table's, if GPU and library
    are the same; elsewhere they mean nothing.
    """

    def __init__(self, dev: Device, workspace: Any, chosen: Mapping[str, Any] | None = None) -> None:
        path = driver.library_path("cublasLt")
        if path is None:
            raise UnavailableError("libcublasLt", "cuBLASLt, for matrix products", "no such library",
                                   "pip install 'apr[cuda12]' or 'apr[cuda13]'")
        self.dev, self.workspace, self.library = dev, workspace, _ffi.dlopen(str(path))
        self.version = int(self.library.cublasLtGetVersion())
        self.handle = self._made("cublasLtCreate")
        self.one, self.zero = _ffi.new("float *", 1.0), _ffi.new("float *", 0.0)
        self.products: dict[tuple[Shape, float], Product] = {}
        same = chosen and (chosen["gpu"], chosen["cublaslt"]) == (dev.name, self.version)
        self.table = {**read_table(dev.name, self.version), **(chosen["algorithms"] if chosen and same else {})}
        self.choices: dict[str, str] = {}

    def record(self) -> dict[str, Any]:
        """GPU, library and the algorithm of every product so far, as 64 bytes in hex."""
        return {"gpu": self.dev.name, "cublaslt": self.version, "algorithms": dict(self.choices)}

    def linear(self, out: Any, inp: Any, weight: Any) -> None:
        """out (N, O) = inp (N, I) · weightᵀ, weight (O, I); all of one storage type."""
        (n, i), o = inp.shape, weight.shape[0]
        self.multiply(out, weight, inp, Shape(o, n, i, True, False, _kind(inp), _kind(out)), 0.0)

    def linear_dinp(self, dinp: Any, dout: Any, weight: Any) -> None:
        """dinp (N, I) = dout (N, O) · weight (O, I); all of one storage type."""
        (n, o), i = dout.shape, weight.shape[1]
        self.multiply(dinp, weight, dout, Shape(i, n, o, False, False, _kind(dout), _kind(dinp)), 0.0)

    def linear_dweight(self, dweight: Any, dout: Any, inp: Any, *, add: bool) -> None:
        """dweight (O, I) f32 += doutᵀ · inp, or = where `add` is False, and then what was there is not read.

        dout (N, O), inp (N, I) of one storage type.
        """
        (n, o), i = dout.shape, inp.shape[1]
        self.multiply(dweight, inp, dout, Shape(i, o, n, False, True, _kind(inp), R_32F), 1.0 if add else 0.0)

    def multiply(self, out: Any, a: Any, b: Any, shape: Shape, beta: float) -> None:
        """A product as the library sees it: out = op(a) op(b) + beta out. Raises LaunchError for what does not fit."""
        s = shape
        for name, array, size, kind in (("a", a, s.m * s.k, s.inputs), ("b", b, s.n * s.k, s.inputs),
                                        ("out", out, s.m * s.n, s.output)):
            if array.size != size or array.dtype != KINDS[kind] or not array.flags.c_contiguous:
                raise LaunchError(f"matrix product {s.name(beta)}: {name}",
                                  f"{size} contiguous elements of {KINDS[kind].name}",
                                  f"{array.size} of {array.dtype}", "correct the operands")
        product = self.products.get((shape, beta)) or self._prepare(shape, beta)
        la, lb, ld = product.layouts
        to = out.data.ptr
        self._check(self.library.cublasLtMatmul(
            self.handle, product.desc, self.one, a.data.ptr, la, b.data.ptr, lb, self.one if beta else self.zero,
            to, ld, to, ld, product.algo, self.workspace.data.ptr, self.workspace.nbytes, self.dev.stream.ptr),
            product.name)
        self.dev.launched(product.name)

    def _prepare(self, shape: Shape, beta: float) -> Product:
        """Descriptors of a product and its algorithm: the recorded or tabled one, else the library's first."""
        desc, layouts = self._describe(shape)
        name = shape.name(beta)
        algo = _ffi.new("algo_t *")
        given = self.table.get(name) or (self.table.get(shape.name(1.0)) if beta == 0.0 else None)
        if given is not None:
            if not HEX.fullmatch(given):
                raise KernelError(f"algorithm of {name}", f"{ALGO_BYTES} bytes in hex", repr(given)[:60],
                                  "correct the table of products, or the checkpoint")
            _ffi.memmove(algo, bytes.fromhex(given), ALGO_BYTES)
            self._check(self.library.cublasLtMatmulAlgoCheck(self.handle, desc, layouts[0], layouts[1], layouts[2],
                                                             layouts[2], algo, _ffi.new("result_t *")), name)
        else:
            algo = self.candidates(desc, layouts, name, 1)[0]
        self.choices[name] = bytes(_ffi.buffer(algo, ALGO_BYTES)).hex()
        product = self.products[shape, beta] = Product(desc, layouts, algo, name)
        return product

    def _describe(self, s: Shape) -> tuple[Any, tuple[Any, Any, Any]]:
        desc = self._made("cublasLtMatmulDescCreate", COMPUTE_32F, R_32F)
        for attribute, transposed in ((TRANSA, s.transpose_a), (TRANSB, s.transpose_b)):
            self._check(self.library.cublasLtMatmulDescSetAttribute(desc, attribute, _ffi.new("int *", int(transposed)),
                                                                    4), "transposition")
        a = (s.k, s.m) if s.transpose_a else (s.m, s.k)
        b = (s.n, s.k) if s.transpose_b else (s.k, s.n)
        layouts = [self._made("cublasLtMatrixLayoutCreate", kind, rows, columns, rows)
                   for kind, (rows, columns) in ((s.inputs, a), (s.inputs, b), (s.output, (s.m, s.n)))]
        return desc, (layouts[0], layouts[1], layouts[2])

    def candidates(self, desc: Any, layouts: tuple[Any, Any, Any], name: str, wanted: int) -> list[Any]:
        """The library's algorithms for a product, its favourite first. Raises KernelError if it has none."""
        preference = self._made("cublasLtMatmulPreferenceCreate")
        set_ = self.library.cublasLtMatmulPreferenceSetAttribute
        self._check(set_(preference, WORKSPACE_BYTES, _ffi.new("uint64_t *", self.workspace.nbytes), 8), name)
        self._check(set_(preference, REDUCTION_MASK, _ffi.new("uint32_t *", SPLIT_IN_FLOAT), 4), name)
        results, found = _ffi.new("result_t[]", wanted), _ffi.new("int *")
        a, b, d = layouts
        self._check(self.library.cublasLtMatmulAlgoGetHeuristic(self.handle, desc, a, b, d, d, preference, wanted,
                                                                results, found), name)
        if found[0] == 0:
            raise KernelError(f"matrix product {name}", "an algorithm of cuBLASLt", "none",
                              "use other sizes: multiples of 8 always have one")
        self._check(self.library.cublasLtMatmulPreferenceDestroy(preference), name)
        # copies: a member of `results` is a pointer into memory that goes with it
        return [_ffi.new("algo_t *", results[i].algo) for i in range(found[0]) if results[i].state == 0]

    def tune(self, shape: Shape, beta: float, run: Any) -> list[tuple[float, str]]:
        """Milliseconds and algorithm of each candidate, the library's first one first; `run()` times the product."""
        desc, layouts = self._describe(shape)
        timed = []
        for algo in self.candidates(desc, layouts, shape.name(beta), CANDIDATES):
            self.products[shape, beta] = Product(desc, layouts, algo, shape.name(beta))
            try:
                timed.append((run(), bytes(_ffi.buffer(algo, ALGO_BYTES)).hex()))
            except KernelError:
                continue  # a candidate that the library lists, and then does not support
        del self.products[shape, beta]
        return timed

    def _made(self, function: str, *arguments: Any) -> Any:
        out = _ffi.new("void **")
        self._check(getattr(self.library, function)(out, *arguments), function)
        return out[0]

    def _check(self, status: int, what: str) -> None:
        if status != 0:
            raise KernelError(f"cuBLASLt: {what}", "status 0", f"status {status}",
                              "correct the shapes, or the algorithm in the table")


def _kind(array: Any) -> int:
    return R_16BF if array.dtype == np.uint16 else R_32F


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
