"""Our step over lengths or batches, for benchmarks/bench_step.py --sweep: rate, and memory measured beside the plan.

A sweep is one process, one trainer after the other, with the same weights. Memory is what the device holds more after a
trainer's steps than before its arena; `off` is how far that is from `apr plan`, and over LIMIT in any row is exit 5.
With --peer, torch.compile in its default mode runs after ours at each shape (not in turns): a compilation a shape.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import step_peer
from harness import append, plain, results_file

from apr.errors import OutOfMemoryError
from apr.params import init_params, layout
from apr.presets import preset
from apr.tools.bench import OurStep, speed
from apr.tools.timed_device import TimedDevice

LIMIT = 0.03
TOKENS = 16384
SWEEPS = {"length": [(TOKENS // t, t) for t in (512, 1024, 2048, 4096, 8192)],
          "batch": [(b, 512) for b in (1, 2, 4, 8, 16, 32, 64, 128)]}
COLUMNS = ("date", "commit", "gpu", "driver", "sweep", "preset", "batch", "length", "precision", "ms", "p20_ms",
           "p80_ms", "tok_s", "mfu", "of_measured", "gib", "plan_gib", "off_plan", "peer_tok_s", "ratio", "torch")
HEADING = (f"{'batch':>6}{'length':>8}{'ms':>9}{'tok/s':>10}{'MFU':>7}{'GiB':>9}{'planned':>9}{'off':>8}"
           f"{'torch tok/s':>13}{'ratio':>7}")


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    peer = f"{row['peer_tok_s']:13.0f}{row['ratio']:7.2f}" if "ratio" in row else ""
    return (f"{row['batch']:6}{row['length']:8}{row['ms']:9.2f}{row['tok_s']:10.0f}{row['mfu']:7.1%}{row['gib']:9.3f}"
            f"{row['plan_gib']:9.3f}{row['off_plan']:8.2%}{peer}")


def verdict(rows: list[dict[str, Any]]) -> tuple[str, int]:
    """What the memory of these rows shows, and the exit code."""
    worst = max(rows, key=lambda row: abs(row["off_plan"]))
    ok = abs(worst["off_plan"]) <= LIMIT
    text = (f"memory within {LIMIT:.0%} of the plan" if ok else f"MEMORY IS OVER {LIMIT:.0%} OFF THE PLAN")
    return f"{text}: at most {worst['off_plan']:+.2%}, at {worst['batch']} x {worst['length']}", 0 if ok else 5


def sweep(args: argparse.Namespace, dev: TimedDevice, about: dict[str, Any], say: Callable[[str], None]) -> int:
    """Measure every shape, print the table as it grows, append the rows; returns the exit code."""
    model = preset(args.preset)
    weights = layout(model).views(np.zeros(layout(model).size, np.float32))
    init_params(model, 42, weights)
    print(HEADING, flush=True)
    rows = []
    for batch, length in SWEEPS[args.sweep]:
        try:
            ours = OurStep(dev, model, batch, length, args.precision, args.steps, weights)
        except OutOfMemoryError as e:
            say(str(e))
            continue
        found = speed([ours.round() for _ in range(args.rounds)], model, batch, length)
        row = {**about, "sweep": args.sweep, "batch": batch, "length": length, **found, **ours.memory()}
        if args.peer:
            row |= peer_row(args, ours, found["tok_s"])
        del ours
        rows.append(row)
        print(line(row), flush=True)
        if args.results:
            append(results_file(args.results, dev.name, "step_sweep"), [plain(row)], COLUMNS)
    if not rows:
        return OutOfMemoryError.exit_code
    text, code = verdict(rows)
    print(text)
    return code


def peer_row(args: argparse.Namespace, ours: OurStep, rate: float) -> dict[str, Any]:
    """The peer's rate at the shape of `ours`; nothing where it cannot."""
    del ours.trainer  # its memory is the peer's now
    gc.collect()
    side = step_peer.attempt("default", ours, args.steps)
    if side is None:
        return {}
    seconds = statistics.median(side.round() for _ in range(args.rounds))
    other, version = ours.batch * ours.length / seconds, side.about["torch"]
    side.close()
    return {"peer_tok_s": other, "ratio": rate / other, "torch": version}
