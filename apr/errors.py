"""Every error that a user can meet, and the exit code of each.

    AprError                      1   internal: a defect of apr, not of the input
    ├── ConfigError               2   flag, config key, value or combination
    ├── NotFoundError             3   a path that does not exist
    ├── FormatError               4   a file that is not what it claims to be
    ├── GateError                 5   measured and disproven: gate, guard, parity, contract
    ├── IntegrityError            6   checksum or hash differs
    ├── StorageError              7   read or write failed: disk full, no permission, I/O
    ├── InferenceError            8   generation that cannot go on: scores that are not numbers
    ├── UnavailableError          9   device or feature not here (never a silent fallback)
    ├── DeviceFault              10   CUDA error that ends the process: illegal address, lost device
    ├── OutOfMemoryError         11   host or device memory
    ├── MeasureError             12   a comparison that could not be made: nothing was measured, so nothing passed
    ├── Stopped                  75   stopped on request, resumable checkpoint written
    ├── ShapeError                1   an array does not fit its declared shape or dtype
    ├── KernelError               1   a compiled kernel that does not load
    ├── KernelParamError          1   the baked names differ from the declared ones
    ├── KernelCompileError        1   the compiler refused the source, or warned
    ├── KernelCacheFrozen         1   a compile was needed after the warm-up: it names the key
    └── LaunchError               1   argument count, order, type or layout; grid or block

A message has four parts, always: where, what was expected, what was found, what to do. It is one line.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class AprError(Exception):
    """An error with a place, an expectation, a finding and a remedy; `exit_code` is what the process ends with."""

    exit_code = 1

    def __init__(self, where: str, expected: str, found: str, fix: str) -> None:
        self.where, self.expected, self.found, self.fix = where, expected, found, fix
        super().__init__(one_line(f"{where}: expected {expected}, found {found}; {fix}"))


class ConfigError(AprError):
    exit_code = 2


class NotFoundError(AprError):
    exit_code = 3


class FormatError(AprError):
    exit_code = 4


class GateError(AprError):
    """A gate, guard or parity check that ran and failed; `where` starts with the gate's id."""

    exit_code = 5


class IntegrityError(AprError):
    exit_code = 6


class StorageError(AprError):
    exit_code = 7


class InferenceError(AprError):
    exit_code = 8


class UnavailableError(AprError):
    exit_code = 9


class DeviceFault(AprError):
    exit_code = 10


class OutOfMemoryError(AprError):
    exit_code = 11


class MeasureError(AprError):
    """A comparison or gate that could not be run: not a pass, and not a failure either."""

    exit_code = 12


class Stopped(AprError):
    """A signal asked for the end of the run; the newest checkpoint holds the last finished step."""

    exit_code = 75


class ShapeError(AprError):
    exit_code = 1


class KernelError(AprError):
    exit_code = 1


class KernelParamError(AprError):
    exit_code = 1


class KernelCompileError(AprError):
    exit_code = 1


class KernelCacheFrozen(AprError):
    exit_code = 1


class LaunchError(AprError):
    exit_code = 1


def one_line(text: str, limit: int = 600) -> str:
    """`text` on one line of printable characters: file names and contents are not to be trusted with a terminal."""
    clean = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest known one, or the list of them."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else "known: " + ", ".join(names)
