"""Loaded kernels: what one costs, why a module does not load, and the launch that CuPy has not: clusters, early start.

Handles of functions and streams are plain integers, as CuPy's `.ptr` gives them. The calls use the current context.
"""

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apr.driver import libcuda
from apr.driver.libcuda import check, error_name, ffi

MAX_THREADS, SHARED_BYTES, LOCAL_BYTES, REGISTERS, BINARY_VERSION, MAX_DYNAMIC_SHARED = 0, 1, 3, 4, 6, 8
INFO_LOG, INFO_LOG_SIZE, ERROR_LOG, ERROR_LOG_SIZE = 3, 4, 5, 6  # CU_JIT_*_LOG_BUFFER and its _SIZE_BYTES
CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CU_LAUNCH_ATTRIBUTE_*
LOG_BYTES = 16384
NULL = ffi.NULL


@dataclass(frozen=True)
class FunctionAttributes:
    """What a kernel needs: registers and local bytes (spills and stack) per thread, static shared bytes per block."""

    registers: int
    local_bytes: int
    shared_bytes: int
    max_threads: int
    binary_version: int  # 90 for sm_90


def function_attributes(function: int) -> FunctionAttributes:
    """The costs of a loaded kernel. Raises DeviceFault."""
    value = ffi.new("int *")

    def ask(attribute: int) -> int:
        check(libcuda.open_library().cuFuncGetAttribute(value, attribute, function), "cuFuncGetAttribute")
        return int(value[0])

    return FunctionAttributes(ask(REGISTERS), ask(LOCAL_BYTES), ask(SHARED_BYTES), ask(MAX_THREADS),
                              ask(BINARY_VERSION))


def set_dynamic_shared(function: int, size: int) -> None:
    """Allow launches of the kernel with up to `size` bytes of dynamic shared memory; above 48 KiB it must be asked for.

    Raises DeviceFault, also when the GPU has less.
    """
    code = libcuda.open_library().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, size)
    check(code, f"cuFuncSetAttribute to {size} bytes of dynamic shared memory")


def load_log(image: bytes) -> str:
    """What the driver says when it loads this cubin or PTX: `CUDA_ERROR_X (text): log`. It is not kept.

    Read it after another loader has failed: CuPy passes on the code alone.
    """
    lib = libcuda.open_library()
    logs = [ffi.new("char[]", LOG_BYTES), ffi.new("char[]", LOG_BYTES)]
    options = ffi.new("int[4]", [INFO_LOG, INFO_LOG_SIZE, ERROR_LOG, ERROR_LOG_SIZE])
    size = ffi.cast("void *", LOG_BYTES - 1)  # a size travels in the pointer itself
    values = ffi.new("void *[4]", [logs[0], size, logs[1], size])
    module, data = ffi.new("uintptr_t *"), ffi.from_buffer(image + b"\0")  # PTX is text, and ends with a zero
    code = lib.cuModuleLoadDataEx(module, data, 4, options, values)
    if code == 0:
        check(lib.cuModuleUnload(module[0]), "cuModuleUnload")
    text = " ".join(ffi.string(log).decode("utf-8", "replace").strip() for log in logs).strip()
    name = "CUDA_SUCCESS" if code == 0 else error_name(code)
    return f"{name}: {text}" if text else name


class _Arguments:
    """Host memory for the arguments of launches with the same sizes: written anew by each launch, read during it."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        # Tensor maps start at multiples of 128 bytes, as CUDA 13 declares them, the others at multiples of 8.
        text, end, offsets = "=", 0, []
        for size in sizes:
            align = 128 if size == 128 else 8
            text += f"{-end % align}x{size}s"
            end += -end % align
            offsets.append(end)
            end += size
        self.pack = struct.Struct(text).pack_into
        self.memory = ffi.new("char[]", end + 128)
        self.start = -int(ffi.cast("uintptr_t", self.memory)) % 128
        self.buffer = ffi.buffer(self.memory)
        self.pointers = ffi.new("void *[]", max(1, len(sizes)))
        for i, offset in enumerate(offsets):
            self.pointers[i] = self.memory + self.start + offset


class _Launcher(threading.local):
    """One thread's launch structures. The driver copies everything before cuLaunchKernelEx returns, so they are reused,
    but cffi gives up the interpreter's lock during the call, so two threads must not share them."""

    def __init__(self) -> None:
        self.attributes = ffi.new("CUlaunchAttribute[2]")
        self.config = ffi.new("CUlaunchConfig *")
        self.config.attrs = self.attributes
        self.arguments: dict[tuple[int, ...], _Arguments] = {}


_LAUNCHER = _Launcher()


def launch(function: int, grid: tuple[int, int, int], block: tuple[int, int, int], shared: int, stream: int,
           values: Sequence[bytes], cluster: tuple[int, int, int] | None = None, programmatic: bool = False) -> int:
    """Start a kernel; returns the driver's code, 0 for success: the caller knows the kernel's name, this does not.

    `values` are the arguments' bytes, little-endian, each exactly as long as its C type. `shared` is dynamic shared
    bytes; `cluster` blocks per cluster. `programmatic`: the kernel may start before its predecessor in the stream has
    ended, and must itself wait (griddepcontrol.wait) before it reads what that one writes.
    """
    sizes = tuple(map(len, values))
    arguments = _LAUNCHER.arguments.get(sizes)
    if arguments is None:
        arguments = _LAUNCHER.arguments[sizes] = _Arguments(sizes)
    arguments.pack(arguments.buffer, arguments.start, *values)
    config: Any = _LAUNCHER.config
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes = shared
    config.hStream = stream
    count = 0
    if cluster is not None:
        attribute = _LAUNCHER.attributes[0]
        attribute.id = CLUSTER_DIMENSION
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster
        count = 1
    if programmatic:
        attribute = _LAUNCHER.attributes[count]
        attribute.id = PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        count += 1
    config.numAttrs = count
    return int(libcuda.open_library().cuLaunchKernelEx(config, function, arguments.pointers, NULL))
