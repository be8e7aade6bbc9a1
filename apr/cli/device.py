"""--device: grammar and choice. Only `auto` may choose the CPU, and it says so.

`cuda` needs the GPU trainer, which this version does not have: it is refused before anything is read or written
(GATE-GPUTRAIN-002), never replaced by the CPU.
"""

import re
import sys

from apr.errors import ConfigError, UnavailableError
from apr.paths import environment

GRAMMAR = re.compile(r"(cpu|cuda(:([0-9]|1[0-5]))?|auto)")
NO_GPU_TRAINER = "this version of apr trains on the CPU only"


def choose_device(asked: str | None) -> str:
    """The device to use: "cpu". `asked` None means APR_DEVICE, else auto.

    Raises ConfigError for a word outside the grammar, UnavailableError for cuda.
    """
    word = asked if asked is not None else environment().get("APR_DEVICE", "auto")
    if not GRAMMAR.fullmatch(word):
        raise ConfigError("--device", "cpu, cuda, cuda:0 to cuda:15 or auto", repr(word), "correct it")
    if word.startswith("cuda"):
        raise UnavailableError("GATE-GPUTRAIN-002 --device", f"a device that can be used instead of '{word}'",
                               NO_GPU_TRAINER, "use --device cpu or auto")
    if word == "auto":
        print(f"device: cpu (reason: {NO_GPU_TRAINER})", file=sys.stderr)
    return "cpu"
