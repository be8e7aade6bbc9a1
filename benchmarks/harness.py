"""How every bench_<op>.py measures: events on apr's own stream, a flushed L2, PyTorch in turns on the same stream.

    python benchmarks/bench_<op>.py [--results DIR] [--no-peer] [--quick]

A case states its bytes and FLOPs (what the header of its .cu file counts) without a GPU; `setup` makes its arrays and
launches on one. Data are random, never zeros: a GPU multiplies zeros faster. Rates are compared with what the same GPU
does in the same run: a large copy, counting what it reads and writes, and large products.

A row of results/<gpu>/<op>.csv is one case beside one peer; ratio is peer_us / us, so above 1 apr is the quicker.
Nothing here imports CuPy or PyTorch before there is a GPU.
"""

import argparse
import csv
import datetime
import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers import Peers, find_torch

from apr import driver
from apr.buffers import WORKSPACE, logits_rows
from apr.config import TransformerConfig
from apr.device import Device
from apr.dtypes import BY_NAME
from apr.errors import AprError, DeviceFault, one_line
from apr.gemm import Gemm
from apr.kernel import DEVICE_DTYPES
from apr.presets import preset

HERE = Path(__file__).resolve().parent
MODELS = {name: preset(name) for name in ("qwen2_0_5b", "llama_370m")}
B, T = 8, 2048
N = B * T
BYTES = {"bf16": 2, "f32": 4}  # s of the formulas
FLUSH = 256 << 20  # bytes written between repetitions: several times any L2
FLUSH_SECONDS = 60e-6  # the least that writing them takes, on the quickest GPU
MOST_FLUSHES, MOST_REPETITIONS = 50, 1000
BLOCK = (1 << 22) + 1000  # random numbers made on the host; longer arrays repeat them
COLUMNS = ("date", "commit", "driver", "cupy", "case", "dtype", "us", "p20", "p80", "gbps", "tflops", "peer", "peer_us",
           "ratio", "torch")
Launch = Callable[[], Any]
Makers = Mapping[str, Callable[[], Launch]]


class Timing(NamedTuple):
    """Microseconds on the GPU: of half of the repetitions, of a fifth, of four fifths, at most these."""

    median: float
    p20: float
    p80: float


@dataclass
class Work:
    """A case on a GPU: our launch; peers by name, each made when it is measured; what to do, untimed, before ours."""

    launch: Launch
    peers: Callable[[Peers], Makers] = lambda peers: {}
    reset: Launch | None = None


@dataclass(frozen=True)
class Case:
    """What is measured: bytes and FLOPs that must be moved and done, and how it is set up.

    `compute`: the rate that counts is FLOP/s, else bytes per second.
    """

    name: str
    dtype: str
    bytes: int
    flops: int
    setup: "Callable[[Bench], Work]"
    compute: bool = False


