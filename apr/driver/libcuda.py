"""libcuda through cffi: the declarations apr uses, the opened library, and what its error codes mean.

The declarations follow cuda.h of CUDA 12 and 13, which agree on all of them. Handles are declared as integers of a
pointer's size, as CuPy gives them: a cast for each would take longer than the rest of a launch.
"""

import ctypes
from functools import cache
from typing import Any

from cffi import FFI

from apr.errors import AprError, DeviceFault, OutOfMemoryError, UnavailableError

LIBCUDA = "libcuda.so.1"
ffi = FFI()
ffi.cdef("""
    int cuInit(unsigned int flags);
    int cuDriverGetVersion(int *version);
    int cuGetErrorName(int code, const char **text);
    int cuGetErrorString(int code, const char **text);
    int cuDeviceGetCount(int *count);
    int cuDeviceGet(int *device, int ordinal);
    int cuDeviceGetName(char *name, int length, int device);
    int cuDeviceTotalMem_v2(size_t *bytes, int device);
    int cuDeviceGetAttribute(int *value, int attribute, int device);

    int cuFuncGetAttribute(int *value, int attribute, uintptr_t function);
    int cuFuncSetAttribute(uintptr_t function, int attribute, int value);
    int cuModuleLoadDataEx(uintptr_t *module, const void *image, unsigned int count, int *options, void **values);
    int cuModuleUnload(uintptr_t module);

    typedef union {
        char pad[64];
        unsigned long long align;  // as the pointers of the real union align it
        struct { unsigned int x, y, z; } clusterDim;
        int programmaticStreamSerializationAllowed;
    } CUlaunchAttributeValue;
    typedef struct { int id; char pad[4]; CUlaunchAttributeValue value; } CUlaunchAttribute;
    typedef struct {
        unsigned int gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
        uintptr_t hStream;
        CUlaunchAttribute *attrs;
        unsigned int numAttrs;
    } CUlaunchConfig;
    int cuLaunchKernelEx(const CUlaunchConfig *config, uintptr_t function, void **parameters, void **extra);

    int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, uintptr_t address, const uint64_t *dims,
                               const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                               int interleave, int swizzle, int l2_promotion, int fill);
""")

# Known even where the library cannot name them: the stub library answers every call with its own code.
NAMES = {1: "CUDA_ERROR_INVALID_VALUE", 2: "CUDA_ERROR_OUT_OF_MEMORY", 3: "CUDA_ERROR_NOT_INITIALIZED",
         34: "CUDA_ERROR_STUB_LIBRARY", 35: "cudaErrorInsufficientDriver", 46: "CUDA_ERROR_DEVICE_UNAVAILABLE",
         100: "CUDA_ERROR_NO_DEVICE", 101: "CUDA_ERROR_INVALID_DEVICE", 700: "CUDA_ERROR_ILLEGAL_ADDRESS",
         803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", 804: "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE"}
OUT_OF_MEMORY = 2
UNAVAILABLE = {
    34: "the library found is the toolkit's stub; install the NVIDIA driver, or take the stub out of LD_LIBRARY_PATH",
    35: "update the NVIDIA driver",
    46: "free the GPU: another process holds it alone",
    100: "check nvidia-smi and CUDA_VISIBLE_DEVICES",
    101: "check nvidia-smi and CUDA_VISIBLE_DEVICES",
    803: "reboot, or reload the driver's kernel module: it is older than its library",
    804: "install a driver that supports this GPU",
}
# After these the context answers every call with the same error: only a new process has a GPU again.
STICKY = frozenset({4, 46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999})


@cache
def open_library(name: str = LIBCUDA) -> Any:
    """The driver's library. Raises OSError where there is none.

    ctypes tries first: where the library is missing, cffi would start gcc and ldconfig to look for it.
    """
    ctypes.CDLL(name)
    return ffi.dlopen(name, ffi.RTLD_NOW | ffi.RTLD_GLOBAL)


def error_name(code: int, library: Any = None) -> str:
    """The name of an error code and, where the driver says one, its description: `CUDA_ERROR_X (text)`."""
    lib = open_library() if library is None else library
    words = []
    for function in (lib.cuGetErrorName, lib.cuGetErrorString):
        text = ffi.new("const char **")
        known = function(code, text) == 0 and text[0] != ffi.NULL
        words.append(ffi.string(text[0]).decode("utf-8", "replace") if known else "")
    name = words[0] or NAMES.get(code, f"CUDA error {code}")
    return f"{name} ({words[1]})" if words[1] and words[1] != name else name


def is_sticky(code: int) -> bool:
    """Whether the process has lost its GPU with this error: illegal address, failed launch, uncorrectable memory."""
    return code in STICKY


def check(code: int, what: str) -> None:
    """Nothing for 0, else the error that a driver's code means; `what` names the call.

    Raises OutOfMemoryError (exit 11), UnavailableError (9: no device, driver too old), DeviceFault (10) for the rest.
    """
    if code != 0:
        raise _error(code, what)


def _error(code: int, what: str) -> AprError:
    found = f"{error_name(code)}, code {code}"
    if code == OUT_OF_MEMORY:
        return OutOfMemoryError(what, "enough GPU memory", found, "lower --batch-size or --seq-length")
    if code in UNAVAILABLE:
        return UnavailableError(what, "a GPU that can be used", found, UNAVAILABLE[code])
    fix = "start again; APR_SYNC=1 names the kernel" if is_sticky(code) else "this GPU cannot do what apr asked of it"
    return DeviceFault(what, "success", found, fix)
