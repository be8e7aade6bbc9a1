"""Times cuBLASLt's candidates for the matrix products of models, and writes the table of the quickest.

    python benchmarks/tune_gemm.py --out FOLDER [qwen2_0_5b:8x2048 llama_370m:8x2048 …]

A product's candidates are timed one after the other, on random data with device events; the best median wins, and is
entered only where it beats the library's first candidate by more than 1 %. The table goes into apr/gemm_tables, for
this GPU and this version of the library; a run records the algorithms that it used, so a later table changes no run in
progress.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import TransformerTrainConfig
from apr.data.batch import LMBatch
from apr.device import Device
from apr.gemm import R_16BF, Gemm, Shape
from apr.gemm_table import table_path
from apr.presets import preset
from apr.train.cuda_trainer import CudaTransformerTrainer

ROUNDS, GAIN = 7, 0.99


def shapes_of(dev: Device, name: str, batch: int, length: int) -> list[tuple[Shape, float]]:
    """Every product of a training step and of an evaluation, in bf16.

    Two micro-batches: the first sets the gradients (beta 0), the second adds to them (beta 1).
    """
    config = TransformerTrainConfig(batch_size=batch, max_seq_len=length, precision="bf16")
    trainer = CudaTransformerTrainer(preset(name), config, dev, graphs=False)
    trainer.train_batch([LMBatch.from_rows(np.zeros((batch, length + 1), np.int32))] * 2, 0.0)
    return list(trainer.gemm.products)


def random_array(dev: Device, size: int, kind: int) -> Any:
    """Normal numbers in bf16 or float32."""
    values = np.tile(np.random.default_rng(size).standard_normal(min(size, 1 << 20), dtype=np.float32),
                     -(-size // (1 << 20)))[:size]
    array = dev.empty((size,), "bf16" if kind == R_16BF else "f32")
    dev.upload(array, (values.view(np.uint32) >> 16).astype(np.uint16) if kind == R_16BF else values)
    return array


def milliseconds(dev: Device, work: Any) -> float:
    """The median of a few runs, each between two events."""
    times = []
    for _ in range(ROUNDS):
        begin, end = dev.cupy.cuda.Event(), dev.cupy.cuda.Event()
        begin.record(dev.stream)
        work()
        end.record(dev.stream)
        end.synchronize()
        times.append(dev.cupy.cuda.get_elapsed_time(begin, end))
    return statistics.median(times[1:])


def main() -> None:
    """Tune, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["qwen2_0_5b:8x2048", "llama_370m:8x2048"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dev, products = Device(), dict[tuple[Shape, float], None]()
    for text in args.models:
        name, _, size = text.partition(":")
        batch, _, length = size.partition("x")
        products |= dict.fromkeys(shapes_of(dev, name, int(batch), int(length)))
    gemm, table, gained = Gemm(dev, dev.empty((32 << 20,), "u8")), {}, 0.0
    for shape, beta in products:
        s = shape
        a, b = (random_array(dev, size, s.inputs) for size in (s.m * s.k, s.n * s.k))
        out, bias = random_array(dev, s.m * s.n, s.output), random_array(dev, s.m, s.output) if s.bias else None
        timed = gemm.tune(s, beta, lambda a=a, b=b, out=out, s=s, beta=beta, bias=bias: milliseconds(
            dev, lambda: gemm.multiply(out, a, b, s, beta, bias)), bias)
        first, (best, algo) = timed[0][0], min(timed)
        if best < GAIN * first:
            table[s.name(beta)], gained = algo, gained + first - best
        print(f"{s.name(beta):44} {len(timed):3} candidates  first {first:.3f}  best {best:.3f} ms  "
              f"{2e-9 * s.m * s.n * s.k / best:.0f} TFLOP/s", flush=True)
    path = args.out / table_path(dev.name, gemm.version).name
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gpu": dev.name, "cublaslt": gemm.version, "algorithms": table}, indent=1) + "\n")
    print(f"{len(table)} of {len(products)} products gain, {gained:.3f} ms in all, each once")


if __name__ == "__main__":
    main()
