"""A libcuda in Python, which answers through the pointers that the real one writes to; and installed CuPys to order."""

import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path

from apr.driver import DeviceInfo, DriverInfo, libcuda, libraries
from apr.driver.libcuda import ffi

H200 = DeviceInfo(0, "NVIDIA H200", (9, 0), 150 << 30, 132, 232448)
A100 = DeviceInfo(1, "NVIDIA A100", (8, 0), 80 << 30, 108, 166912)
T4 = DeviceInfo(0, "Tesla T4", (7, 5), 15 << 30, 40, 65536)
NAMES = {1: "CUDA_ERROR_INVALID_VALUE", 2: "CUDA_ERROR_OUT_OF_MEMORY", 100: "CUDA_ERROR_NO_DEVICE",
         209: "CUDA_ERROR_NO_BINARY_FOR_GPU", 700: "CUDA_ERROR_ILLEGAL_ADDRESS"}


TWELVE = ["cuda_nvrtc/lib/libnvrtc.so.12", "cublas/lib/libcublasLt.so.12"]
THIRTEEN = ["cu13/lib/libnvrtc.so.13", "cu13/lib/libcublasLt.so.13"]


def install_cupy(monkeypatch, folder: Path, cupy: dict[str, str], files: list[str] = ()) -> Path:
    """Make these CuPys the installed ones, and these (empty) files NVIDIA's only ones; returns the files' folder."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in cupy:
            return cupy[name]
        if name.startswith("cupy"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    root = folder / "nvidia"
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(libraries, "_wheel_roots", lambda: [folder / "other", root])
    monkeypatch.setattr(libraries, "_system_library", lambda soname: None)
    return root


def found(*devices: DeviceInfo, version: str = "13.0") -> DriverInfo:
    """What probe says of these GPUs."""
    return DriverInfo(True, "", version, devices)


@dataclass
class FakeDriver:
    """Answers with these devices, or with the code in `fails` for a call of that name; keeps what it was given."""

    devices: list[DeviceInfo] = field(default_factory=lambda: [H200, A100])
    version: int = 13000
    fails: dict[str, int] = field(default_factory=dict)
    names: bool = True
    calls: list[str] = field(default_factory=list)
    launched: list[dict] = field(default_factory=list)
    log: str = ""
    keep: dict = field(default_factory=dict)

    def use(self, monkeypatch) -> "FakeDriver":
        """Be the library that apr.driver opens."""
        monkeypatch.setattr(libcuda, "open_library", lambda name=libcuda.LIBCUDA: self)
        return self

    def _called(self, name: str) -> int:
        self.calls.append(name)
        return self.fails.get(name, 0)

    def cuInit(self, flags):
        return self._called("cuInit")

    def cuDriverGetVersion(self, version):
        version[0] = self.version
        return self._called("cuDriverGetVersion")

    def _text(self, code, text, word):
        if not self.names or code not in NAMES:
            return 34
        self.keep[word] = ffi.new("char[]", word.encode())
        text[0] = self.keep[word]
        return 0

    def cuGetErrorName(self, code, text):
        return self._text(code, text, NAMES.get(code, ""))

    def cuGetErrorString(self, code, text):
        return self._text(code, text, f"text of {code}")

    def cuDeviceGetCount(self, count):
        count[0] = len(self.devices)
        return self._called("cuDeviceGetCount")

    def cuDeviceGet(self, device, ordinal):
        device[0] = ordinal
        return self._called("cuDeviceGet")

    def cuDeviceGetName(self, name, length, device):
        ffi.memmove(name, self.devices[device].name.encode() + b"\0", len(self.devices[device].name) + 1)
        return self._called("cuDeviceGetName")

    def cuDeviceTotalMem_v2(self, size, device):
        size[0] = self.devices[device].memory_bytes
        return self._called("cuDeviceTotalMem")

    def cuDeviceGetAttribute(self, value, attribute, device):
        d = self.devices[device]
        value[0] = {16: d.sm_count, 75: d.capability[0], 76: d.capability[1], 97: d.shared_bytes}[attribute]
        return self._called("cuDeviceGetAttribute")

    def cuFuncGetAttribute(self, value, attribute, function):
        value[0] = {0: 1024, 1: 512, 3: 16, 4: 40, 6: 90}[attribute] + function
        return self._called("cuFuncGetAttribute")

    def cuFuncSetAttribute(self, function, attribute, value):
        self.keep["set"] = (function, attribute, value)
        return self._called("cuFuncSetAttribute")

    def cuModuleLoadDataEx(self, module, image, count, options, values):
        given = {options[i]: values[i] for i in range(count)}
        assert set(given) == {3, 4, 5, 6} and int(ffi.cast("size_t", given[6])) == 16383
        self.keep["image"] = ffi.string(ffi.cast("const char *", image))
        ffi.memmove(given[5], self.log.encode() + b"\0", len(self.log) + 1)
        module[0] = 77
        return self._called("cuModuleLoadDataEx")

    def cuModuleUnload(self, module):
        assert module == 77
        return self._called("cuModuleUnload")

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        attributes = {}
        for i in range(config.numAttrs):
            a = config.attrs[i]
            c = a.value.clusterDim
            attributes[a.id] = (c.x, c.y, c.z) if a.id == 4 else a.value.programmaticStreamSerializationAllowed
        self.launched.append({
            "grid": (config.gridDimX, config.gridDimY, config.gridDimZ),
            "block": (config.blockDimX, config.blockDimY, config.blockDimZ), "shared": config.sharedMemBytes,
            "stream": config.hStream, "function": function,
            "attributes": attributes, "addresses": [int(ffi.cast("size_t", p)) for p in parameters],
            "values": [bytes(ffi.buffer(p, size)) for p, size in zip(parameters, self.keep["sizes"], strict=False)]})
        return self._called("cuLaunchKernelEx")

    def cuTensorMapEncodeTiled(self, out, kind, rank, address, dims, strides, box, steps, *flags):
        assert int(ffi.cast("size_t", out)) % 128 == 0
        self.keep["map"] = (kind, rank, address, list(dims[0:rank]),
                            list(strides[0:rank - 1]), list(box[0:rank]), list(steps[0:rank]), *flags)
        ffi.memmove(out, bytes(range(128)), 128)
        return self._called("cuTensorMapEncodeTiled")
