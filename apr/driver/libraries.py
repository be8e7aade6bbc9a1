"""Which CuPy and which CUDA libraries are installed and loaded, and the one place where apr imports CuPy.

cupy-cuda12x takes NVRTC 13 without a word where any CUDA 13 wheel is about (PyTorch brings one). So the libnvrtc that
belongs to the installed CuPy is loaded first, by its path, and its version is asked for afterwards.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from apr.driver.devices import DriverInfo
from apr.errors import UnavailableError
from apr.paths import prepare_cupy_cache

CUPY = {"cupy-cuda12x": 12, "cupy-cuda13x": 13}
# (kind, CUDA major): file under a root of the nvidia wheels, the wheel's name. The file's name is the soname.
LIBRARIES = {("nvrtc", 12): ("cuda_nvrtc/lib/libnvrtc.so.12", "nvidia-cuda-nvrtc-cu12"),
             ("nvrtc", 13): ("cu13/lib/libnvrtc.so.13", "nvidia-cuda-nvrtc"),
             ("cublasLt", 12): ("cublas/lib/libcublasLt.so.12", "nvidia-cublas-cu12"),
             ("cublasLt", 13): ("cu13/lib/libcublasLt.so.13", "nvidia-cublas")}
LOADED = re.compile(r"(libcuda|libnvrtc|libcudart|libcublas|libcublasLt)\.so(\.|$)")
MINIMUM = (8, 0)  # bf16 conversions, cp.async and mma of bf16 need sm_80


def cupy_distributions() -> dict[str, str]:
    """The CuPy distributions that are installed, with their versions."""
    found = {}
    for name in CUPY:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cupy_major() -> int | None:
    """The CUDA major version of the one installed CuPy; None if there is none, or more than one."""
    found = list(cupy_distributions())
    return CUPY[found[0]] if len(found) == 1 else None


def library_path(kind: str, major: int | None = None) -> str | None:
    """Where `nvrtc` or `cublasLt` of a CUDA major version (default: CuPy's) is: NVIDIA's wheel, else the system's.

    None if nowhere. The system's is found by loading it, as only the loader knows its search path.
    """
    major = cupy_major() if major is None else major
    if (kind, major) not in LIBRARIES:
        return None
    file = LIBRARIES[kind, major][0]  # type: ignore[index]
    for root in _wheel_roots():
        if (root / file).is_file():
            return str(root / file)
    return _system_library(Path(file).name)


def _wheel_roots() -> list[Path]:
    """The folders named nvidia on the import path: a namespace that several folders may share."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []


@cache
def _system_library(soname: str) -> str | None:
    try:
        ctypes.CDLL(soname)
    except OSError:
        return None
    return next((path for path in _mapped() if path.rsplit("/", 1)[-1].startswith(soname)), soname)


def library_version(kind: str, major: int | None = None) -> str:
    """The version of the library that `library_path` finds: its wheel's, or its file name's; '' if nowhere."""
    major = cupy_major() if major is None else major
    path = library_path(kind, major)
    if path is None:
        return ""
    if any(Path(path).is_relative_to(root) for root in _wheel_roots()):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(LIBRARIES[kind, major][1])  # type: ignore[index]
    return Path(path).resolve().name.partition(".so.")[2]


def _mapped() -> list[str]:
    """The files that are mapped into this process, in the order of their addresses, each once."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return list(dict.fromkeys(line[line.index("/"):] for line in lines if "/" in line))


def loaded_libraries() -> dict[str, str]:
    """The CUDA libraries loaded in this process, name to path; a second of a name gets `#2`: a warning sign."""
    found: dict[str, str] = {}
    for path in _mapped():
        if match := LOADED.match(path.rsplit("/", 1)[-1]):
            name, n = match[1], 1
            while name in found:
                n += 1
                name = f"{match[1]}#{n}"
            found[name] = path
    return found


def cuda_problems(info: DriverInfo, ordinal: int = 0) -> list[str]:
    """Everything that keeps apr from computing on this GPU, one line each; empty if nothing does."""
    problems = [info.problem] if not info.present else []
    if info.present and ordinal >= len(info.devices):
        problems.append(f"there is no cuda:{ordinal}: the driver offers {len(info.devices)} GPU(s), from cuda:0")
    elif info.present and info.devices[ordinal].capability < MINIMUM:
        device = info.devices[ordinal]
        problems.append(f"{device.name} has compute capability {'.'.join(map(str, device.capability))}, "
                        f"and {'.'.join(map(str, MINIMUM))} is needed")
    if fault := _cupy_problem():
        return [*problems, fault]
    major = cupy_major()
    if info.present and info.cuda_major < (major or 0):
        problems.append(f"the driver supports CUDA {info.driver_version or 'of no known version'}, "
                        f"and CuPy here is for CUDA {major}")
    return problems + [f"no lib{kind}.so.{major}: pip install {LIBRARIES[kind, major][1]}"  # type: ignore[index]
                       for kind in ("nvrtc", "cublasLt") if library_path(kind, major) is None]


def cuda_versions(info: DriverInfo) -> str:
    """What is here of what a GPU needs, in one line."""
    cupy = " and ".join(f"{name} {version}" for name, version in cupy_distributions().items()) or "no CuPy"
    driver = f"driver {info.driver_version}" if info.driver_version else "no driver"
    return f"{driver}, {cupy}, NVRTC {library_version('nvrtc') or 'none'}, " \
           f"cuBLASLt {library_version('cublasLt') or 'none'}"


def _cupy_problem() -> str:
    found = cupy_distributions()
    if not found:
        return "CuPy is not installed: pip install 'apr[cuda12]' or 'apr[cuda13]'"
    if len(found) > 1:
        both = " and ".join(f"{name} {version}" for name, version in found.items())
        return f"{both} are both installed: each overwrites the other's files; pip uninstall both, install one"
    return ""


@cache
def import_cupy() -> Any:
    """The module cupy, imported with its own CUDA major's NVRTC and a cache folder that can be written.

    Raises UnavailableError when CuPy, its libnvrtc, or the match between them is missing.
    """
    found = cupy_distributions()
    if fault := _cupy_problem():
        fix = "pip install 'apr[cuda12]' (CUDA 12) or 'apr[cuda13]' (CUDA 13)"
        if found:
            fix = f"pip uninstall {' '.join(found)}, then {fix}"
        raise UnavailableError("CuPy", "one CuPy distribution", fault, fix)
    ((name, version),) = found.items()
    major = CUPY[name]
    path = library_path("nvrtc", major)
    wheel = LIBRARIES["nvrtc", major][1]
    if path is None:
        raise UnavailableError("NVRTC", f"libnvrtc.so.{major} for {name} {version}", "none", f"pip install {wheel}")
    prepare_cupy_cache()
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        import cupy
        loaded = cupy.cuda.nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as e:
        raise UnavailableError("CuPy", f"{name} {version} to load with {path}", f"{type(e).__name__}: {e}",
                               f"pip install --force-reinstall {name} {wheel}") from e
    if loaded[0] != major:
        raise UnavailableError("NVRTC", f"version {major} for {name} {version}", f"version {loaded[0]}.{loaded[1]}",
                               "import apr before any module that loads CUDA, or give apr an environment of its own")
    return cupy
