"""KernelSpec: what a kernel is declared to be; and the one place where a launch is checked against it.

CuPy passes what it is given: a Python float as a double, a strided array as if it were contiguous, too few arguments
without a word. Here an argument fits its declaration exactly, or LaunchError names it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apr import driver
from apr.errors import ConfigError, DeviceFault, KernelParamError, LaunchError, did_you_mean

# Device types by the name that sources use. bf16 travels as uint16: its bits, which no arithmetic of CuPy may touch.
DEVICE_DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32), "bf16": np.dtype(np.uint16), "i32": np.dtype(np.int32), "f64": np.dtype(np.float64),
    "i64": np.dtype(np.int64), "u8": np.dtype(np.uint8)}
FLOATX = ("f32", "bf16")
# Ops that have a second kernel for the GPUs of one architecture, beside the general one: what they need.
FAST_PATHS = {"attention": "sm_90a", "cross_entropy": "sm_90a"}
ARGUMENT = re.compile(r"(\w+):(?:(const )?(floatX|f32|bf16|i32|i64|f64|u8)(\*\??)?|map)")
BakedValue = int | float | str
Baked = dict[str, BakedValue]


@dataclass(frozen=True)
class KernelSpec:
    """A kernel: its file, its entry, the names baked into it, its arguments in order.

    An argument is "name:type" for a scalar, "name:type*" for an array, "name:type*?" for an array that may be None;
    type is floatX, f32, bf16, i32, i64, f64 or u8, and "const type" for what the kernel only reads. "name:map" is a
    tensor map (driver.tensor_map).
    """

    source: str
    entry: str
    baked: tuple[str, ...]
    args: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.source.endswith(".cu"):  # keys have its stem
            raise KernelParamError(f"{self.source} {self.entry}", "a .cu file", self.source, "correct the spec")
        for arg in self.args:
            if not ARGUMENT.fullmatch(arg):
                raise KernelParamError(f"{self.source} {self.entry}", "arguments like 'out:floatX*' or 'N:i32'", arg,
                                       "correct the spec")

    def check_baked(self, baked: Baked) -> None:
        """Raise KernelParamError unless the names are exactly the declared ones and every value can be baked."""
        missing, extra = set(self.baked) - set(baked), set(baked) - set(self.baked)
        if missing or extra:
            raise KernelParamError(f"{self.source} {self.entry}", "baked values " + ", ".join(sorted(self.baked)),
                                   f"missing {sorted(missing)}, extra {sorted(extra)}", "give exactly these")
        for name, value in baked.items():
            spell(f"{self.source}: {name}", value)


def spell(where: str, value: BakedValue) -> tuple[str, str]:
    """A baked value as (its place in the key, its text in the source).

    An integer is itself; a float the hex of its 32 bits, and in the source an exact hexadecimal literal; a type its
    name. Raises KernelParamError for anything else (True is not 1), a float that is not finite, or that overflows.
    """
    if isinstance(value, str) and value in FLOATX:
        return value, value
    if type(value) is int and -(2**31) <= value < 2**31:
        return str(value), str(value)
    if isinstance(value, float):
        with np.errstate(over="ignore"):
            single = np.float32(value)
        if np.isfinite(single):
            return f"f{int(single.view(np.uint32)):08x}", f"{float(single).hex()}f"
    raise KernelParamError(where, "a 32-bit integer, a finite 32-bit float, 'f32' or 'bf16'", repr(value),
                           "bake another value")


class Kernel:
    """A loaded entry of a compiled module. `key` names everything that made it."""

    def __init__(self, spec: KernelSpec, floatx: str, function: int, key: str, module: Any) -> None:
        self.spec, self.floatx, self.function, self.key = spec, floatx, function, key
        self.module = module  # keeps the code loaded
        self.shared = 0
        self.checks = [_argument(arg, floatx) for arg in spec.args]

    def launch(self, stream: int, grid: Sequence[int], block: Sequence[int], args: Sequence[Any],
               shared: int = 0, programmatic: bool = False, cluster: tuple[int, int, int] | None = None) -> None:
        """Launch on `stream` (a handle). grid and block of 1 to 3 numbers; shared: bytes of dynamic shared memory.

        `programmatic`: it may start before its predecessor has ended, and itself waits (wait_for_previous). `cluster`:
        blocks of a cluster along x, y, z, where the kernel does not fix them.

        Raises LaunchError for an argument that does not fit its declaration or a launch that the driver refuses,
        DeviceFault for a device that has already failed.
        """
        if len(args) != len(self.checks):
            raise LaunchError(self.key, f"{len(self.checks)} arguments", str(len(args)), "give them all, in order")
        values = [check(self.key, arg) for check, arg in zip(self.checks, args, strict=True)]
        if shared > self.shared:
            driver.set_dynamic_shared(self.function, shared)
            self.shared = shared
        code = driver.launch(self.function, _three(self.key, grid), _three(self.key, block), shared, stream, values,
                             cluster=cluster, programmatic=programmatic)
        if code != 0:
            what = f"kernel {self.key}, grid {tuple(grid)}, block {tuple(block)}, {shared} bytes shared"
            name = driver.error_name(code)
            if driver.is_sticky(code):
                raise DeviceFault(what, "a device that works", name, "the process must end; start it again")
            raise LaunchError(what, "a launch that the driver takes", name, "correct the launch")


def _three(key: str, size: Sequence[int]) -> tuple[int, int, int]:
    if not 1 <= len(size) <= 3:
        raise LaunchError(key, "a grid and a block of 1 to 3 numbers", str(tuple(size)), "correct the launch")
    x, y, z = (*size, 1, 1)[:3]
    return x, y, z


def _argument(declared: str, floatx: str) -> Any:
    """The checker of one argument: (key, value) to the bytes that the kernel receives."""
    match = ARGUMENT.fullmatch(declared)
    assert match is not None
    name, _, kind, pointer = match.groups()

    def tensor_map(key: str, value: Any) -> bytes:
        if not isinstance(value, bytes) or len(value) != driver.MAP_BYTES:
            raise LaunchError(f"{key}: argument {name}", f"a tensor map, {driver.MAP_BYTES} bytes",
                              type(value).__name__, "make it by driver.tensor_map")
        return value

    if kind is None:
        return tensor_map
    dtype = DEVICE_DTYPES[floatx if kind == "floatX" else kind]

    def scalar(key: str, value: Any) -> bytes:
        if type(value) is not dtype.type:
            raise LaunchError(f"{key}: argument {name}", f"np.{dtype.name}", type(value).__name__, "convert it")
        return bytes(value.tobytes())

    def array(key: str, value: Any) -> bytes:
        if value is None and pointer == "*?":
            return bytes(8)
        flags = getattr(value, "flags", None)
        if not hasattr(value, "data") or not hasattr(value.data, "ptr") or flags is None:
            raise LaunchError(f"{key}: argument {name}", f"a device array of {declared.split(':')[1]}",
                              type(value).__name__, "give an array on the GPU")
        if value.dtype != dtype:
            raise LaunchError(f"{key}: argument {name}", f"dtype {dtype.name}", str(value.dtype), "convert it")
        if not flags.c_contiguous:
            raise LaunchError(f"{key}: argument {name}", "a contiguous array", "a strided one", "copy it")
        return int(value.data.ptr).to_bytes(8, "little")

    return array if pointer else scalar


def floatx(array: Any) -> str:
    """The storage type of a device array, as kernels spell it: f32, or bf16 for uint16."""
    return "bf16" if array.dtype == np.uint16 else "f32"


def fast_paths(arch: str, off: str = "") -> frozenset[str]:
    """The ops whose fast path an architecture has, less those of the comma-separated list `off` (APR_GENERAL).

    Raises ConfigError for a name in `off` that has no fast path.
    """
    named = {name.strip() for name in off.split(",") if name.strip()}
    if unknown := sorted(named - set(FAST_PATHS)):
        raise ConfigError("environment variable APR_GENERAL", "ops of " + ", ".join(FAST_PATHS), unknown[0],
                          did_you_mean(unknown[0], FAST_PATHS))
    return frozenset(op for op, needed in FAST_PATHS.items() if arch == needed) - named


def is_fast(op: str, spec: KernelSpec) -> bool:
    """Whether a kernel is of the op's fast path: its file is attention_sm90.cu, cross_entropy_sm90.cu, …"""
    return spec.source == f"{op}_sm90.cu"


def blocks(work: int, each: int) -> int:
    """How many blocks of `each` cover `work`."""
    return -(-work // each)


def vector_width(length: int, itemsize: int) -> int:
    """Elements of one access to rows of `length`, as vector_width in kernels/common.cuh."""
    width = 16 // itemsize
    while length % width:
        width //= 2
    return width
