"""Which driver and which GPUs are here, asked of the driver itself, with no CUDA context and without CuPy."""

from dataclasses import dataclass
from typing import Any

from apr.driver import libcuda
from apr.driver.libcuda import UNAVAILABLE, error_name, ffi
from apr.errors import one_line
from apr.paths import cuda_visible_devices

SM_COUNT, MAJOR, MINOR, SHARED_OPTIN = 16, 75, 76, 97  # CU_DEVICE_ATTRIBUTE_*


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU as the driver describes it; `shared_bytes` is what a block may have if its kernel asks (opt-in)."""

    ordinal: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    sm_count: int
    shared_bytes: int


@dataclass(frozen=True)
class DriverInfo:
    """What `probe` found. `present`: the driver answers and has a GPU; `problem` says why not, and is '' if it is."""

    present: bool
    problem: str
    driver_version: str  # the newest CUDA that the driver supports, as '13.0'; '' without a driver
    devices: tuple[DeviceInfo, ...]

    @property
    def cuda_major(self) -> int:
        """The major version of CUDA that the driver supports, 0 without a driver."""
        return int(self.driver_version.partition(".")[0] or 0)


def probe(library: str = libcuda.LIBCUDA) -> DriverInfo:
    """The driver and its GPUs, or the problem in one line. Never raises."""
    try:
        lib = libcuda.open_library(library)
    except OSError as e:
        return DriverInfo(False, one_line(f"no NVIDIA driver: {e}", 200), "", ())
    version = ""
    try:
        version = _version(lib)
        if code := lib.cuInit(0):
            return DriverInfo(False, _why(lib, "cuInit", code), version, ())
        count = ffi.new("int *")
        if code := lib.cuDeviceGetCount(count):
            return DriverInfo(False, _why(lib, "cuDeviceGetCount", code), version, ())
        if count[0] == 0:
            return DriverInfo(False, f"the driver has no GPU to offer{_visible()}", version, ())
        return DriverInfo(True, "", version, tuple(_device(lib, i) for i in range(count[0])))
    except (AttributeError, OSError) as e:  # a symbol is missing; or a GPU fell off between two calls
        return DriverInfo(False, one_line(f"{library} is not a working CUDA driver: {e}", 200), version, ())


def _version(lib: Any) -> str:
    version = ffi.new("int *")
    if lib.cuDriverGetVersion(version) != 0 or version[0] <= 0:
        return ""
    return f"{version[0] // 1000}.{version[0] % 1000 // 10}"


def _visible() -> str:
    value = cuda_visible_devices()
    return "" if value is None else f" (CUDA_VISIBLE_DEVICES={value!r})"


def _why(lib: Any, call: str, code: int) -> str:
    fix = f"; {UNAVAILABLE[code]}" if code in UNAVAILABLE else ""
    return one_line(f"{call}: {error_name(code, lib)}{_visible()}{fix}", 300)


def _device(lib: Any, ordinal: int) -> DeviceInfo:
    device, number, size, name = ffi.new("int *"), ffi.new("int *"), ffi.new("size_t *"), ffi.new("char[256]")

    def ask(call: str, code: int) -> None:
        if code:
            raise OSError(f"{call} of GPU {ordinal}: {error_name(code, lib)}")

    def attribute(which: int) -> int:
        ask("cuDeviceGetAttribute", lib.cuDeviceGetAttribute(number, which, device[0]))
        return int(number[0])

    ask("cuDeviceGet", lib.cuDeviceGet(device, ordinal))
    ask("cuDeviceGetName", lib.cuDeviceGetName(name, 256, device[0]))
    ask("cuDeviceTotalMem", lib.cuDeviceTotalMem_v2(size, device[0]))
    return DeviceInfo(ordinal, one_line(ffi.string(name).decode("utf-8", "replace")),
                      (attribute(MAJOR), attribute(MINOR)), int(size[0]), attribute(SM_COUNT), attribute(SHARED_OPTIN))
