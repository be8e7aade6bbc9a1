"""Losses of apr and of PyTorch on the same real text, step by step: Qwen2-0.5B from scratch, in bf16.

    python benchmarks/loss_curve.py [--preset qwen2_0_5b --steps 200 --batch 8 --length 2048] --out FOLDER

The text is the standard library's source, in the tokens of a byte-level tokenizer trained on it; the model's vocabulary
stays as configured. Both start from the same weights and take the same batches, with float32 master weights, PyTorch
under bf16 autocast. Writes loss.csv (step, apr, torch, relative difference) and loss.svg, and prints the largest
difference. Exit code 5 when it is over --limit (0.01), or when the loss does not fall.
"""

import argparse
import csv
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch_model import TorchTrainer

from apr.config import TransformerTrainConfig, encode
from apr.data.batch import LMBatch
from apr.data.text import standard_library
from apr.data.tokenizer import Tokenizer
from apr.device import Device
from apr.presets import preset
from apr.train.cuda_trainer import CudaTransformerTrainer
from apr.train.schedule import lr_at

TOKENS = 16384  # the tokenizer's vocabulary


def rows_of(args: argparse.Namespace) -> np.ndarray:
    """The text's tokens in rows of length + 1, in a fixed random order."""
    texts = list(standard_library(Counter()))
    tokenizer = Tokenizer.train(texts, TOKENS)
    end = [tokenizer.require_eos()]
    flat = np.concatenate([np.asarray(ids + end, np.int32) for ids in tokenizer.encode_batch(texts)])
    rows = flat[:len(flat) // (args.length + 1) * (args.length + 1)].reshape(-1, args.length + 1)
    passes = args.steps * args.batch / len(rows)
    print(f"{flat.size} tokens of {tokenizer.vocab_size} kinds, {len(rows)} rows: {passes:.2f} passes", file=sys.stderr)
    return rows[np.random.default_rng(0).permutation(len(rows))]


def main() -> int:
    """Train both, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", default="qwen2_0_5b")
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=8)
    add("--length", type=int, default=2048)
    add("--limit", type=float, default=0.01)
    add("--out", type=Path, required=True)
    args = parser.parse_args()
    rows, model = rows_of(args), preset(args.preset)
    config = TransformerTrainConfig(lr=6e-4, lr_min=6e-5, warmup_steps=20, max_steps=args.steps, batch_size=args.batch,
                                    max_seq_len=args.length, precision="bf16", weight_decay=0.1, beta2=0.95)
    ours = CudaTransformerTrainer.new(model, config, Device())
    peer = TorchTrainer(encode(model), encode(config), "eager", ours.params)
    table, seconds = [], [0.0, 0.0]
    for step in range(args.steps):
        picked = rows[np.arange(step * args.batch, (step + 1) * args.batch) % len(rows)]
        batch, lr = LMBatch.from_rows(picked), lr_at(config, step)
        start = time.perf_counter()
        loss = ours.train_batch(batch, lr)
        middle = time.perf_counter()
        x, y = (torch.from_numpy(a).cuda().long() for a in (batch.inputs, batch.targets))
        other = float(peer.step(x, y, lr)[0])
        seconds = [seconds[0] + middle - start, seconds[1] + time.perf_counter() - middle]
        table.append((step, loss, other, abs(loss - other) / other))
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:4}  apr {loss:.5f}  torch {other:.5f}  difference {table[-1][3]:.2e}", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "loss.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["step", "apr", "torch", "relative_difference"])
        writer.writerows((s, f"{a:.6f}", f"{b:.6f}", f"{d:.2e}") for s, a, b, d in table)
    plot(table, args.out / "loss.svg", f"{args.preset}, B={args.batch} T={args.length}, bf16")
    worst = max(d for *_, d in table)
    means = [float(np.mean([row[k] for row in table[-20:]])) for k in (1, 2)]
    print(f"{args.steps} steps: loss {table[0][1]:.4f} -> {means[0]:.4f} (PyTorch {means[1]:.4f}, means of the last "
          f"20); largest difference {worst:.2e}, of those means {abs(means[0] - means[1]) / means[1]:.2e}; "
          f"seconds: apr {seconds[0]:.1f}, torch eager {seconds[1]:.1f}")
    return 0 if worst <= args.limit and table[-1][1] < 0.7 * table[0][1] else 5


def plot(table: list[tuple[int, float, float, float]], path: Path, title: str) -> None:
    """Both curves, one over the other, and their difference below."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    steps, ours, other, difference = zip(*table, strict=True)
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, height_ratios=(3, 1), figsize=(7, 5))
    top.plot(steps, other, color="tab:orange", lw=3, label="PyTorch, bf16 autocast")
    top.plot(steps, ours, color="tab:blue", lw=1, label="apr, bf16")
    top.set_ylabel("training loss, nats per token")
    top.set_title(title)
    top.legend()
    bottom.semilogy(steps, difference, color="grey", lw=1)
    bottom.axhline(0.01, color="tab:red", lw=0.8, ls="--")
    bottom.set_ylabel("relative difference")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main())
