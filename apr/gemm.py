"""Matrix products: the only caller of cuBLASLt, by cffi, since CuPy refuses its own wrappers while a graph is captured.

Arrays are row-major and weights are [out, in], as Hugging Face stores them; the library is column-major, so every
product is handed to it transposed, which costs nothing. bf16 operands are summed in float32; float32 ones too, with
TF32 off. Sums that are split over K are only allowed in float32.

    linear            out  = inp · weightᵀ + bias   (N, O) = (N, I) (O, I) + (O,), with a bias or without; rounded once
    linear_dinp       dinp = dout · weight          (N, I) = (N, O) (O, I)
    linear_dweight    dweight (+)= doutᵀ · inp      (O, I) = (N, O) (N, I), float32; set, or added to

Which algorithm runs decides the last bits, so it is data: a table that ships with the package for a GPU and a version
of the library, else the library's first candidate. An algorithm does not depend on beta, so a product with beta 0 that
has no entry takes that of the same product with beta 1. `choices` says what ran; checkpoints keep it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cffi
import numpy as np

from apr import driver
from apr.device import Device
from apr.errors import KernelError, LaunchError, UnavailableError
from apr.gemm_table import ALGO_BYTES, algorithm, read_table

R_32F, R_16BF, COMPUTE_32F = 0, 14, 68  # cudaDataType_t, cublasComputeType_t
KINDS: dict[int, np.dtype[Any]] = {R_32F: np.dtype(np.float32), R_16BF: np.dtype(np.uint16)}
TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, WORKSPACE_BYTES, REDUCTION_MASK = 3, 4, 7, 8, 1, 3  # attributes
EPILOGUE_BIAS = 4  # CUBLASLT_EPILOGUE_BIAS: a vector of D's type is added to its columns, which are our rows
SPLIT_IN_FLOAT = 2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; never OUTPUT_TYPE, which would round partial sums to bf16

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
    """A product as the library sees it, column-major: D (m, n) = op(A) op(B) + beta D, and the types of in and out.

    `bias`: a vector (m,) of D's type is added.
    """

    m: int
    n: int
    k: int
    transpose_a: bool
    transpose_b: bool
    inputs: int
    output: int
    bias: bool = False

    def name(self, beta: float) -> str:
        """Its key in tables: "1152x16384x896-TN-bf16-bf16-0", with a bias "1152x16384x896-TN-bf16-bf16-0-bias"."""
        letters = "".join("T" if t else "N" for t in (self.transpose_a, self.transpose_b))
        kinds = "-".join("bf16" if t == R_16BF else "f32" for t in (self.inputs, self.output))
        return f"{self.m}x{self.n}x{self.k}-{letters}-{kinds}-{beta:g}{'-bias' * self.bias}"


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
        self.one, self.zero, self.address = _ffi.new("float *", 1.0), _ffi.new("float *", 0.0), _ffi.new("uintptr_t *")
        self.products: dict[tuple[Shape, float], Product] = {}
        same = chosen and (chosen["gpu"], chosen["cublaslt"]) == (dev.name, self.version)
        self.table = {**read_table(dev.name, self.version), **(chosen["algorithms"] if chosen and same else {})}
        self.choices: dict[str, str] = {}

    def record(self) -> dict[str, Any]:
        """GPU, library and the algorithm of every product so far, as 64 bytes in hex."""
        return {"gpu": self.dev.name, "cublaslt": self.version, "algorithms": dict(self.choices)}

    def linear(self, out: Any, inp: Any, weight: Any, bias: Any = None) -> None:
        """out (N, O) = inp (N, I) · weightᵀ + bias, weight (O, I), bias (O,) or None; all of one storage type."""
        (n, i), o = inp.shape, weight.shape[0]
        shape = Shape(o, n, i, True, False, _kind(inp), _kind(out), bias is not None)
        self.multiply(out, weight, inp, shape, 0.0, bias)

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

    def multiply(self, out: Any, a: Any, b: Any, shape: Shape, beta: float, bias: Any = None) -> None:
        """A product as the library sees it: out = op(a) op(b) + beta out (+ bias).

        Raises LaunchError for what does not fit.
        """
        s = shape
        given = [("a", a, s.m * s.k, s.inputs), ("b", b, s.n * s.k, s.inputs), ("out", out, s.m * s.n, s.output)]
        for name, array, size, kind in [*given, ("bias", bias, s.m, s.output)] if s.bias else given:
            if array.size != size or array.dtype != KINDS[kind] or not array.flags.c_contiguous:
                raise LaunchError(f"matrix product {s.name(beta)}: {name}",
                                  f"{size} contiguous elements of {KINDS[kind].name}",
                                  f"{array.size} of {array.dtype}", "correct the operands")
        product = self.products.get((shape, beta)) or self._prepare(shape, beta, bias)
        if s.bias:
            self._point(product.desc, bias)
        la, lb, ld = product.layouts
        to = out.data.ptr
        self._check(self.library.cublasLtMatmul(
            self.handle, product.desc, self.one, a.data.ptr, la, b.data.ptr, lb, self.one if beta else self.zero,
            to, ld, to, ld, product.algo, self.workspace.data.ptr, self.workspace.nbytes, self.dev.stream.ptr),
            product.name)
        self.dev.launched(product.name)

    def _point(self, desc: Any, bias: Any) -> None:
        """Make `bias` what the next product with this descriptor adds.

        A descriptor is the host's memory: the library reads it within the call and passes the address on among the
        kernel's arguments, which a launch copies, and so does a graph that records it. So layers may share one.
        """
        self.address[0] = bias.data.ptr
        self._check(self.library.cublasLtMatmulDescSetAttribute(desc, BIAS_POINTER, self.address, 8), "bias")

    def _prepare(self, shape: Shape, beta: float, bias: Any) -> Product:
        """Descriptors of a product and its algorithm: the recorded or tabled one, else the library's first."""
        desc, layouts = self._describe(shape, bias)
        name = shape.name(beta)
        algo = _ffi.new("algo_t *")
        given = self.table.get(name) or (self.table.get(shape.name(1.0)) if beta == 0.0 else None)
        if given is not None:
            _ffi.memmove(algo, algorithm(name, given), ALGO_BYTES)
            self._check(self.library.cublasLtMatmulAlgoCheck(self.handle, desc, layouts[0], layouts[1], layouts[2],
                                                             layouts[2], algo, _ffi.new("result_t *")), name)
        else:
            algo = self.candidates(desc, layouts, name, 1)[0]
        self.choices[name] = bytes(_ffi.buffer(algo, ALGO_BYTES)).hex()
        product = self.products[shape, beta] = Product(desc, layouts, algo, name)
        return product

    def _describe(self, s: Shape, bias: Any = None) -> tuple[Any, tuple[Any, Any, Any]]:
        desc = self._made("cublasLtMatmulDescCreate", COMPUTE_32F, R_32F)
        values = {TRANSA: int(s.transpose_a), TRANSB: int(s.transpose_b)}
        for attribute, value in (values | {EPILOGUE: EPILOGUE_BIAS} if s.bias else values).items():
            self._check(self.library.cublasLtMatmulDescSetAttribute(desc, attribute, _ffi.new("int *", value), 4),
                        "transposition or bias")
        if s.bias:  # the candidates depend on how it is aligned
            self._point(desc, bias)
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

    def algorithms(self, shape: Shape, beta: float, wanted: int, bias: Any = None) -> list[str]:
        """Up to `wanted` algorithms for a product, as a table holds them, the library's favourite first."""
        found = self.candidates(*self._describe(shape, bias), shape.name(beta), wanted)
        return [bytes(_ffi.buffer(algo, ALGO_BYTES)).hex() for algo in found]

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
