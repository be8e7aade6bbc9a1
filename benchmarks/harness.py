"""How every bench_<op>.py measures: events on apr's own stream, a flushed L2, PyTorch in turns on the same stream.

    python benchmarks/bench_<op>.py [--results DIR] [--no-peer] [--quick]

A case states its bytes and FLOPs (what the header of its .cu file counts) without a GPU; `setup` makes its arrays and
launches on one. Rates are compared with what the same GPU does in the same run (apr/tools/timing.py): a large copy,
counting what it reads and writes, and large products.

A row of results/<gpu>/<op>.csv is one case beside one peer; ratio is peer_us / us, so above 1 apr is the quicker.
Nothing here imports CuPy or PyTorch before there is a GPU.
"""

import argparse
import csv
import datetime
import gc
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import Peers, find_torch

from apr import driver
from apr.buffers import logits_rows
from apr.config import TransformerConfig
from apr.device import Device
from apr.errors import AprError, DeviceFault, one_line
from apr.presets import preset
from apr.tools.timing import Lab, Launch, Timing, ceilings, measure_in_turns

HERE = Path(__file__).resolve().parent
MODELS = {name: preset(name) for name in ("qwen2_0_5b", "llama_370m")}
B, T = 8, 2048
N = B * T
BYTES = {"bf16": 2, "f32": 4}  # s of the formulas
COLUMNS = ("date", "commit", "driver", "cupy", "case", "dtype", "us", "p20", "p80", "gbps", "tflops", "peer", "peer_us",
           "ratio", "torch")
Makers = Mapping[str, Callable[[], Launch]]


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
class Bench(Lab):
    """A Lab with PyTorch, or None, beside it."""

    peers: Peers | None = None


def head_rows(c: TransformerConfig, storage: str) -> int:
    """Rows of logits that training has in memory at a time."""
    return logits_rows(N, c.Vp * BYTES[storage])


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


def stamp(gpu: str) -> dict[str, str]:
    """When, from which commit, and on what."""
    try:
        commit = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True,
                                text=True, check=False).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return {"date": datetime.date.today().isoformat(), "commit": commit, "gpu": gpu,
            "driver": driver.probe().driver_version}


def versions(b: Bench) -> dict[str, str]:
    """When, what and on what."""
    found = stamp(b.dev.name)
    del found["gpu"]  # the folder's name says it
    return {**found, "cupy": b.dev.cupy.__version__, "torch": b.peers.torch.__version__ if b.peers else ""}


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its numbers as they are kept: five digits."""
    return {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}


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
        b = Bench(dev, args.quick, peers=torch)
        results = args.results or (None if args.quick else HERE / "results")
        return report(b, {op: cases() for op, cases in ops.items()}, results)
    except AprError as e:
        print(f"apr: {e}", file=sys.stderr)
        return e.exit_code
