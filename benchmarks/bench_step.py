"""A whole training step on a GPU beside torch.compile: tokens per second, MFU, memory, milliseconds of each group.

    python benchmarks/bench_step.py [--preset qwen2_0_5b --batch 8 --length 2048] [--mode default|reduce-overhead|eager]
                                    [--rounds 5 --steps 5] [--no-peer] [--groups] [--first-step] [--results DIR]

Both sides train the same model on the same random tokens, in bf16 with float32 master weights, in turns: a round is
`steps` steps of ours, then of the peer, and the median of the rounds counts. Both read the loss and the norm of a step
when the next one has been started, as a training loop may; a round ends when its last are read. Memory is what the
device holds more after a side's steps than before it was made. --groups runs our step kernel by kernel between device
events; --first-step measures fresh processes, from their start to their first finished step, with an empty kernel cache
and with a full one.

    MFU = tokens/s * FLOPs per token / peak;  FLOPs per token = 6 (matrix parameters) + 6 L NH HS T (causal attention)
"""

import argparse
import datetime
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import append, results_file

from apr.config import TransformerTrainConfig, encode
from apr.data.batch import LMBatch
from apr.device import Device
from apr.driver import probe
from apr.params import param_specs
from apr.presets import preset
from apr.train.cuda_trainer import CudaTransformerTrainer

COLUMNS = ("date", "gpu", "driver", "preset", "batch", "length", "precision", "mode", "ours_gib", "plan_gib",
           "peer_gib", "peer_allocated_gib", "peer_compile_s", "torch", "ours_ms", "ours_tok_s", "ours_mfu",
           "ours_of_measured", "peer_ms", "peer_tok_s", "peer_mfu", "peer_of_measured", "ratio", "first_step_cold_s",
           "first_step_warm_s")
Start = Callable[[Any], Callable[[], Any]]  # starts a step; what it returns waits for the step's numbers
PEAK, MEASURED = 989.4e12, 788e12  # bf16 FLOP/s of an H100/H200: the data sheet's, and a large product's
GROUPS = {"embedding": "embedding", "rmsnorm": "norm + residual", "rope": "rope", "linear": "bias",
          "attention": "attention", "swiglu": "swiglu", "cross_entropy": "cross-entropy", "adamw": "AdamW",
          "global_norm": "gradient norm"}


class TimedDevice(Device):
    """A Device that puts an event after every launch."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, Any]] = []

    def launched(self, name: str) -> None:
        super().launched(name)
        event = self.cupy.cuda.Event()
        event.record(self.stream)
        self.events.append((name, event))

    def groups(self) -> dict[str, float]:
        """Milliseconds by group since the last call; a kernel's time is from the event before it to its own."""
        self.synchronize()
        out: dict[str, float] = defaultdict(float)
        for (_, before), (name, after) in zip(self.events, self.events[1:], strict=False):
            entry, _, key = name.partition(" of ")
            stem = key.split("-")[0].removesuffix("_f32")
            group = GROUPS.get(stem, "products")
            if group == "attention":
                group = entry.replace("attention_", "attention ").replace("_", " ")
            out[group] += self.cupy.cuda.get_elapsed_time(before, after)
        self.events.clear()
        return dict(out)


def flops_per_token(name: str, length: int) -> float:
    """6 FLOPs per matrix parameter (a tied table counts once, as the head) and causal attention."""
    c = preset(name)
    matrices = sum(s.size for s in param_specs(c) if s.decay and (c.tie_word_embeddings or "embed" not in s.name))
    return 6.0 * matrices + 6.0 * c.L * c.NH * c.HS * length


def used(dev: Device) -> int:
    """Bytes of device memory that anyone holds."""
    free, total = dev.free_bytes()
    return total - free


def batches(args: argparse.Namespace, count: int) -> list[LMBatch]:
    """Random tokens."""
    rng = np.random.default_rng(1)
    return [LMBatch.from_rows(rng.integers(0, preset(args.preset).V, (args.batch, args.length + 1)))
            for _ in range(count)]


def settings(args: argparse.Namespace) -> TransformerTrainConfig:
    """How both sides train."""
    return TransformerTrainConfig(lr=1e-4, batch_size=args.batch, max_seq_len=args.length, precision=args.precision,
                                  weight_decay=0.1, beta2=0.95)


def our_step(trainer: CudaTransformerTrainer, lr: float) -> Start:
    """Of a batch."""
    return lambda batch: trainer.start_batch(batch, lr).result


def peer_step(trainer: Any, lr: float) -> Start:
    """Of inputs and targets on the GPU."""
    def start(batch: tuple[Any, Any]) -> Callable[[], Any]:
        numbers = trainer.step(*batch, lr)
        return lambda: [float(number) for number in numbers]
    return start


