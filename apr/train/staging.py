"""What a step sends to the GPU and what comes back: through pinned memory that is allocated once, and without a wait.

A copy is made in the order of the stream, after all that was launched before it, while the host goes on; so the host
may not change what a copy has yet to read, nor read what a copy has yet to write. Of the memory that is sent from there
are as many sets as the steps under way have parts, taken in turns: of the step before them everything is done. Where
there are more parts (a batch larger than planned), the host waits, and never the GPU: the last two parts are with it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from apr.arena import Arena
from apr.device import Device

SENT = ("ids", "targets", "order", "runs", "step")  # buffers of the plan


class Staging:
    """Pinned memory for the buffers of SENT and for `stats`: of `steps` under way, each of `parts`, as a rule."""

    def __init__(self, dev: Device, arena: Arena, steps: int, parts: int) -> None:
        self.dev, self.arena, self.steps, self.sets = dev, arena, steps, steps * parts
        specs = {b.name: b for b in arena.plan.buffers}
        self.hosts = [{name: dev.mapped((specs[name].size,), specs[name].dtype)[0] for name in SENT}
                      for _ in range(self.sets)]
        self.sent: list[Any] = [None] * self.sets  # marks: the copies from this memory are done
        self.back = [dev.mapped(specs["stats"].shape, specs["stats"].dtype)[0] for _ in range(steps)]
        self.sends = self.fetches = 0

    def send(self, values: Mapping[str, np.ndarray]) -> None:
        """Copy arrays of the buffers' dtypes to the beginnings of the buffers; they may be changed after the return."""
        turn = self.sends % self.sets
        if self.sent[turn] is not None:
            self.dev.wait(self.sent[turn])
        for name, value in values.items():
            host = self.hosts[turn][name][:value.size]
            host[...] = value
            self.dev.send(self.arena.rows(name, (value.size,)), host)
        self.sent[turn] = self.dev.mark()
        self.sends += 1

    def fetch(self) -> Callable[[], np.ndarray]:
        """Copy `stats` (STATS,) f64 as it will be after all that was launched; the result waits for it and returns it.

        At most `steps` may be unread. The result raises DeviceFault.
        """
        host = self.back[self.fetches % self.steps]
        self.dev.fetch(host, self.arena["stats"])
        mark = self.dev.mark()
        self.fetches += 1

        def read() -> np.ndarray:
            self.dev.wait(mark)
            return host.copy()

        return read
