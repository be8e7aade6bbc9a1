"""A whole training step on a GPU beside torch.compile: tokens per second, MFU, memory, milliseconds of each group.

    python benchmarks/bench_step.py [--preset qwen2_0_5b --batch 8 --length 2048] [--rounds 5 --steps 5] [--results DIR]
                                    [--mode best|default|reduce-overhead|eager] [--no-peer] [--no-groups]
    python benchmarks/bench_step.py --rows [NAME …]     the rows of README's table, each in a process of its own
    python benchmarks/bench_step.py --first-step        first steps of fresh processes, both sides, cold and warm
    python benchmarks/bench_step.py --sweep length|batch [--peer]      our rate, and memory beside the plan, by shape

Both sides train the same model on the same random tokens, in bf16 with float32 master weights, in turns: a round is
`steps` steps of ours, then of the peer; both read a step's loss and norm when the next one has been started, and the
last ones at the end of the round. The median of the rounds counts, with p20 and p80. `--mode best` takes torch in
two modes, one after the other, each in turns with ours, and the faster is the peer of the row; every mode's rate is
kept. `--mode default --rounds 3 --steps 4 --no-groups` is quick: it compiles once, which is most of a row's time.

Memory is what the device holds more after our steps than before our arena, and what PyTorch reserves at most. A group's
floor, and what MFU is: apr/tools/step_cost.py; docs/performance.md says how to read it all. A sweep is exit 5 where
memory is over 3 % off the plan.
"""

import argparse
import gc
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import step_peer
import step_sweep
from first_step import first_steps, one_step
from harness import HERE, append, plain, results_file, stamp

from apr.driver import probe
from apr.errors import AprError
from apr.presets import preset
from apr.tools.bench import OPS, OurStep, paths, speed
from apr.tools.device import choose_device
from apr.tools.step_cost import MFU, PEAK, PRODUCT
from apr.tools.timed_device import TimedDevice
from apr.tools.timing import Lab, ceilings

MODES = ("default", "reduce-overhead", "eager")
BEST = ("default", "reduce-overhead")
SIDE = ("ms", "p20_ms", "p80_ms", "tok_s", "mfu", "of_measured")
RATES = tuple(f"{mode.replace('-', '_')}_tok_s" for mode in MODES)
COLUMNS = ("date", "commit", "gpu", "driver", "preset", "batch", "length", "precision", "paths",
           *(f"ours_{name}" for name in SIDE), "ours_gib", "plan_gib", "off_plan", "context_gib", "mode",
           *(f"peer_{name}" for name in SIDE), "peer_gib", "peer_allocated_gib", "peer_compile_s", "ratio", *RATES,
           "copy_gbps", "product_tflops", "first_step_cold_s", "first_step_warm_s", "peer_first_step_cold_s",
           "peer_first_step_warm_s", "torch")
GROUP_COLUMNS = ("date", "commit", "gpu", "driver", "preset", "batch", "length", "precision", "group", "path", "ms",
                 "floor_ms", "of_floor")
ROWS = {"qwen-8x2048": ["--preset", "qwen2_0_5b", "--batch", "8", "--length", "2048"],
        "qwen-32x1024": ["--preset", "qwen2_0_5b", "--batch", "32", "--length", "1024"],
        "qwen-1x512": ["--preset", "qwen2_0_5b", "--batch", "1", "--length", "512", "--steps", "10"],
        "llama-8x2048": ["--preset", "llama_370m", "--batch", "8", "--length", "2048"],
        "first-step": ["--preset", "qwen2_0_5b", "--batch", "8", "--length", "2048", "--first-step"]}


@dataclass
class Turns:
    """Rounds of ours beside one mode of the peer: seconds of a step of each, and what is known of the peer."""

    ours: list[float]
    peer: list[float]
    about: dict[str, Any]


def in_turns(ours: Callable[[], float], peer: Callable[[], float] | None, rounds: int, about: dict[str, Any]) -> Turns:
    """Rounds of both sides, one of ours before each of the peer's."""
    found = Turns([], [], about)
    for _ in range(rounds):
        found.ours.append(ours())
        if peer is not None:
            found.peer.append(peer())
    return found


def compare(args: argparse.Namespace, ours: OurStep) -> dict[str, Turns]:
    """Ours beside each mode that is asked for, by mode; "" without a peer. A mode that fails is left out, and named."""
    found: dict[str, Turns] = {}
    for mode in () if args.no_peer else BEST if args.mode == "best" else (args.mode,):
        say(f"torch, {mode}: compiling")
        side = step_peer.attempt(mode, ours, args.steps)
        if side is not None:
            say(f"torch, {mode}: {args.rounds} rounds in turns")
            found[mode] = in_turns(ours.round, side.round, args.rounds, side.about)
            side.close()
            del side
    return found or {"": in_turns(ours.round, None, args.rounds, {})}


