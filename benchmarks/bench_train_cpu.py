"""Training on the CPU: tokens per second and peak memory of TransformerTrainer (NumPy), beside PyTorch eager.

    python benchmarks/bench_train_cpu.py                                    apr alone
    python benchmarks/bench_train_cpu.py --peer-python PYTHON_WITH_TORCH    and peer_torch_cpu.py, in turns
    options: --rounds --steps --warmup --preset --cores, --json (one line instead of the table), --record (append a row)

A step is forward, backward, clipping and AdamW (two decay groups) of `demo`, 8 sequences of 128 random tokens, float32.
Each side of each round is a fresh process on the same cores, with the same weights and batches; the first losses must
agree to 1e-4, or it is not the same work and the run fails. Peak memory is the process's own; `idle` is the share that
the interpreter and the libraries take before there is a model.
"""

import argparse
import csv
import datetime
import json
import os
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
from apr.data.batch import LMBatch
from apr.presets import preset
from apr.train.trainer import TransformerTrainer

HERE = Path(__file__).resolve().parent
COMPARED, TOLERANCE = 5, 1e-4  # the first losses, in nats
Results = dict[str, list[dict[str, Any]]]  # the rounds of each side


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Our side of one round; job and result are peer_torch_cpu.py's."""
    idle_mib, how = peak_mib(), decode(TransformerTrainConfig, job["train"], "job")
    with np.load(job["weights"]) as weights:
        trainer = TransformerTrainer.with_model(decode(TransformerConfig, job["config"], "job"), dict(weights), how)
    with np.load(job["batches"]) as batches:
        inputs, targets = batches["inputs"], batches["targets"]
    losses, seconds = [], []
    for x, y in zip(inputs, targets, strict=True):
        start = time.perf_counter()
        losses.append(trainer.train_batch(LMBatch(x, y), how.lr))
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds[job["warmup"]:], "idle_mib": idle_mib, "peak_mib": peak_mib(),
            "versions": f"apr, numpy {np.__version__}"}


def peak_mib() -> float:
    """Most memory this process has held. (Linux starts a child at its parent's peak, so the parent stays small.)"""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_job(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Weights and batches in `folder`, and the job that points to them."""
    config = preset(args.preset)
    how = TransformerTrainConfig(batch_size=8, max_seq_len=128, max_steps=args.warmup + args.steps)
    np.savez(folder / "weights.npz", allow_pickle=False, **TransformerTrainer.new(config, how).params)
    tokens = np.random.default_rng(how.seed).integers(0, config.V, (how.max_steps, how.batch_size, how.max_seq_len + 1))
    np.savez(folder / "batches.npz", inputs=tokens[..., :-1].copy(), targets=tokens[..., 1:].copy())
    return {"config": encode(config), "train": encode(how), "weights": str(folder / "weights.npz"),
            "batches": str(folder / "batches.npz"), "cores": args.cores, "warmup": args.warmup,
            "peer_python": args.peer_python}


def run_rounds(commands: dict[str, list[str]], job: dict[str, Any], rounds: int) -> Results:
    """Each side's rounds, taken in turns. Exits with an error when a side does, or when the losses disagree."""
    results: Results = {side: [] for side in commands}
    for number in range(1, rounds + 1):
        for side, command in commands.items():
            done = subprocess.run([*command, json.dumps(job)], stdout=subprocess.PIPE, check=True)
            results[side].append(json.loads(done.stdout))
            ms = 1e3 * statistics.median(results[side][-1]["seconds"])
            print(f"round {number}/{rounds} {side} {ms:.0f} ms/step, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
        first = [found[-1]["losses"][:COMPARED] for found in results.values()]
        worst = float(np.abs(np.subtract(first[0], first[-1])).max())
        if not worst <= TOLERANCE:
            raise SystemExit(f"not the same work: first losses {first} differ by {worst:.1e} > {TOLERANCE} nats")
    return results


def summary(results: Results, job: dict[str, Any]) -> dict[str, Any]:
    """One flat record of what was measured, on what, when and how."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    describe = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    command = " ".join(["python", *sys.argv]).replace(str(job["peer_python"]), "PYTHON_WITH_TORCH")
    record = {"date": datetime.date.today().isoformat(), "cpu": cpu.split(":")[-1].strip(), "cores": job["cores"],
              "commit": subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip(),
              "command": command}
    tokens = job["train"]["batch_size"] * job["train"]["max_seq_len"]
    for side, found in results.items():
        fast, median, slow = np.percentile([s for one in found for s in one["seconds"]], [20, 50, 80])
        side_record = {"versions": found[0]["versions"], "tokens_per_s": round(tokens / median),
                       "p20": round(tokens / slow), "p80": round(tokens / fast), "ms": round(1e3 * median, 1),
                       "peak_mib": round(max(r["peak_mib"] for r in found)), "idle_mib": round(found[0]["idle_mib"])}
        record |= {f"{side}_{key}": value for key, value in side_record.items()}
    if "peer" in results:
        record["speed_ratio"] = round(record["ours_tokens_per_s"] / record["peer_tokens_per_s"], 3)
        record["memory_ratio"] = round(record["ours_peak_mib"] / record["peer_peak_mib"], 3)
    return record


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [f"{'':28}{'tokens/s':>10}{'p20':>8}{'p80':>8}{'ms/step':>10}{'peak MiB':>10}{'idle MiB':>10}"]
    for side in (s for s in ("ours", "peer") if f"{s}_ms" in record):
        row = "{%s_versions:28}{%s_tokens_per_s:10}{%s_p20:8}{%s_p80:8}{%s_ms:10}{%s_peak_mib:10}{%s_idle_mib:10}"
        lines.append(row.replace("%s", side).format(**record))
    if "speed_ratio" in record:
        lines.append("ours / peer                 {speed_ratio:10}{0:26}{memory_ratio:10}".format("", **record))
    return "\n".join([*lines, "{cpu}, {cores} cores, {date}, {commit}: {command}".format(**record)])


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
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.cores])  # the children inherit it
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
        with path.open("a", newline="") as file:
            rows = csv.DictWriter(file, list(record))
            if file.tell() == 0:
                rows.writeheader()
            rows.writerow(record)


if __name__ == "__main__":
    main()
