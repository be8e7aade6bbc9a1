"""Losses of apr and of PyTorch on the same real text, step by step, from the same weights; Qwen2-0.5B, in bf16.

    python benchmarks/loss_curve.py [--preset qwen2_0_5b --steps 1000 --batch 4 --length 1024] [--precision bf16|fp32]
                                    [--mode default|eager] [--no-envelope] [--data FILE] [--out FOLDER] [--results DIR]

The text is the standard library's source, in the tokens of a byte-level tokenizer trained on it; the model's vocabulary
stays as configured. --data keeps those tokens, or takes them from there; --make-data makes them without a GPU and ends.
Both sides take the same batches, one side after the other, with float32 master weights, PyTorch under bf16 autocast.

PyTorch trains twice, the second time from weights that were moved by a unit in the last place: how far its two curves
are apart is what ours is allowed. loss_judge.py says what is judged; exit code 5 where it fails.

--results appends every 10th step to DIR/<gpu>/loss_curve.csv; --out writes all of them and loss.svg (matplotlib).
"""

import argparse
import csv
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import append, plain, results_file, stamp
from loss_judge import Curve, judge, moved, table

from apr.config import TransformerConfig, TransformerTrainConfig, encode
from apr.data.batch import LMBatch
from apr.data.text import standard_library
from apr.data.tokenizer import Tokenizer
from apr.device import Device
from apr.driver import probe
from apr.errors import AprError
from apr.presets import preset
from apr.tools.device import choose_device
from apr.train.cuda_trainer import CudaTransformerTrainer
from apr.train.schedule import lr_at

TOKENS = 16384  # the tokenizer's vocabulary
HELD_OUT = 32  # rows that no step trains on
EVERY = 10  # steps between two that are kept in results
COLUMNS = ("date", "commit", "gpu", "driver", "preset", "batch", "length", "precision", "mode", "step", "apr", "torch",
           "torch_moved", "difference", "spread")
Progress = Callable[[int, float], None]


def flat_tokens() -> np.ndarray:
    """The text's tokens, documents end to end, uint16."""
    texts = list(standard_library(Counter()))
    tokenizer = Tokenizer.train(texts, TOKENS)
    end = [tokenizer.require_eos()]
    return np.concatenate([np.asarray(ids + end, np.uint16) for ids in tokenizer.encode_batch(texts)])


def rows_of(flat: np.ndarray, length: int) -> np.ndarray:
    """The tokens in rows of length + 1, in a fixed random order."""
    rows = flat[:len(flat) // (length + 1) * (length + 1)].reshape(-1, length + 1).astype(np.int32)
    return rows[np.random.default_rng(0).permutation(len(rows))]


def batch_of(rows: np.ndarray, step: int, batch: int) -> LMBatch:
    """The rows of a step; when all were trained on, from the first again."""
    return LMBatch.from_rows(rows[np.arange(step * batch, (step + 1) * batch) % len(rows)])


def held_batches(rows: np.ndarray, batch: int) -> list[LMBatch]:
    """The held-out rows, as many as come out even."""
    return [LMBatch.from_rows(rows[i:i + batch]) for i in range(0, len(rows) - batch + 1, batch)]


def ours(model: TransformerConfig, config: TransformerTrainConfig, train: np.ndarray, held: list[LMBatch],
         tell: Progress) -> tuple[Curve, dict[str, np.ndarray]]:
    """Our curve, and the weights that it began from."""
    trainer = CudaTransformerTrainer.new(model, config, Device())
    weights = trainer.params
    start, losses = time.perf_counter(), []
    for step in range(config.max_steps):
        losses.append(trainer.train_batch(batch_of(train, step, config.batch_size), lr_at(config, step)))
        tell(step, losses[-1])
    seconds = time.perf_counter() - start
    return Curve(np.array(losses), trainer.eval_batches(held), seconds), weights


class Peer:
    """PyTorch's side, compiled once: every curve begins from weights that are put into the same model."""

    def __init__(self, model: TransformerConfig, config: TransformerTrainConfig, mode: str) -> None:
        import torch
        from torch_model import TorchTrainer, make_optimizer

        self.torch, self.config, self.make_optimizer = torch, config, make_optimizer
        self.trainer = TorchTrainer(encode(model), encode(config), mode)

    def on_gpu(self, batch: LMBatch) -> list[Any]:
        """Inputs and targets."""
        return [self.torch.from_numpy(a).cuda().long() for a in (batch.inputs, batch.targets)]

    def curve(self, weights: dict[str, np.ndarray], train: np.ndarray, held: list[LMBatch], tell: Progress) -> Curve:
        """The curve from these weights, with a fresh optimizer."""
        torch, config, trainer = self.torch, self.config, self.trainer
        trainer.model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        trainer.optimizer = self.make_optimizer(trainer.model, encode(config), fused=True)
        start, losses = time.perf_counter(), []
        for step in range(config.max_steps):
            x, y = self.on_gpu(batch_of(train, step, config.batch_size))
            losses.append(trainer.step(x, y, lr_at(config, step))[0])
            if step % 100 == 0 or step == config.max_steps - 1:
                tell(step, float(losses[-1]))
        found = torch.stack(losses).cpu().numpy().astype(np.float64)
        seconds = time.perf_counter() - start
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=config.precision == "bf16"):
            after = [float(trainer.model(*self.on_gpu(b))) for b in held]
        return Curve(found, float(np.mean(after)), seconds)


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Both curves, one over the other, and their difference below."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    def column(name: str) -> list[float]:
        return [float(row[name] or "nan") for row in rows]

    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, height_ratios=(3, 1), figsize=(7, 5))
    top.plot(column("step"), column("torch"), color="tab:orange", lw=3, label="PyTorch")
    top.plot(column("step"), column("apr"), color="tab:blue", lw=1, label="apr")
    top.set_ylabel("training loss, nats per token")
    top.set_title(title)
    top.legend()
    bottom.semilogy(column("step"), column("difference"), color="grey", lw=1, label="apr from PyTorch")
    bottom.semilogy(column("step"), column("spread"), color="tab:red", lw=1, label="PyTorch from itself, largest yet")
    bottom.set_ylabel("relative difference")
    bottom.set_xlabel("step")
    bottom.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def tokens_of(args: argparse.Namespace) -> np.ndarray:
    """The tokens of --data where it is there; else they are made, and kept there."""
    if args.data is not None and args.data.exists():
        return np.load(args.data)
    flat = flat_tokens()
    if args.data is not None:
        np.save(args.data, flat)
    return flat


