"""What this machine has of what apr needs, and so what can be done here.

Nothing is assumed to work: versions come from the installed packages' metadata, the GPU from the driver, and the
compiler has to compile. CuPy is imported for the compiler alone, and its failure is a line of the report.
"""

import importlib.metadata
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apr import __version__
from apr.driver import (
    DriverInfo,
    cuda_problems,
    cuda_versions,
    cupy_distributions,
    import_cupy,
    library_path,
    library_version,
    loaded_libraries,
    probe,
)
from apr.errors import AprError, one_line
from apr.paths import cache_dir, gpu_environment, kernels_dir

ARCHS = ("sm_80", "sm_90a")
KERNEL = """#include "common.cuh"
extern "C" __global__ void doctor(floatX* x) { x[0] = from_float<floatX>(to_float(x[0]) + 1.0f); }
"""

Report = dict[str, Any]


def examine(find: Callable[[], DriverInfo] = probe) -> Report:
    """Everything that `apr doctor` reports, ready for JSON."""
    info = find()
    environment, cache = gpu_environment(), _cache()  # as they were: importing CuPy sets the one and may make the other
    compiler = _compiler()
    report = {
        "python": platform.python_version(), "apr": __version__, "packages": _packages(),
        "optional": _optional(), "cupy": cupy_distributions(),
        "driver": asdict(info), "libraries": _libraries(info), "compiler": compiler, "environment": environment,
        "cache": cache, "cuda": {"usable": not cuda_problems(info), "versions": cuda_versions(info),
                                 "problems": cuda_problems(info)},
    }
    return report | _verdict(report, info)


def wanted_extra(info: DriverInfo) -> str:
    """The extra of setup.py that this machine wants: cuda12 or cuda13, or nvrtc to compile without a GPU.

    A CuPy that is already installed decides, since a second one would break it: the two share their files.
    """
    installed = cupy_distributions()
    if "cupy-cuda13x" in installed and "cupy-cuda12x" not in installed:
        return "cuda13"
    if not info.present or info.cuda_major < 12:
        return "nvrtc"
    return "cuda13" if info.cuda_major >= 13 and not installed else "cuda12"


def _packages() -> list[Report]:
    """The dependencies that the installed apr names, without those of its extras."""
    return [_package(name, wants) for name, wants, extra in _required() if not extra]


def _optional() -> list[Report]:
    """The packages of its extras that are installed, those for tests apart."""
    wanted = {(name, wants) for name, wants, extra in _required() if extra not in ("", "test")}
    return [p for p in (_package(*line) for line in sorted(wanted)) if p["version"]]


def _required() -> list[tuple[str, str, str]]:
    """(name, bounds, extra or "") of each dependency in the metadata of the installed apr, sorted."""
    try:
        lines = importlib.metadata.requires("apr") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = (re.match(r"""([\w.-]+)\s*([^;]*?)\s*(?:;\s*extra == ["'](\w+)["'])?$""", line) for line in lines)
    return sorted((m[1], m[2], m[3] or "") for m in found if m)


def _package(name: str, wants: str) -> Report:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return {"name": name, "wants": wants, "version": version, "ok": _holds(version, wants)}


def _holds(version: str, wants: str) -> bool:
    """Whether a version is there and within the bounds: >=, and in the extras also <."""
    least, below = (re.search(sign + r"\s*([\d.]+)", wants) for sign in (">=", "<"))
    return bool(version) and (least is None or _release(version) >= _release(least[1])) \
        and (below is None or _release(version) < _release(below[1]))


def _release(version: str) -> tuple[int, ...]:
    numbers = [int(n) for n in re.findall(r"\d+", re.match(r"[\d.]*", version)[0])]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _libraries(info: DriverInfo) -> list[Report]:
    """The CUDA libraries that are loaded now, and those that would be."""
    loaded = loaded_libraries()
    would = {f"lib{kind}": (library_path(kind) or "", library_version(kind)) for kind in ("nvrtc", "cublasLt")}
    rows = []
    for name in sorted({*loaded, *would}):
        path, version = would.get(name, ("", ""))
        if name.startswith("libcuda") and not name.startswith("libcudart"):
            version = info.driver_version
        rows.append({"name": name, "path": loaded.get(name, path), "version": version, "loaded": name in loaded})
    return rows


