"""A GPU for machines without one that does what it is told as late as it may, when somebody waits for it; or at once.

Memory is NumPy's. Kernels and products do nothing but appear in `log`, but for a few that tell steps apart: what
embedding_forward finds in `ids` and `targets` is kept, cross_entropy_sum adds the sum of both, and adamw_prepare makes
a norm of the learning rate and counts the update. A copy from pinned memory reads it when it is made, not when it is
asked for, as a real one may.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from apr.kernel import DEVICE_DTYPES


class LazyGpu:
    """As much of a Device as a trainer asks for."""

    name, ordinal, fast = "lazy", 0, frozenset()

    def __init__(self, eager=False):
        self.eager = eager
        self.queue, self.done, self.log, self.seen, self.recording, self.waits = [], 0, [], [], None, 0
        self.cache = SimpleNamespace(warm=lambda needed: None, get=lambda spec, baked: None, freeze=lambda: None)
        self.arena = None

    def add(self, work):
        (self.queue if self.recording is None else self.recording).append(work)
        if self.eager:
            self.run()

    def run(self, until=None):
        """Do what is queued, up to a mark."""
        while self.done < (len(self.queue) if until is None else until):
            self.queue[self.done]()
            self.done += 1

    def free_bytes(self):
        return 1 << 40, 1 << 40

    def empty(self, shape, dtype):
        return np.zeros(shape, DEVICE_DTYPES[dtype])

    def mapped(self, shape, dtype):
        host = self.empty(shape, dtype)
        return host, host

    def fill(self, array, byte):
        def work():
            array.reshape(-1).view(np.uint8)[...] = byte
            self.log.append(("fill", array))
        self.add(work)

    def launch(self, spec, baked, grid, block, args, shared=0, programmatic=False, cluster=None):
        def work():
            self.log.append((spec.entry, args))
            stats, step = (self.arena[name] for name in ("stats", "step")) if self.arena else (None, None)
            if spec.entry == "embedding_forward":
                self.seen.append((args[2].copy(), self.arena.rows("targets", args[2].shape).copy(), step.copy()))
            elif spec.entry == "cross_entropy_sum":
                stats[0] += float(self.seen[-1][0].sum()) + float(self.seen[-1][1].sum())
            elif spec.entry == "adamw_prepare":
                stats[1:] = step[1], np.isfinite(stats[0]) and np.isfinite(step[1]), stats[3] + 1
        self.add(work)

    def product(self, kind, *args):
        self.add(lambda: self.log.append((kind, args)))

    def send(self, array, pinned):
        def work():
            array[...] = pinned
        self.add(work)

    def fetch(self, pinned, array):
        def work():
            pinned[...] = array
        self.add(work)

    def mark(self):
        assert self.recording is None
        return len(self.queue)

    def wait(self, mark):
        self.waits += self.done < mark
        self.run(mark)

    def upload(self, array, host):
        values = np.array(host).reshape(array.shape)
        self.add(lambda: np.copyto(array, values))

    def download(self, array):
        self.run()
        return array.copy()

    def synchronize(self):
        self.run()

    @contextmanager
    def capture(self, into):
        self.recording = []
        yield
        recorded, self.recording = self.recording, None
        into.append(recorded)

    def replay(self, graph, name):
        self.log.append(("replay", name))
        for work in graph:
            self.add(work)


class LazyGemm:
    """Products that are only logged: linear, dinp and dweight with its `add`."""

    def __init__(self, dev, workspace, chosen=None):
        self.dev = dev

    def record(self):
        return {}

    def linear(self, out, inp, weight, bias=None):
        self.dev.product("linear", out, bias)

    def linear_dinp(self, dinp, dout, weight):
        self.dev.product("dinp", dinp)

    def linear_dweight(self, dweight, dout, inp, *, add):
        self.dev.product("dweight", dweight, add)
