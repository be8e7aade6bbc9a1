"""Seconds from the start of a fresh process to its first finished step, for benchmarks/bench_step.py --first-step.

Cold is with empty folders of compiled kernels (ours; Inductor's and Triton's), warm is the same process once more. Both
sides read their packages from a page cache that is warm, and make their own random weights.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import HERE

from apr.config import encode
from apr.errors import one_line
from apr.presets import preset
from apr.tools.bench import random_batches, train_config
from apr.train.cuda_trainer import CudaTransformerTrainer

PEER_MODE = "default"


def first_steps(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, float | str]:
    """Of ours, then of the peer (unless --no-peer), cold and warm. A side that fails is left out, and named."""
    out: dict[str, float | str] = {}
    for side, prefix in (("ours", ""), *(() if args.no_peer else ((PEER_MODE, "peer_"),))):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold", "warm"):
                say(f"first step, {side}, {state}")
                try:
                    out[f"{prefix}first_step_{state}_s"] = seconds(args, side, Path(folder))
                except (subprocess.CalledProcessError, IndexError, ValueError) as e:
                    error = getattr(e, "stderr", None) or str(e)
                    print(one_line(f"{side} {state}: {error.strip().splitlines()[-1]}", 300), file=sys.stderr)
    if "peer_first_step_cold_s" in out:
        out["mode"] = PEER_MODE
    return out


def seconds(args: argparse.Namespace, side: str, folder: Path) -> float:
    """Of one process whose compiled kernels are kept in `folder`."""
    kept = {"APR_CACHE_DIR": folder / "apr", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor",
            "TRITON_CACHE_DIR": folder / "triton"}
    start = time.time()
    done = subprocess.run(
        [sys.executable, str(HERE / "bench_step.py"), "--one-step", side, "--preset", args.preset, "--batch",
         str(args.batch), "--length", str(args.length), "--precision", args.precision],
        env={**os.environ, **{name: str(path) for name, path in kept.items()}}, capture_output=True, text=True,
        check=True)
    return float(done.stdout.split()[-1]) - start


def one_step(args: argparse.Namespace) -> int:
    """One step in this process; prints the time of its end."""
    model, config = preset(args.preset), train_config(args.batch, args.length, args.precision)
    (batch,) = random_batches(model, args.batch, args.length, 1)
    if args.one_step == "ours":
        CudaTransformerTrainer.new(model, config).train_batch(batch)
    else:
        import torch
        from torch_model import TorchTrainer

        peer = TorchTrainer(encode(model), encode(config), args.one_step)
        x, y = (torch.from_numpy(a).cuda().long() for a in (batch.inputs, batch.targets))
        float(peer.step(x, y, config.lr)[0])
    print(time.time())
    return 0