def teller(side: str) -> Progress:
    """Says a loss now and then."""
    def tell(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"{side:22}step {step:5}  loss {loss:.5f}", file=sys.stderr, flush=True)
    return tell


def train_all(args: argparse.Namespace) -> tuple[Curve, Curve, Curve | None]:
    """Our curve, the peer's, and the peer's from weights that were moved."""
    rows, model = rows_of(tokens_of(args), args.length), preset(args.preset)
    held, train = held_batches(rows[:HELD_OUT], args.batch), rows[HELD_OUT:]
    print(f"{train.size} tokens in {len(train)} rows: {args.steps * args.batch / len(train):.2f} passes",
          file=sys.stderr)
    config = TransformerTrainConfig(lr=6e-4, lr_min=6e-5, warmup_steps=min(100, args.steps // 10),
                                    max_steps=args.steps, batch_size=args.batch, max_seq_len=args.length,
                                    precision=args.precision, weight_decay=0.1, beta2=0.95)
    mine, weights = ours(model, config, train, held, teller("apr"))
    gc.collect()
    peer = Peer(model, config, args.mode)
    first = peer.curve(weights, train, held, teller("torch"))
    second = None if args.no_envelope else peer.curve(moved(weights), train, held, teller("torch, moved weights"))
    return mine, first, second


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="qwen2_0_5b")
    add("--steps", type=int, default=1000)
    add("--batch", type=int, default=4)
    add("--length", type=int, default=1024)
    add("--precision", choices=("bf16", "fp32"), default="bf16")
    add("--mode", choices=("default", "eager"), default="default", help="torch.compile's, or none")
    add("--no-envelope", action="store_true", help="PyTorch once")
    add("--data", type=Path, metavar="FILE", help="a .npy of the tokens")
    add("--make-data", action="store_true", help="make --data and end")
    add("--out", type=Path, metavar="FOLDER", help="loss.csv and loss.svg of all steps")
    add("--results", type=Path, metavar="DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train all, write, judge; returns the exit code."""
    args = parse(argv)
    try:
        if args.make_data:
            print(f"{tokens_of(args).size} tokens")
            return 0
        gpu = probe().devices[choose_device("cuda").ordinal].name
        curves = train_all(args)
    except AprError as e:
        print(f"apr: {e}", file=sys.stderr)
        return e.exit_code
    rows = table(*curves)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        with open(args.out / "loss.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        plot(rows, args.out / "loss.svg", f"{args.preset}, B={args.batch} T={args.length}, {args.precision}")
    if args.results:
        about = {**stamp(gpu), "preset": args.preset, "batch": args.batch, "length": args.length,
                 "precision": args.precision, "mode": args.mode}
        append(results_file(args.results, gpu, "loss_curve"),
               [plain({**about, **row}) for row in rows if row["step"] % EVERY == 0 or row is rows[-1]], COLUMNS)
    return report(curves, args.precision)


def report(curves: tuple[Curve, Curve, Curve | None], precision: str) -> int:
    """Print what was found and the verdict; the exit code."""
    for name, curve in zip(("apr", "torch", "torch, moved weights"), curves, strict=True):
        if curve is not None:
            print(f"{name:22}{curve.losses[0]:9.4f} -> {curve.losses[-20:].mean():.4f} (mean of the last 20), held-out "
                  f"{curve.held_out:.4f}, {curve.seconds:.1f} s")
    checks = judge(*curves, precision)
    for check in checks:
        print(f"{'ok' if check.ok else 'FAILED':8}{check.name}: {check.found:.3g}, at most {check.limit:.3g}")
    return 0 if all(check.ok for check in checks) else 5


if __name__ == "__main__":
    sys.exit(main())
