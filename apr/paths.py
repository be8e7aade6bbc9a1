"""Where things are: the kernel, contract and cache folders, and the process environment (only this file touches it).

The environment variables of apr are these and no others; an unknown `APR_*` is refused, because a misspelt switch
that is silently ignored is a wrong result waiting to happen.
"""

import atexit
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from apr.errors import ConfigError, NotFoundError, did_you_mean, one_line

ENVIRONMENT = {
    "APR_CACHE_DIR": "folder of the kernel cache",
    "APR_DEVICE": "default of --device",
    "APR_GENERAL": "ops whose general kernels run even where a fast path covers them, such as attention,cross_entropy",
    "APR_SYNC": "1: wait after every kernel launch, so that a fault names its kernel",
    "APR_TRACEBACK": "1: print the whole traceback of an internal error",
}
SKIP_GATE = "SKIP_PARITY_GATE"  # upstream's name
SWITCHES = ("APR_SYNC", "APR_TRACEBACK", SKIP_GATE)  # which take 0, 1 or nothing
OVERRIDES = ("APR_GENERAL", "APR_SYNC", SKIP_GATE)  # which change what is computed or checked, and are recorded


def environment() -> dict[str, str]:
    """The `APR_*` variables that are set.

    Raises ConfigError for a name that is not in ENVIRONMENT, and for a switch that is neither on nor off.
    """
    found = {k: v for k, v in os.environ.items() if k.startswith("APR_")}
    for name in found:
        if name not in ENVIRONMENT:
            raise ConfigError(f"environment variable {name}", "a variable that apr knows", "an unknown name",
                              did_you_mean(name, ENVIRONMENT))
    for name in SWITCHES:
        if os.environ.get(name, "") not in ("", "0", "1"):
            raise ConfigError(f"environment variable {name}", "0 or 1", repr(os.environ[name]), "correct it")
    return found


def overrides() -> dict[str, str]:
    """The variables that are set and change what is computed or checked: they belong beside every result."""
    environment()
    return {name: os.environ[name] for name in OVERRIDES
            if os.environ.get(name, "") not in (("", "0") if name in SWITCHES else ("",))}


def override_record() -> dict[str, dict[str, str]]:
    """`overrides` as a record of a result keeps them: {"overrides": ...}, or nothing where none is active."""
    active = overrides()
    return {"overrides": active} if active else {}


def say_overrides(say: Callable[[str], None]) -> None:
    """The banner of a command that computes: a line for each active override."""
    for name, value in overrides().items():
        say(one_line(f"override: {name}={value}"))


def _outside_folder(name: str) -> Path:
    """`kernels` or `contracts`: inside the package in a wheel, else one level up (checkout, editable, PYTHONPATH)."""
    package = Path(__file__).resolve().parent
    for candidate in (package / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise NotFoundError(f"folder {name}/", f"{package / name} or {package.parent / name}", "neither", "reinstall apr")


def kernels_dir() -> Path:
    """The folder of the .cu sources."""
    return _outside_folder("kernels")


def contracts_dir() -> Path:
    """The folder of the YAML contracts."""
    return _outside_folder("contracts")


def cache_dir() -> Path | None:
    """The folder of the kernel cache: APR_CACHE_DIR, else $XDG_CACHE_HOME/apr, else ~/.cache/apr.

    It may not exist, nor be writable: the cache finds out and says so. None where there is no home folder at all.
    """
    asked, shared = environment().get("APR_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME", "")
    if asked:
        return Path(asked).absolute()
    if os.path.isabs(shared):  # the XDG specification ignores a relative one
        return Path(shared) / "apr"
    try:
        return Path.home().absolute() / ".cache" / "apr"
    except RuntimeError:
        return None


def prepare_cupy_cache() -> str:
    """The folder of CuPy's own cache, set as CUPY_CACHE_DIR unless it already is; call it before CuPy is imported.

    `import cupy` makes its folder under HOME and dies if it cannot, and loads code from it later. So: `cupy` in apr's
    cache folder if that is ours alone, else a temporary folder that goes with the process.
    """
    if os.environ.get("CUPY_CACHE_DIR"):
        return os.environ["CUPY_CACHE_DIR"]
    parent = cache_dir()
    folder = str(parent / "cupy") if parent is not None and _private(parent / "cupy") else ""
    if not folder:
        folder = tempfile.mkdtemp(prefix="apr-cupy-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["CUPY_CACHE_DIR"] = folder
    return folder


def _private(folder: Path) -> bool:
    """Whether `folder`, and the one above, in which it could be replaced, are or can be made ours alone to write."""
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        infos = [folder.parent.lstat(), folder.lstat()]
    except OSError:
        return False
    ours = all(stat.S_ISDIR(i.st_mode) and i.st_uid == os.geteuid() and i.st_mode & 0o022 == 0 for i in infos)
    return ours and os.access(folder, os.W_OK | os.X_OK)


def skip_parity_gate() -> bool:
    """Whether SKIP_PARITY_GATE=1 asks for no check of the GPU at the start of `apr run`."""
    return SKIP_GATE in overrides()


def cuda_visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES, which hides GPUs from the driver; None if unset."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def gpu_environment() -> dict[str, str]:
    """The variables that are set and change what apr, CuPy or the driver do; unknown APR_* too."""
    return {k: v for k, v in sorted(os.environ.items())
            if k.startswith(("APR_", "CUPY_"))
            or k in (SKIP_GATE, "CUDA_VISIBLE_DEVICES", "CUDA_PATH", "LD_LIBRARY_PATH")}


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The whole environment with these changes, for a pytest that apr starts.

    Without options meant for another, and without CI's variables: with them pytest makes a whole diff, which of 51 kB
    that differ everywhere takes minutes, and a mutant that its test caught would count as a run without an end.
    """
    return {k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "CI", "BUILD_NUMBER")} | dict(changes)