def _compiler() -> Report:
    """The NVRTC that CuPy uses, and whether it compiles a kernel that includes common.cuh."""
    try:
        nvrtc = import_cupy().cuda.nvrtc
        header = (kernels_dir() / "common.cuh").read_bytes()
        return {"nvrtc": ".".join(map(str, nvrtc.getVersion())), "problem": "",
                "archs": [f"sm_{arch}" for arch in nvrtc.getSupportedArchs()],
                "compiled": [_compiled(nvrtc, header, arch) for arch in ARCHS]}
    except (AprError, OSError) as e:
        return {"nvrtc": "", "problem": str(e), "archs": [], "compiled": []}


def _compiled(nvrtc: Any, header: bytes, arch: str) -> Report:
    start = time.perf_counter()
    program = nvrtc.createProgram(KERNEL, "doctor.cu", [header], [b"common.cuh"])
    size, problem = 0, ""
    try:
        nvrtc.compileProgram(program, ("-DK_FLOATX=bf16", "-std=c++17", f"-arch={arch}"))
        size = len(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as e:
        log = nvrtc.getProgramLog(program).strip().splitlines()
        problem = one_line(log[0] if log else str(e), 200)
    finally:
        nvrtc.destroyProgram(program)
    return {"arch": arch, "ms": round(1000 * (time.perf_counter() - start), 1), "bytes": size, "problem": problem}


def _cache() -> Report:
    """The state of the kernel cache's folder; of the nearest folder above it where it does not exist yet."""
    path = cache_dir()
    if path is None:
        return {"path": "", "exists": False, "owner": None, "mode": "", "writable": False, "free_bytes": 0,
                "problem": "no home folder: set APR_CACHE_DIR"}
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    out: Report = {"path": str(path), "exists": there == path, "owner": None, "mode": "", "writable": False,
                   "free_bytes": 0, "problem": ""}
    try:
        info, room = there.stat(), os.statvfs(there)
    except OSError as e:
        return out | {"problem": f"{there}: {e.strerror}"}
    out |= {"owner": info.st_uid, "mode": f"{info.st_mode & 0o7777:04o}", "free_bytes": room.f_bavail * room.f_frsize,
            "writable": _takes_a_file(there)}
    return out | {"problem": _cache_fault(path, there, out)}


def _takes_a_file(folder: Path) -> bool:
    """Whether a file can be made there, by making one: permissions alone do not tell, for root or on a full disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _cache_fault(path: Path, there: Path, state: Report) -> str:
    if not there.is_dir():
        return f"{there} is not a folder"
    if not state["writable"]:
        return f"{there} cannot be written"
    if there == path and (path.is_symlink() or state["owner"] != os.geteuid() or int(state["mode"], 8) & 0o022):
        return "it is not a folder that you alone can write; a private one is used instead"
    return ""


def _verdict(report: Report, info: DriverInfo) -> Report:
    """What can be done here, and what cannot and why."""
    can, cannot = [], []
    bad = [f"{p['name']} {p['version'] or 'is missing'} (wants {p['wants']})"
           for p in report["packages"] if not p["ok"]]
    training = "train, tokenize and inspect on the CPU"
    if bad:
        cannot.append({"what": training, "why": "; ".join(bad)})
    else:
        can.append(training)
    cannot += [{"what": f"rely on {p['name']} {p['version']}", "why": f"apr wants {p['wants']}"}
               for p in report["optional"] if not p["ok"]]
    compiler = report["compiler"]
    fault = compiler["problem"] or next((c["problem"] for c in compiler["compiled"] if c["problem"]), "")
    if fault:
        cannot.append({"what": "compile kernels", "why": fault})
    else:
        can.append(f"compile kernels for {' and '.join(ARCHS)} (NVRTC {compiler['nvrtc']})")
    usable = {d.ordinal: cuda_problems(info, d.ordinal) for d in info.devices} or {0: report["cuda"]["problems"]}
    for ordinal, problems in usable.items():
        name = f" ({info.devices[ordinal].name})" if info.devices else ""
        if problems:
            cannot.append({"what": f"use cuda:{ordinal}{name}", "why": "; ".join(problems)})
        else:
            can.append(f"use cuda:{ordinal}{name}")
    if report["cache"]["problem"]:
        cannot.append({"what": f"keep kernels in {report['cache']['path'] or 'a cache'}",
                       "why": report["cache"]["problem"]})
    return {"can": can, "cannot": cannot}