@dataclass
class Bench:
    """A GPU to measure on: device, products, PyTorch or None, and its arrays of random numbers."""

    dev: Device
    peers: Peers | None = None
    quick: bool = False
    blocks: dict[tuple[str, bool], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gemm = Gemm(self.dev, self.dev.empty((WORKSPACE,), "u8"))

    def empty(self, shape: tuple[int, ...], storage: str) -> Any:
        """An array that a launch writes before anything reads it."""
        return self.dev.empty(shape, storage)

    def put(self, host: np.ndarray) -> Any:
        """A copy of a NumPy array."""
        storage = next(name for name, dtype in DEVICE_DTYPES.items() if dtype == host.dtype)
        array = self.dev.empty(host.shape, storage)
        self.dev.upload(array, host)
        return array

    def random(self, shape: tuple[int, ...], storage: str, positive: bool = False) -> Any:
        """An array of normal numbers, f32 or bf16 (or their absolute values)."""
        if (storage, positive) not in self.blocks:
            numbers = np.random.default_rng(len(self.blocks)).standard_normal(BLOCK, np.float32)
            numbers = np.abs(numbers) if positive else numbers
            bf16 = numbers.astype(BY_NAME["BF16"].numpy).view(np.uint16)
            self.blocks[storage, positive] = self.put(bf16 if storage == "bf16" else numbers)
        array, block = self.dev.empty(shape, storage), self.blocks[storage, positive]
        for start in range(0, array.nbytes, block.nbytes):
            size = min(block.nbytes, array.nbytes - start)
            (array.data + start).copy_from_device_async(block.data, size, self.dev.stream)
        return array

    def copy(self, to: Any, source: Any) -> None:
        """Copy an array."""
        to.data.copy_from_device_async(source.data, source.nbytes, self.dev.stream)


def measure(dev: Device, launch: Launch, flush: bool = True, quick: bool = False) -> Timing:
    """How long what `launch` puts on dev.stream takes there; each repetition is timed by itself.

    Without `flush` the data may lie in L2, and a launch that is shorter than the host's work for it measures the host.
    """
    return measure_in_turns(dev, [launch], flush, quick)[0]


def measure_in_turns(dev: Device, launches: Sequence[Launch], flush: bool = True, quick: bool = False,
                     reset: Launch | None = None) -> list[Timing]:
    """measure() of several launches, one repetition of each at a time; `reset` runs, untimed, before the first."""
    least, seconds = (5, 0.02) if quick else (20, 0.2)
    memory = dev.empty((FLUSH,), "u8") if flush else None
    counts = [flushes(dev, launch) if flush else 0 for launch in launches]
    start, end = dev.cupy.cuda.Event(), dev.cupy.cuda.Event()
    times: list[list[float]] = [[] for _ in launches]
    begin = time.perf_counter()
    while len(times[0]) < least or (time.perf_counter() - begin < seconds * len(launches)
                                    and len(times[0]) < MOST_REPETITIONS):
        for i, launch in enumerate(launches):
            if reset is not None and i == 0:
                reset()
            for _ in range(counts[i]):
                dev.fill(memory, 0)
            start.record(dev.stream)
            launch()
            end.record(dev.stream)
            dev.synchronize()
            times[i].append(1e3 * dev.cupy.cuda.get_elapsed_time(start, end))
    return [Timing(*map(float, np.percentile(t, [50, 20, 80]))) for t in times]


def flushes(dev: Device, launch: Launch) -> int:
    """Warm a launch up; how many flushes keep the GPU busy while the host prepares it: events should see no waiting."""
    for _ in range(3):
        launch()
    dev.synchronize()
    start = time.perf_counter()
    launch()
    host = time.perf_counter() - start
    dev.synchronize()
    return min(MOST_FLUSHES, 1 + math.ceil(1.5 * host / FLUSH_SECONDS))


def head_rows(c: TransformerConfig, storage: str) -> int:
    """Rows of logits that training has in memory at a time."""
    return logits_rows(N, c.Vp * BYTES[storage])


def ceilings(b: Bench) -> dict[str, float]:
    """What this GPU does at best, per second: "copy" bytes read and written; FLOPs of "bf16" and "f32" products."""
    source, to = b.random((1 << 28,), "f32"), b.empty((1 << 28,), "f32")
    out = {"copy": 2 * source.nbytes / (1e-6 * measure(b.dev, lambda: b.copy(to, source), quick=b.quick).median)}
    for storage, size in (("bf16", 8192), ("f32", 4096)):
        inp, weight, result = (b.random((size, size), storage) for _ in range(3))
        timing = measure(b.dev, lambda o=result, i=inp, w=weight: b.gemm.linear(o, i, w), quick=b.quick)
        out[storage] = 2 * size**3 / (1e-6 * timing.median)
    return out


def run_case(b: Bench, case: Case) -> dict[str, Timing]:
    """The timings of a case: "" is ours, the others are peers by name. A peer that fails is left out, and named."""
    work = case.setup(b)
    launches = {"": work.launch}
    makers = {} if b.peers is None else work.peers(b.peers)
    for name, make in makers.items():
        try:
            launches[name] = make()
            launches[name]()
            b.dev.synchronize()
        except DeviceFault:
            raise
        except Exception as e:  # whatever PyTorch raises for what this build of it cannot do
            launches.pop(name, None)
            print(one_line(f"{case.name}: no peer '{name}': {type(e).__name__}: {e}", 200), file=sys.stderr)
    return dict(zip(launches, measure_in_turns(b.dev, list(launches.values()), True, b.quick, work.reset), strict=True))


def rows(case: Case, timings: dict[str, Timing], about: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of a case for the CSV file: one for each peer, or one without."""
    ours = timings[""]
    common = {**about, "case": case.name, "dtype": case.dtype, "us": round(ours.median, 2), "p20": round(ours.p20, 2),
              "p80": round(ours.p80, 2), "gbps": round(case.bytes / ours.median / 1e3, 1),
              "tflops": round(case.flops / ours.median / 1e6, 2)}
    peers = [{"peer": name, "peer_us": round(t.median, 2), "ratio": round(t.median / ours.median, 3)}
             for name, t in timings.items() if name]
    return [{**common, **peer} for peer in peers or [{"peer": "", "peer_us": "", "ratio": "", "torch": ""}]]


HEADING = (f"{'op':14}{'case':30}{'dtype':6}{'us (p20-p80)':>28}{'rate':>16}{'of best':>9}  {'peer':20}{'peer us':>10}"
           f"{'ratio':>7}")


def lines(op: str, case: Case, found: list[dict[str, Any]], best: dict[str, float]) -> list[str]:
    """The rows for people: ours once, then each peer."""
    row = found[0]
    us = f"{row['us']:.1f} ({row['p20']:.1f}-{row['p80']:.1f})"
    rate, unit, part = ((row["tflops"], "TFLOP/s", row["tflops"] * 1e12 / best[case.dtype]) if case.compute
                        else (row["gbps"], "GB/s", row["gbps"] * 1e9 / best["copy"]))
    ours = f"{op:14}{case.name:30}{case.dtype:6}{us:>28}{rate:9.1f} {unit:7}{part:8.0%}  "
    return [(" " * len(ours) if i else ours) + (f"{r['peer']:20}{r['peer_us']:10.1f}{r['ratio']:7.2f}" if r["peer"]
                                              else "") for i, r in enumerate(found)]


def report(b: Bench, ops: Mapping[str, Iterable[Case]], results: Path | None) -> int:
    """Measure every case; print the table as it grows and append the rows to the files of `results`.

    A case that fails is named, and the others go on; returns the exit code. Raises DeviceFault, which ends all.
    """
    best, about, code = ceilings(b), versions(b), 0
    print(f"{b.dev.name}: copy {best['copy'] / 1e9:.0f} GB/s, bf16 product {best['bf16'] / 1e12:.0f} TFLOP/s, "
          f"f32 product {best['f32'] / 1e12:.1f} TFLOP/s; ratio is peer / ours\n{HEADING}", flush=True)
    for op, cases in ops.items():
        for case in cases:
            try:
                found = rows(case, run_case(b, case), about)
            except DeviceFault:
                raise
            except Exception as e:
                print(one_line(f"{op} {case.name} {case.dtype}: {type(e).__name__}: {e}"), file=sys.stderr)
                code = code or getattr(e, "exit_code", 1)
                found = []
            if found:
                print("\n".join(lines(op, case, found, best)), flush=True)
                if results is not None:
                    append(results_file(results, b.dev.name, op), found)
            release(b)
    return code


def results_file(results: Path, gpu: str, name: str) -> Path:
    """Where the rows of a benchmark on this GPU are kept."""
    return results / gpu.lower().replace(" ", "-") / f"{name}.csv"


def append(path: Path, found: list[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """Add rows to a file, which begins with the names of its columns; what a row lacks stays empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(found)


def release(b: Bench) -> None:
    """Give the memory of the last case back, so that the next one has all of it."""
    gc.collect()
    if b.peers is not None:
        b.peers.torch.cuda.empty_cache()


def versions(b: Bench) -> dict[str, str]:
    """When, what and on what."""
    try:
        commit = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True,
                                text=True, check=False).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {"date": datetime.date.today().isoformat(), "commit": commit, "driver": driver.probe().driver_version,
            "cupy": b.dev.cupy.__version__, "torch": b.peers.torch.__version__ if b.peers else ""}


def run(ops: Mapping[str, Callable[[], Iterable[Case]]], about: str | None, argv: Sequence[str] | None = None) -> int:
    """The command line of every benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, metavar="DIR",
                        help="append rows to DIR/<gpu>/<op>.csv (default: benchmarks/results, with --quick nowhere)")
    parser.add_argument("--no-peer", action="store_true", help="apr alone, without PyTorch")
    parser.add_argument("--quick", action="store_true", help="few repetitions: to see that all runs")
    args = parser.parse_args(argv)
    try:
        dev = Device(warn=lambda text: print(text, file=sys.stderr))
        torch = None if args.no_peer else find_torch(dev)
        b = Bench(dev, torch, args.quick)
        results = args.results or (None if args.quick else HERE / "results")
        return report(b, {op: cases() for op, cases in ops.items()}, results)
    except AprError as e:
        print(f"apr: {e}", file=sys.stderr)
        return e.exit_code
