"""--device: grammar and choice. Only `auto` may choose the CPU, and it says why.

`cuda` where no GPU can be used is refused before anything is read or written (GATE-GPUTRAIN-002), never replaced by
the CPU. The choice asks the driver and looks for files; it imports no CuPy and makes no CUDA context.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from apr.driver import DriverInfo, cuda_problems, cuda_versions, probe
from apr.errors import ConfigError, UnavailableError
from apr.paths import environment

GRAMMAR = re.compile(r"(cpu|cuda(:([0-9]|1[0-5]))?|auto)")


@dataclass(frozen=True)
class Choice:
    """A device that can be used, and the precision to compute in on it unless the user says otherwise."""

    kind: str  # cpu or cuda
    ordinal: int  # 0 on the CPU
    precision: str  # fp32 or bf16

    @property
    def text(self) -> str:
        """'cpu' or 'cuda:N'."""
        return f"cuda:{self.ordinal}" if self.kind == "cuda" else self.kind


def choose_device(asked: str | None, find: Callable[[], DriverInfo] = probe) -> Choice:
    """The device to use. `asked` None means APR_DEVICE, else auto; `find` looks for the driver, for cuda and auto.

    Raises ConfigError for a word outside the grammar, UnavailableError for a GPU that cannot be used.
    """
    word = asked if asked is not None else environment().get("APR_DEVICE", "auto")
    match = GRAMMAR.fullmatch(word)
    if not match:
        raise ConfigError("--device", "cpu, cuda, cuda:0 to cuda:15 or auto", repr(word), "correct it")
    cpu = Choice("cpu", 0, "fp32")
    if word == "cpu":
        return cpu
    ordinal = int(match[3] or 0)
    info = find()
    problems = cuda_problems(info, ordinal)
    if problems and word != "auto":
        raise UnavailableError("GATE-GPUTRAIN-002 --device", f"a GPU that can be used as '{word}'",
                               f"{'; '.join(problems)} [{cuda_versions(info)}]",
                               "'apr doctor' says more; --device cpu or auto works without one")
    if problems:
        print(f"device: cpu (reason: {problems[0]})", file=sys.stderr)
        return cpu
    device = info.devices[ordinal]
    if word == "auto":
        print(f"device: cuda:{ordinal} ({device.name}, driver {info.driver_version})", file=sys.stderr)
    return Choice("cuda", ordinal, "bf16")
