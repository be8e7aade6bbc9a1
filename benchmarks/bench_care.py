"""What care costs a run on a GPU: guards and watchdog per step, and a save per epoch, beside the steps or between them.

    python benchmarks/bench_care.py [--preset qwen2_0_5b] [--batch 8 --length 2048] [--rounds 3] [--results DIR]

Whole runs of `apr pretrain` in one process, in turns: guards and watchdog on and off (nothing is saved),
then saves by a thread and in the step's own time. A step's time is the median of the log's wall_ms after the first
SKIPPED; what a save holds up is the time from an epoch's last step to the next one's first, less the validation's and a
step's. Exit code 5 where the guards take over LIMIT of a step.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest.mock import patch

from bench_pretrain import HELD_OUT, write_shard
from harness import append, plain, results_file, stamp

from apr.cli.main import build
from apr.cli.pretrain import build_config
from apr.driver import probe
from apr.errors import AprError
from apr.presets import preset
from apr.tools.device import choose_device
from apr.train.cuda_trainer import CudaTransformerTrainer
from apr.train.guards import State, Verdict
from apr.train.real_run import RealRun
from apr.train.run import pretrain
from apr.train.watchdog import Watchdog

LIMIT, SKIPPED, STEPS = 0.01, 20, 120
EPOCHS, EPOCH_STEPS = 4, 60
COLUMNS = ("date", "commit", "gpu", "driver", "preset", "batch", "length", "step_ms_on", "step_ms_off", "ratio",
           "save_s_beside", "save_s_between", "epoch_s_beside", "epoch_s_between")


def run_of(args, shard, folder, steps, per_epoch, *patches):
    """The events of a run, each with the time at which it came."""
    config = build_config(build("pretrain").parse_args(
        ["--preset", args.preset, "--dataset", str(shard), "--batch-size", str(args.batch), "--seq-length",
         str(args.length), "--num-steps", str(steps), "--steps-per-epoch", str(per_epoch), "--allow-shard-cycle",
         "--run-dir", "unused", "--target-val-loss", "0.1"]), precision="bf16")
    found = []
    with ExitStack() as stack, tempfile.TemporaryDirectory(dir=folder) as home:
        for each in patches:
            stack.enter_context(each)
        pretrain(config, Path(home) / "run", "cuda:0", [lambda event: found.append((time.perf_counter(), event))])
    return found


def step_ms(found):
    """The median time of a step."""
    return statistics.median(e["wall_ms"] for _, e in found if e["event"] == "step" and e["step"] >= SKIPPED)


def saves(found):
    """Seconds that a save holds up, and those of an epoch with it: medians over the epochs but the first and last."""
    held, epochs = [], []
    steps = {e["step"]: at for at, e in found if e["event"] == "step"}
    evals = {e["step"]: at for at, e in found if e["event"] == "eval" and e["epoch"] >= 0}
    for last in range(2 * EPOCH_STEPS - 1, EPOCHS * EPOCH_STEPS - 1, EPOCH_STEPS):
        held.append(steps[last + 1] - evals[last + 1] - step_ms(found) / 1e3)
        epochs.append(steps[last + 1] - steps[last + 1 - EPOCH_STEPS])
    return statistics.median(held), statistics.median(epochs)


def main(argv=None) -> int:
    """Measure, print, with --results append; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen2_0_5b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, metavar="DIR", help="append a row to DIR/<gpu>/care.csv")
    args = parser.parse_args(argv)
    def unsaved():
        return patch.object(RealRun, "save", lambda *_: None)

    off = (unsaved, lambda: patch("apr.train.pretrain.judge_step", lambda *_: Verdict(State.OK)),
           lambda: patch.object(Watchdog, "step", lambda *_: nullcontext()))
    try:
        gpu = probe().devices[choose_device("cuda").ordinal].name
        with tempfile.TemporaryDirectory() as folder:
            shard = Path(folder) / "random.bin"
            rows = args.batch * max(EPOCHS * EPOCH_STEPS, HELD_OUT) + 1
            write_shard(shard, preset(args.preset).V, rows * (args.length + 1))
            on_ms, off_ms, beside, between = [], [], [], []
            for _ in range(args.rounds):
                on_ms.append(step_ms(run_of(args, shard, folder, STEPS, STEPS, unsaved())))
                off_ms.append(step_ms(run_of(args, shard, folder, STEPS, STEPS, *(make() for make in off))))
            for mode, kept in ((True, beside), (False, between)):
                copies = patch.object(CudaTransformerTrainer, "copies", mode)
                kept.extend(saves(run_of(args, shard, folder, EPOCHS * EPOCH_STEPS, EPOCH_STEPS, copies)))
    except AprError as e:
        print(f"apr: {e}", file=sys.stderr)
        return e.exit_code
    row = {"step_ms_on": statistics.median(on_ms), "step_ms_off": statistics.median(off_ms),
           "save_s_beside": beside[0], "save_s_between": between[0], "epoch_s_beside": beside[1],
           "epoch_s_between": between[1]}
    row["ratio"] = row["step_ms_on"] / row["step_ms_off"]
    print(f"a step with guards and watchdog {row['step_ms_on']:.3f} ms ({on_ms}), without {row['step_ms_off']:.3f} "
          f"({off_ms}): ratio {row['ratio']:.4f}; a save holds up {beside[0]:.2f} s beside the steps and "
          f"{between[0]:.2f} s between them, epochs of {EPOCH_STEPS} steps {beside[1]:.2f} and {between[1]:.2f} s")
    if args.results:
        shape = {"preset": args.preset, "batch": args.batch, "length": args.length}
        append(results_file(args.results, gpu, "care"), [plain({**stamp(gpu), **shape, **row})], COLUMNS)
    return 0 if row["ratio"] <= 1 + LIMIT else 5


if __name__ == "__main__":
    raise SystemExit(main())