def row_of(args: argparse.Namespace, ours: OurStep, turns: dict[str, Turns]) -> dict[str, Any]:
    """The figures of a row: the peer is the mode with the most tokens per second, and ours are of its rounds."""
    shape = (ours.model, args.batch, args.length)
    rates = {mode: speed(t.peer, *shape)["tok_s"] for mode, t in turns.items() if t.peer}
    best = max(rates, key=lambda mode: rates[mode], default="")
    memory = {("ours_gib" if name == "gib" else name): value for name, value in ours.memory().items()}
    row = {**memory, "context_gib": ours.context_gib, **speed(turns[best or next(iter(turns))].ours, *shape, "ours_")}
    if best:
        row |= {"mode": best, **turns[best].about, **speed(turns[best].peer, *shape, "peer_"),
                **{f"{mode.replace('-', '_')}_tok_s": rate for mode, rate in rates.items()}}
        row["ratio"] = row["ours_tok_s"] / row["peer_tok_s"]
    return row


def measure_row(args: argparse.Namespace, dev: TimedDevice) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row, and the rows of its groups."""
    say("apr: the first steps")
    ours = OurStep(dev, preset(args.preset), args.batch, args.length, args.precision, args.steps)
    rates, path = ceilings(Lab(dev)), paths(ours.model, args.precision, dev)
    about = {"paths": " ".join(f"{op}={name}" for op, name in sorted(path.items())), "copy_gbps": rates["copy"] / 1e9,
             "product_tflops": rates["f32" if args.precision == "fp32" else "bf16"] / 1e12}
    groups = []
    if not args.no_groups:
        say("apr: kernel by kernel")
        groups = [{**g, "path": path.get(OPS.get(g["group"], ""), "general"),
                   "of_floor": g["ms"] / g["floor_ms"] if g["floor_ms"] else None} for g in ours.groups(rates)]
    row = row_of(args, ours, compare(args, ours)) | about
    del ours
    gc.collect()
    return row, groups


def show(row: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """A row for people."""
    for name, value in row.items():
        print(f"{name:24}{value:.5g}" if isinstance(value, float) else f"{name:24}{value}")
    if "ours_mfu" in row:
        print(MFU.format(peak=PEAK / 1e12) + f"; of_measured: the same of {PRODUCT / 1e12:.0f}")
    if groups:
        print(f"\n{'group':24}{'ms':>9}{'floor ms':>10}{'of floor':>10}  path")
        for g in groups:
            floor = f"{g['floor_ms']:10.3f}{g['of_floor']:10.2f}" if g["floor_ms"] else ""
            print(f"{g['group'][:22]:24}{g['ms']:9.3f}{floor:20}  {g['path']}")
        ms, least = (sum(g[name] or 0 for g in groups) for name in ("ms", "floor_ms"))
        print(f"{'sum':24}{ms:9.3f}{least:10.3f}{ms / least:10.2f}", flush=True)


def record(row: dict[str, Any], results: Path, groups: Sequence[dict[str, Any]] = ()) -> None:
    """Append a row, and those of its groups, to the files of its GPU; what was left out leaves its columns empty."""
    append(results_file(results, row["gpu"], "step"), [plain(row)], COLUMNS)
    common = {name: row[name] for name in GROUP_COLUMNS if name in row}
    if groups:
        append(results_file(results, row["gpu"], "step_groups"), [plain({**common, **g}) for g in groups],
               GROUP_COLUMNS)


def run_rows(names: Sequence[str], rest: Sequence[str]) -> int:
    """Each named row in a process of its own, one after the other; the worst exit code."""
    code = 0
    for name in names or ROWS:
        print(f"\n== {name}", flush=True)
        done = subprocess.run([sys.executable, str(HERE / "bench_step.py"), *ROWS[name], *rest], check=False)
        code = max(code, done.returncode if done.returncode >= 0 else 1)
    return code


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--preset", default="qwen2_0_5b")
    add("--batch", type=int, default=8)
    add("--length", type=int, default=2048)
    add("--precision", default="bf16", choices=("bf16", "fp32"))
    add("--mode", default="best", choices=("best", *MODES))
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=5)
    add("--results", type=Path, metavar="DIR", help="append rows to DIR/<gpu>/step.csv (default: nowhere)")
    add("--rows", nargs="*", choices=list(ROWS), metavar="NAME", help="rows by name, all without one: "
        + ", ".join(ROWS))
    add("--sweep", choices=list(step_sweep.SWEEPS))
    add("--one-step", choices=("ours", *MODES), help=argparse.SUPPRESS)
    for flag in ("--peer", "--no-peer", "--no-groups", "--first-step"):
        add(flag, action="store_true")
    return parser.parse_args(argv)


def without(argv: Sequence[str], flag: str, values: Sequence[str]) -> list[str]:
    """The arguments but a flag and the values after it."""
    out = list(argv)
    at = out.index(flag)
    del out[at:at + 1 + len(values)]
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and with --results append; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = parse(given)
    try:
        if args.one_step:
            return one_step(args)
        gpu = probe().devices[choose_device("cuda").ordinal].name  # without a GPU it ends here; no context is made
        if args.rows is not None:
            return run_rows(args.rows, without(given, "--rows", args.rows))
        about = {**stamp(gpu), "preset": args.preset, "precision": args.precision}
        if args.sweep:
            return step_sweep.sweep(args, TimedDevice(warn=say), about, say)
        about |= {"batch": args.batch, "length": args.length}
        row, groups = (first_steps(args, say), []) if args.first_step else measure_row(args, TimedDevice(warn=say))
        show(about | row, groups)
        if args.results:
            record(about | row, args.results, groups)
    except AprError as e:
        print(f"apr: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
