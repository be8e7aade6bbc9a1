"""The CUDA driver, and the one place that imports CuPy.

libcuda is called through cffi in ABI mode: no compiler, no header, and no CuPy for what has to be known before CuPy may
be imported. Nothing here makes a CUDA context; the calls that need one use the current one.

    libcuda.py      the declarations, the opened library, its error codes as apr's errors
    devices.py      probe: which driver and which GPUs are here, or why none
    functions.py    what a loaded kernel costs, why a module does not load, launches with clusters and early start
    tensor_maps.py  the 128 bytes by which a kernel's bulk copies (TMA) know a tensor
    wheels.py       which CuPy and which CUDA libraries are installed and loaded; import_cupy
"""

from apr.driver.devices import DeviceInfo, DriverInfo, probe
from apr.driver.functions import FunctionAttributes, function_attributes, launch, load_log, set_dynamic_shared
from apr.driver.libcuda import OUT_OF_MEMORY, check, error_name, is_sticky
from apr.driver.libraries import (
    cuda_problems,
    cuda_versions,
    cupy_distributions,
    import_cupy,
    library_path,
    library_version,
    loaded_libraries,
)
from apr.driver.tensor_maps import MAP_BYTES, tensor_map

__all__ = [
    "MAP_BYTES", "OUT_OF_MEMORY", "DeviceInfo", "DriverInfo", "FunctionAttributes", "check", "cuda_problems",
    "cuda_versions", "cupy_distributions", "error_name", "function_attributes", "import_cupy", "is_sticky", "launch",
    "library_path", "library_version", "load_log", "loaded_libraries", "probe", "set_dynamic_shared", "tensor_map",
]
