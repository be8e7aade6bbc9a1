"""What a whole `apr pretrain` run trains at, beside the bare step of `apr bench step`, in one run on one GPU.

    python benchmarks/bench_pretrain.py [--preset qwen2_0_5b --batch 8 --length 2048] [--steps 60] [--results DIR]

The run has everything on: a token shard, the shuffled stream, guards, log, JSON lines, the live gate at its default.
The shard's tokens are random, as the bare step's are. What counts is the clock between the lines of its log, over the
steps after the first SKIPPED; so the log, the guards and the reading of the data are in it, and start, validation and
checkpoints are not. The live gate checks step 0 and then one step in 500: its time at step 0 is shared out over 500.
The run is ended (SIGKILL) when its last step is logged, before it would write a checkpoint. The bare step is measured
before and after it. Exit code 5 where the run is over LIMIT slower.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import append, plain, results_file, stamp

from apr.driver import probe
from apr.errors import AprError, MeasureError
from apr.presets import preset
from apr.tools.device import choose_device

LIMIT = 0.02
SKIPPED = 20  # steps: graphs are recorded and the clock of the GPU settles
GATE_EVERY = 500  # as `apr pretrain` has it
HELD_OUT = 16 * 10  # batches of validation, and ten times as much data so that they are a tenth of it
COLUMNS = ("date", "commit", "gpu", "driver", "preset", "batch", "length", "steps", "tok_s", "logged_tok_s", "gate_ms",
           "tok_s_with_gate", "step_tok_s", "ratio")
Timed = tuple[float, dict[str, Any]]  # seconds by the clock at which an event was read, and the event


def write_shard(path: Path, vocabulary: int, tokens: int) -> None:
    """Random tokens as upstream's headerless shard: little-endian u32."""
    np.random.default_rng(1).integers(0, vocabulary, tokens, np.uint32).astype("<u4").tofile(path)


def run_events(command: Sequence[str], steps: int, clock: Callable[[], float] = time.perf_counter) -> list[Timed]:
    """The events of a run up to its step number steps - 1, with the time of each; the run is ended then.

    Raises MeasureError for a run that ends before.
    """
    found: list[Timed] = []
    with (tempfile.TemporaryFile("w+") as errors,
          subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child):
        assert child.stdout is not None
        for line in child.stdout:
            found.append((clock(), json.loads(line)))
            if found[-1][1]["event"] == "step" and found[-1][1]["step"] == steps - 1:
                child.kill()
                return found
        errors.seek(0)
        said = errors.read().strip().splitlines() or ["nothing"]
        raise MeasureError("apr pretrain", f"{steps} steps", f"its end, code {child.wait()}: {said[-1]}",
                           "correct that")


def rates(found: Sequence[Timed], tokens: int) -> dict[str, float]:
    """Tokens per second by the clock, by the run's own log, and by the clock with the live gate's share."""
    steps = [(at, event) for at, event in found if event["event"] == "step" and event["step"] >= SKIPPED]
    gates = [event["ms"] for _, event in found if event["event"] == "parity"]
    seconds = (steps[-1][0] - steps[0][0]) / (len(steps) - 1)
    gate = gates[0] / 1e3 if gates else 0.0
    return {"tok_s": tokens / seconds, "logged_tok_s": statistics.median(e["tokens_per_sec"] for _, e in steps),
            "gate_ms": 1e3 * gate, "tok_s_with_gate": tokens / (seconds + gate / GATE_EVERY)}


def bare_step(args: argparse.Namespace) -> float:
    """Tokens per second of `apr bench step` in a process of its own. Raises MeasureError."""
    done = subprocess.run(
        [sys.executable, "-m", "apr", "bench", "step", "--json", "--preset", args.preset, "--batch-size",
         str(args.batch), "--seq-length", str(args.length)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MeasureError("apr bench step", "a rate", (done.stderr.strip().splitlines() or ["nothing"])[-1],
                           "correct that")
    return float(json.loads(done.stdout.splitlines()[0])["tok_s"])


def pretrain(args: argparse.Namespace) -> dict[str, float]:
    """The rates of a run on a shard of its own, which is removed with it."""
    rows = args.batch * max(args.steps, HELD_OUT) + 1
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "random.bin"
        write_shard(shard, preset(args.preset).V, rows * (args.length + 1))
        command = [sys.executable, "-m", "apr", "pretrain", "--json", "--preset", args.preset, "--dataset", str(shard),
                   "--batch-size", str(args.batch), "--seq-length", str(args.length), "--num-steps", "100000",
                   "--steps-per-epoch", "100000", "--device", "cuda", "--allow-shard-cycle", "--run-dir",
                   str(Path(folder) / "run")]
        return rates(run_events(command, args.steps), args.batch * args.length)


def judge(run: dict[str, float], bare: Sequence[float]) -> tuple[dict[str, float], str, int]:
    """The figures of the row, what they show, and the exit code. `bare`: rates of the step before and after."""
    step = statistics.mean(bare)
    ratio = run["tok_s_with_gate"] / step
    ok = ratio >= 1 - LIMIT
    text = (f"apr pretrain {run['tok_s_with_gate']:.0f} tok/s with its live gate ({run['tok_s']:.0f} without; its log "
            f"says {run['logged_tok_s']:.0f}), the bare step {step:.0f} (" + ", ".join(f"{r:.0f}" for r in bare)
            + f"): ratio {ratio:.4f}, " + (f"within {LIMIT:.0%}" if ok else f"MORE THAN {LIMIT:.0%} SLOWER"))
    return {**run, "step_tok_s": step, "ratio": ratio}, text, 0 if ok else 5


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, with --results append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen2_0_5b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=60, help=f"over {SKIPPED + 1}")
    parser.add_argument("--results", type=Path, metavar="DIR", help="append a row to DIR/<gpu>/pretrain.csv")
    args = parser.parse_args(argv)
    if args.steps < SKIPPED + 2:
        parser.error(f"--steps {args.steps}: at least {SKIPPED + 2}")
    try:
        gpu = probe().devices[choose_device("cuda").ordinal].name
        before = bare_step(args)
        run = pretrain(args)
        row, text, code = judge(run, [before, bare_step(args)])
    except AprError as e:
        print(f"apr: {e}", file=sys.stderr)
        return e.exit_code
    print(text)
    if args.results:
        shape = {"preset": args.preset, "batch": args.batch, "length": args.length, "steps": args.steps}
        append(results_file(args.results, gpu, "pretrain"), [plain({**stamp(gpu), **shape, **row})], COLUMNS)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
