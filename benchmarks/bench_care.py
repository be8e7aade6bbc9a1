"""What care costs a run on a GPU: guards and watchdog per step, and a save per epoch, beside the steps or between them.

    python benchmarks/bench_care.py [--preset qwen2_0_5b] [--batch 8 --length 2048] [--rounds 3] [--only guards|saves]

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

from apr.cli.main import build
from apr.cli.pretrain import build_config
from apr.errors import AprError
from apr.presets import preset
from apr.tools.device import choose_device
from apr.train.cuda_trainer import CudaTransformerTrainer
from apr.train.guards import State, Verdict
from apr.train.real_run import RealRun
from apr.train.run import pretrain
from apr.train.watchdog import Watchdog

LIMIT, SKIPPED, STEPS = 0.01, 20, 120
EPOCHS = 4


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


def saves(found, epoch):
    """Seconds that a save holds up, and those of an epoch with it: medians over the epochs but the first and last."""
    held, epochs = [], []
    steps = {e["step"]: at for at, e in found if e["event"] == "step"}
    evals = {e["step"]: at for at, e in found if e["event"] == "eval" and e["epoch"] >= 0}
    for last in range(2 * epoch - 1, EPOCHS * epoch - 1, epoch):
        held.append(steps[last + 1] - evals[last + 1] - step_ms(found) / 1e3)
        epochs.append(steps[last + 1] - steps[last + 1 - epoch])
    return statistics.median(held), statistics.median(epochs)


def guards(args, shard, folder):
    """A step's time with guards and watchdog over that without, of medians over rounds in turns."""
    off = (patch("apr.train.pretrain.judge_step", lambda *_: Verdict(State.OK)),
           patch.object(Watchdog, "step", lambda *_: nullcontext()))
    on_ms, off_ms = [], []
    for _ in range(args.rounds):
        for into, patches in ((on_ms, ()), (off_ms, off)):
            unsaved = patch.object(RealRun, "save", lambda *_: None)
            into.append(step_ms(run_of(args, shard, folder, STEPS, STEPS, unsaved, *patches)))
    on, without = statistics.median(on_ms), statistics.median(off_ms)
    print(f"a step with guards and watchdog {on:.3f} ms ({on_ms}), without {without:.3f} ({off_ms}): "
          f"ratio {on / without:.4f}", flush=True)
    return on / without


def held_up(args, shard, folder):
    """Print what a save holds up, and an epoch with it, in seconds: beside the steps and between them."""
    for mode, name in ((True, "beside"), (False, "between")):
        copies = patch.object(CudaTransformerTrainer, "copies", mode)
        found = run_of(args, shard, folder, EPOCHS * args.epoch, args.epoch, copies)
        held, seconds = saves(found, args.epoch)
        print(f"a save {name} the steps holds up {held:.2f} s; an epoch of {args.epoch} steps with it takes "
              f"{seconds:.2f} s", flush=True)


def main(argv=None) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen2_0_5b")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epoch", type=int, default=200, help="steps between two saves")
    parser.add_argument("--only", choices=("guards", "saves"))
    args = parser.parse_args(argv)
    try:
        choose_device("cuda")
        with tempfile.TemporaryDirectory() as folder:
            shard = Path(folder) / "random.bin"
            write_shard(shard, preset(args.preset).V, (args.batch * max(STEPS, HELD_OUT) + 1) * (args.length + 1))
            ratio = guards(args, shard, folder) if args.only != "saves" else 1.0
            if args.only != "guards":
                held_up(args, shard, folder)
    except AprError as e:
        print(f"apr: {e}", file=sys.stderr)
        return e.exit_code
    return 0 if ratio <= 1 + LIMIT else 5


if __name__ == "__main__":
    raise SystemExit(main())