def seconds(start: Start, data: Sequence[Any]) -> float:
    """Of one step: each is started before the numbers of the one before it are read, by what its start returned."""
    begin, read = time.perf_counter(), None
    for batch in data:
        following = start(batch)
        if read is not None:
            read()
        read = following
    assert read is not None
    read()
    return (time.perf_counter() - begin) / len(data)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both sides in turns; the row."""
    dev = Device()
    model, config, data = preset(args.preset), settings(args), batches(args, args.steps)
    before = used(dev)
    ours = CudaTransformerTrainer.new(model, config, dev)
    for b in data[:3] * 2:
        ours.train_batch(b)
    row: dict[str, Any] = {"ours_gib": (used(dev) - before) / 2**30, "plan_gib": ours.arena.plan.bytes / 2**30}
    peer, losses = None, []
    if not args.no_peer:
        import torch
        from torch_model import TorchTrainer

        start, before = time.perf_counter(), used(dev)
        peer = TorchTrainer(encode(model), encode(config), args.mode)
        on_gpu = [(torch.from_numpy(b.inputs).cuda().long(), torch.from_numpy(b.targets).cuda().long()) for b in data]
        for x, y in on_gpu[:3] * 2:
            losses.append(peer.step(x, y, config.lr)[0].item())
        row |= {"peer_gib": torch.cuda.max_memory_reserved() / 2**30,
                "peer_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
                "peer_compile_s": time.perf_counter() - start, "torch": torch.__version__}
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(args.rounds):
        times["ours"].append(seconds(our_step(ours, config.lr), data))
        if peer is not None:
            torch.cuda.synchronize()
            times["peer"].append(seconds(peer_step(peer, config.lr), on_gpu))
    tokens, per_token = args.batch * args.length, flops_per_token(args.preset, args.length)
    for side, values in times.items():
        if values:
            rate = tokens / statistics.median(values)
            row |= {f"{side}_ms": 1000 * statistics.median(values), f"{side}_tok_s": rate,
                    f"{side}_mfu": rate * per_token / PEAK, f"{side}_of_measured": rate * per_token / MEASURED}
    if peer is not None:
        row["ratio"] = row["ours_tok_s"] / row["peer_tok_s"]
        del peer
        torch.cuda.empty_cache()
    del ours
    gc.collect()
    return row


def group_table(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of each group of kernels, launched one by one."""
    dev = TimedDevice()
    trainer = CudaTransformerTrainer.new(preset(args.preset), settings(args), dev, graphs=False)
    data, rounds = batches(args, 3), []
    for b in data * 2:
        trainer.train_batch(b)
        rounds.append(dev.groups())
    return {g: statistics.median(r.get(g, 0.0) for r in rounds[2:]) for g in sorted(rounds[-1], key=rounds[-1].get,
                                                                                      reverse=True)}


def first_steps(args: argparse.Namespace) -> dict[str, float]:
    """Seconds from process start to the first finished step, with an empty cache and then with a full one."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            start = time.time()
            run = subprocess.run([sys.executable, __file__, "--one-step", "--preset", args.preset, "--batch",
                                  str(args.batch), "--length", str(args.length), "--precision", args.precision],
                                 env={**os.environ, "APR_CACHE_DIR": folder}, capture_output=True, text=True,
                                 check=True)
            out[f"first_step_{state}_s"] = float(run.stdout.split()[-1]) - start
    return out


def one_step(args: argparse.Namespace) -> None:
    """One step in this process; prints the time of its end."""
    trainer = CudaTransformerTrainer.new(preset(args.preset), settings(args))
    trainer.train_batch(batches(args, 1)[0])
    print(time.time())


def main() -> None:
    """Measure, print, and with --results append a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", default="qwen2_0_5b")
    add("--batch", type=int, default=8)
    add("--length", type=int, default=2048)
    add("--precision", default="bf16")
    add("--mode", default="default", choices=("default", "reduce-overhead", "eager"))
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=5)
    add("--results", type=Path)
    for flag in ("--no-peer", "--groups", "--first-step", "--one-step"):
        add(flag, action="store_true")
    args = parser.parse_args()
    if args.one_step:
        return one_step(args)
    row: dict[str, Any] = {"date": datetime.date.today().isoformat(), "gpu": probe().devices[0].name,
                           "driver": probe().driver_version, "preset": args.preset, "batch": args.batch,
                           "length": args.length, "precision": args.precision, "mode": args.mode}
    row |= compare(args)
    if args.first_step:
        row |= first_steps(args)
    for key, value in row.items():
        print(f"{key:20} {value:.4g}" if isinstance(value, float) else f"{key:20} {value}")
    if args.groups:
        groups = group_table(args)
        total = sum(groups.values())
        print(f"\n{'group':28}{'ms':>9}{'share':>8}")
        for group, ms in [*groups.items(), ("sum", total)]:
            print(f"{group:28}{ms:9.2f}{ms / total:8.1%}")
    if args.results:
        record(row, args.results)
    return None


def record(row: dict[str, Any], results: Path) -> None:
    """Append a row to the file of its GPU; a side or a measurement that was left out leaves its columns empty."""
    plain = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
    append(results_file(results, row["gpu"], "step"), [plain], COLUMNS)


if __name__ == "__main__":
    main()
