"""PyTorch's side of benchmarks/bench_step.py: a trainer in one mode, its rounds, its memory. It imports torch late."""

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

from apr.config import encode
from apr.errors import DeviceFault, one_line
from apr.tools.bench import OurStep, seconds_a_step, train_config

GIB = 2**30
WARM_STEPS = 6


class TorchStep:
    """The same model on the same tokens as `ours`, compiled in `mode` and warmed up; `about` is for the row."""

    def __init__(self, mode: str, ours: OurStep, steps: int) -> None:
        import torch
        from torch_model import TorchTrainer

        self.torch = torch
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_reserved(), time.perf_counter()
        config = train_config(ours.batch, ours.length, ours.precision)
        self.lr, self.trainer = config.lr, TorchTrainer(encode(ours.model), encode(config), mode)
        self.data = [(torch.from_numpy(b.inputs).cuda().long(), torch.from_numpy(b.targets).cuda().long())
                     for b in ours.batches[:steps]]
        for i in range(WARM_STEPS):
            self.trainer.step(*self.data[i % len(self.data)], self.lr)[0].item()
        self.about = {"peer_gib": (torch.cuda.max_memory_reserved() - before) / GIB,
                      "peer_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
                      "peer_compile_s": time.perf_counter() - start, "torch": torch.__version__}

    def round(self) -> float:
        """Seconds of a step, over one round, by the clock."""
        def start(batch: tuple[Any, Any]) -> Callable[[], Any]:
            numbers = self.trainer.step(*batch, self.lr)
            return lambda: [float(number) for number in numbers]  # what a training loop logs

        self.torch.cuda.synchronize()
        return seconds_a_step(start, self.data)

    def close(self) -> None:
        """Give the memory back, so that the next mode has it."""
        del self.trainer, self.data
        release(self.torch)


def release(torch: Any) -> None:
    """Give back what PyTorch holds and nobody uses, graphs of torch.compile included."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def attempt(mode: str, ours: OurStep, steps: int) -> TorchStep | None:
    """The peer in `mode`; None, and said, where there is no PyTorch here, or it cannot (memory, what it lacks)."""
    try:
        return TorchStep(mode, ours, steps)
    except DeviceFault:
        raise
    except Exception as e:  # whatever PyTorch raises
        print(one_line(f"no peer in mode {mode}: {type(e).__name__}: {e}", 300), file=sys.stderr)
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        release(torch)
    return None
