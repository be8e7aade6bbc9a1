"""Where things are: the kernel and contract folders, and the process environment (this is its only reader).

The environment variables of apr are these and no others; an unknown `APR_*` is refused, because a misspelt switch
that is silently ignored is a wrong result waiting to happen.
"""

import os
from pathlib import Path

from apr.errors import ConfigError, NotFoundError, did_you_mean

ENVIRONMENT = {
    "APR_DEVICE": "default of --device",
    "APR_TRACEBACK": "1: print the whole traceback of an internal error",
}


def environment() -> dict[str, str]:
    """The `APR_*` variables that are set.

    Raises ConfigError for a name that is not in ENVIRONMENT.
    """
    found = {k: v for k, v in os.environ.items() if k.startswith("APR_")}
    for name in found:
        if name not in ENVIRONMENT:
            raise ConfigError(f"environment variable {name}", "a variable that apr knows", "an unknown name",
                              did_you_mean(name, ENVIRONMENT))
    return found


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
