"""Device: one GPU, its stream and its kernels; made once and passed down. Everything asynchronous is waited for here.

A CUDA error of the kind that stays ("illegal address") is not survivable: DeviceFault ends the process, and nothing
asks CUDA for anything again. It shows at the next wait, so the kernels launched since the last one are remembered and
named; with APR_SYNC=1 every launch is waited for and the fault names its own.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from apr import driver, paths
from apr.dtypes import BY_NAME
from apr.errors import AprError, DeviceFault, OutOfMemoryError, ShapeError, UnavailableError
from apr.kernel import DEVICE_DTYPES, Baked, KernelSpec, fast_paths
from apr.ptx_cache import PtxCache, arch_of

REMEMBERED = 8  # kernels that a fault names


class Device:
    """GPU number `ordinal`. `folder`: where its kernels are kept (default: the user's cache folder).

    Raises UnavailableError when there is no such GPU, it is too old, or its libraries are not here.
    """

    def __init__(self, ordinal: int = 0, folder: Path | None = None, warn: Callable[[str], None] | None = None) -> None:
        found = driver.probe()
        if problems := driver.cuda_problems(found, ordinal):
            raise UnavailableError(f"GATE-GPUTRAIN-002 cuda:{ordinal}", "a GPU that can be used", "; ".join(problems),
                                   "see 'apr doctor', or use --device cpu")
        info = found.devices[ordinal]
        self.ordinal, self.name, self.capability, self.sm_count = ordinal, info.name, info.capability, info.sm_count
        self.cupy = driver.import_cupy()
        self.sync_launches = paths.environment().get("APR_SYNC") == "1"
        self.recent: deque[str] = deque(maxlen=REMEMBERED)
        self.capturing = False
        with self.errors("device"):
            self.stream = self.cupy.cuda.Stream(non_blocking=True)
        self.cache = PtxCache(arch_of(self.capability), folder, warn=warn)
        self.fast = fast_paths(self.cache.arch, paths.environment().get("APR_GENERAL", ""))

    def launch(self, spec: KernelSpec, baked: Baked, grid: Sequence[int], block: Sequence[int], args: Sequence[Any],
               shared: int = 0, programmatic: bool = False, cluster: tuple[int, int, int] | None = None) -> None:
        """Launch a kernel on the stream; see Kernel.launch."""
        self.use()
        kernel = self.cache.get(spec, baked)
        kernel.launch(self.stream.ptr, grid, block, args, shared, programmatic, cluster)
        self.launched(kernel.key)

    def use(self) -> None:
        """Make this the current GPU of the calling thread, where there are several."""
        self.cupy.cuda.runtime.setDevice(self.ordinal)

    def launched(self, name: str) -> None:
        """Remember a launch for the message of a fault; with APR_SYNC=1 wait for it."""
        self.recent.append(name)
        if self.sync_launches and not self.capturing:
            self.synchronize()

    def synchronize(self) -> None:
        """Wait for everything on the stream. Raises DeviceFault."""
        with self.errors("waiting for the GPU"):
            self.stream.synchronize()
        self.recent.clear()

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Turn CUDA's errors of the block into apr's own."""
        runtime = self.cupy.cuda.runtime.CUDARuntimeError
        try:
            self.use()
            yield
        except self.cupy.cuda.memory.OutOfMemoryError as e:
            raise OutOfMemoryError(what, "room on the GPU", str(e), "lower --batch-size or --seq-length") from None
        except (runtime, self.cupy.cuda.driver.CUDADriverError) as e:
            code = int(getattr(e, "status", 0))
            if code == driver.OUT_OF_MEMORY:
                raise OutOfMemoryError(what, "room on the GPU", str(e), "lower --batch-size or --seq-length") from None
            if driver.is_sticky(code):
                names = ", ".join(self.recent) or "no kernel of apr"
                more = "" if self.sync_launches or len(self.recent) == 1 else "; APR_SYNC=1 names the one"
                raise DeviceFault(f"{what}: one of: {names}", "no CUDA error", str(e),
                                  f"the process ends; resume from the last checkpoint{more}") from None
            raise AprError(what, "no CUDA error", str(e), "see 'apr doctor'") from None

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An array of its own allocation, not initialised; dtype as kernels spell it."""
        kind = DEVICE_DTYPES[dtype]
        size = max(1, int(np.prod(shape, dtype=np.int64))) * kind.itemsize
        with self.errors(f"{size / 2**30:.2f} GiB of device memory"):
            memory = self.cupy.cuda.MemoryPointer(self.cupy.cuda.Memory(size), 0)
        return self.cupy.ndarray(shape, kind, memory)

    def mapped(self, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, Any]:
        """Pinned memory of the host, not initialised, and the same memory as kernels see it."""
        kind = DEVICE_DTYPES[dtype]
        size = max(1, int(np.prod(shape, dtype=np.int64))) * kind.itemsize
        with self.errors(f"{size / 2**20:.1f} MiB of pinned host memory"):
            memory = self.cupy.cuda.alloc_pinned_memory(size)
        host = np.frombuffer(memory, kind, int(np.prod(shape, dtype=np.int64))).reshape(shape)
        whole = self.cupy.cuda.UnownedMemory(memory.ptr, size, memory, self.ordinal)
        return host, self.cupy.ndarray(shape, kind, self.cupy.cuda.MemoryPointer(whole, 0))

    def upload(self, array: Any, host: np.ndarray) -> None:
        """Copy to the GPU, in the order of the stream; `host` may be changed after the return.

        Raises ShapeError for another dtype or size; a bfloat16 array goes into uint16.
        """
        values = np.ascontiguousarray(host)
        if values.dtype == BY_NAME["BF16"].numpy:
            values = values.view(np.uint16)
        if values.dtype != array.dtype or values.size != array.size:
            raise ShapeError("copy to the GPU", f"{array.size} elements of {array.dtype}",
                             f"{values.size} of {values.dtype}", "convert them first")
        with self.errors("copy to the GPU"):
            array.set(values.reshape(array.shape), stream=self.stream)

    def send(self, array: Any, pinned: np.ndarray) -> None:
        """Copy pinned memory of the same size to the GPU, in the order of the stream: it must stay as it is until then.
        """
        with self.errors("copy to the GPU"):
            array.data.copy_from_host_async(pinned.ctypes.data, pinned.nbytes, self.stream)

    def fetch(self, pinned: np.ndarray, array: Any) -> None:
        """Copy an array to pinned memory of the same size, in the order of the stream: wait(mark()) before it is read.
        """
        with self.errors("copy from the GPU"):
            array.data.copy_to_host_async(pinned.ctypes.data, array.nbytes, self.stream)

    def mark(self) -> Any:
        """A mark behind everything that is on the stream, for `wait`."""
        with self.errors("mark on the stream"):
            event = self.cupy.cuda.Event(disable_timing=True)
            event.record(self.stream)
        return event

    def wait(self, mark: Any) -> None:
        """Wait for everything before a mark. Raises DeviceFault."""
        with self.errors("waiting for the GPU"):
            mark.synchronize()

    def download(self, array: Any) -> np.ndarray:
        """Copy from the GPU and wait; bf16 comes as uint16. Raises DeviceFault."""
        with self.errors("copy from the GPU"):
            out = array.get(stream=self.stream)
            self.stream.synchronize()
        self.recent.clear()
        return np.asarray(out)

    def fill(self, array: Any, byte: int) -> None:
        """Set every byte."""
        with self.errors("memset"):
            array.data.memset_async(byte, array.nbytes, self.stream)

    def free_bytes(self) -> tuple[int, int]:
        """Free and total bytes of device memory."""
        with self.errors("memory"):
            free, total = self.cupy.cuda.Device(self.ordinal).mem_info
        return int(free), int(total)

    @contextmanager
    def capture(self, into: list[Any]) -> Iterator[None]:
        """Record what the block launches as a CUDA graph, which is appended to `into`; nothing runs."""
        with self.errors("graph capture"), self.stream:
            self.stream.begin_capture()
            self.capturing = True
            try:
                yield
            finally:
                self.capturing = False
                graph = self.stream.end_capture()
            into.append(graph)

    def running(self) -> bool:
        """Whether something on the stream has not ended. Raises DeviceFault."""
        with self.errors("waiting for the GPU"):
            return not self.stream.done

    def replay(self, graph: Any, name: str) -> None:
        """Launch a captured graph."""
        with self.errors(name):
            graph.launch(self.stream)
        self.launched(name)
