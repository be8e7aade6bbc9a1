"""Training on the CPU: tokens per second and peak memory of the NumPy reference, beside PyTorch eager.

    python benchmarks/bench_train_cpu.py                                    the reference alone
    python benchmarks/bench_train_cpu.py --peer-python PYTHON_WITH_TORCH    and peer_torch_cpu.py, in turns
    options: --rounds --steps --warmup --preset --cores, --json (a line instead of the table), --record (append a row)

A step is forward, backward, clipping and AdamW (two decay groups) of `demo`, 8 sequences of 256 random tokens, float32.
Each side of each round is a fresh process on the same cores, with the same weights and batches; the first losses must
agree to 1e-4, or it is not the same work and the run fails. Peak memory is the process's own; `idle` is its share that
is there before a model is.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import TransformerConfig, TransformerTrainConfig, decode, encode
from apr.params import init_params, layout
from apr.presets import preset
from apr.reference.adamw import adamw_update
from apr.reference.global_norm import clip_factor, global_norm
from apr.reference.model import loss_and_gradients

HERE = Path(__file__).resolve().parent
COMPARED, TOLERANCE = 5, 1e-4  # the first losses, in nats


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Our side of one round, in flat memory; job and result are peer_torch_cpu.py's."""
    config, how = decode(TransformerConfig, job["config"], "job"), decode(TransformerTrainConfig, job["train"], "job")
    idle_mib, where = peak_mib(), layout(config)
    flat, grad, m, v = (np.zeros(where.size, np.float32) for _ in range(4))
    params, grads = where.views(flat), where.views(grad)
    with np.load(job["weights"]) as weights:
        for name in weights.files:
            params[name][...] = weights[name]
    with np.load(job["batches"]) as batches:
        inputs, targets = batches["inputs"], batches["targets"]
    losses, seconds, split = [], [], where.decay_end
    for step, (x, y) in enumerate(zip(inputs, targets, strict=True), start=1):
        start = time.perf_counter()
        grad[:] = 0
        loss = loss_and_gradients(params, grads, config, x, y, 1 / y.size) / y.size
        scale = clip_factor(global_norm(grad), how.max_grad_norm)
        for part, decay in ((slice(0, split), how.weight_decay), (slice(split, None), 0.0)):
            adamw_update(flat[part], m[part], v[part], grad[part], lr=how.lr, beta1=how.beta1, beta2=how.beta2,
                         eps=how.adam_eps, weight_decay=decay, step=step, grad_scale=scale)
        losses.append(loss)
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds[job["warmup"]:], "idle_mib": idle_mib, "peak_mib": peak_mib(),
            "versions": f"apr, numpy {np.__version__}"}


def peak_mib() -> float:
    """Most memory that this process has held so far. (Linux hands a child its parent's peak: the parent stays small.)"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_job(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Weights and batches in `folder`, and the job that points to them."""
    config = preset(args.preset)
    how = TransformerTrainConfig(batch_size=8, max_seq_len=256, max_steps=args.warmup + args.steps)
    where = layout(config)
    params = where.views(np.zeros(where.size, np.float32))
    init_params(config, how.seed, params)
    np.savez(folder / "weights.npz", **params)  # type: ignore[arg-type]
    tokens = np.random.default_rng(how.seed).integers(0, config.V, (how.max_steps, how.batch_size, how.max_seq_len + 1))
    np.savez(folder / "batches.npz", inputs=tokens[..., :-1].copy(), targets=tokens[..., 1:].copy())
    return {"config": encode(config), "train": encode(how), "weights": str(folder / "weights.npz"),
            "batches": str(folder / "batches.npz"), "cores": args.cores, "warmup": args.warmup}


def run_rounds(commands: dict[str, list[str]], job: dict[str, Any], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The results of each side's rounds; the sides take turns. Fails when a side does, or when the losses disagree."""
    threads = {name: str(job["cores"]) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
    for number in range(rounds):
        for side, command in commands.items():
            done = subprocess.run([*command, json.dumps(job)], stdout=subprocess.PIPE, check=True, env=os.environ | threads)
            results[side].append(json.loads(done.stdout))
            ms = 1e3 * statistics.median(results[side][-1]["seconds"])
            print(f"round {number + 1}/{rounds}  {side:4}  {ms:.0f} ms/step  load {os.getloadavg()[0]:.1f}", file=sys.stderr)
        first = [found[0]["losses"][:COMPARED] for found in results.values()]
        worst = float(np.abs(np.subtract(first[0], first[-1])).max())
        if not worst <= TOLERANCE:
            raise SystemExit(f"not the same work: the first losses differ by {worst:.1e} > {TOLERANCE} nats: {first}")
    return results


def summary(results: dict[str, list[dict[str, Any]]], job: dict[str, Any]) -> dict[str, Any]:
    """One flat record of what was measured, on what, when and how."""
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), platform.processor())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    record: dict[str, Any] = {"date": datetime.date.today().isoformat(), "commit": commit, "cpu": cpu, "cores": job["cores"],
                              "command": " ".join(["python", *sys.argv])}
    tokens = job["train"]["batch_size"] * job["train"]["max_seq_len"]
    for side, rounds in results.items():
        p20, p50, p80 = np.percentile([s for r in rounds for s in r["seconds"]], [20, 50, 80])
        record |= {f"{side}_versions": rounds[0]["versions"], f"{side}_tokens_per_s": round(tokens / p50),
                   f"{side}_p20": round(tokens / p80), f"{side}_p80": round(tokens / p20), f"{side}_ms": round(1e3 * p50, 1),
                   f"{side}_peak_mib": round(max(r["peak_mib"] for r in rounds)),
                   f"{side}_idle_mib": round(max(r["idle_mib"] for r in rounds))}
    if "peer" in results:
        record["speed_ratio"] = round(record["ours_tokens_per_s"] / record["peer_tokens_per_s"], 3)
        record["memory_ratio"] = round(record["ours_peak_mib"] / record["peer_peak_mib"], 3)
    return record


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [f"{'':28}{'tokens/s':>9}  {'p20 - p80':15}{'ms/step':>8}{'peak MiB':>10}{'(idle)':>9}"]
    for side in (s for s in ("ours", "peer") if f"{s}_ms" in record):
        r = {key.removeprefix(side + "_"): value for key, value in record.items()}
        lines.append(f"{r['versions']:28}{r['tokens_per_s']:9}  {r['p20']} - {r['p80']:<7}{r['ms']:8.1f}{r['peak_mib']:10}"
                     f"{r['idle_mib']:9}")
    if "speed_ratio" in record:
        lines.append(f"{'ours / peer':28}{record['speed_ratio']:9.2f}{'':25}{record['memory_ratio']:10.2f}")
    return "\n".join([*lines, "{cpu}, {cores} cores; {date}, {commit}; {command}".format(**record)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", metavar="PATH")
    for name, default in (("rounds", 5), ("steps", 10), ("warmup", 3), ("cores", len(os.sched_getaffinity(0)))):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", metavar="JOB", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(train(args.worker)))
        return
    commands = {"ours": [sys.executable, __file__, "--worker"]}
    if args.peer_python:
        commands["peer"] = [args.peer_python, str(HERE / "peer_torch_cpu.py")]
    with tempfile.TemporaryDirectory() as folder:
        job = write_job(args, Path(folder))
        record = summary(run_rounds(commands, job, args.rounds), job)
    print(json.dumps(record) if args.json else table(record))
    if args.record:
        path = HERE / "results" / "cpu" / "train.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            rows = csv.DictWriter(file, record.keys())
            if new:
                rows.writeheader()
            rows.writerow(record)


if __name__ == "__main__":
    main()
