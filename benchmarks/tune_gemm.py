"""Times cuBLASLt's candidates for the matrix products of models, and writes the table of the quickest.

    python benchmarks/tune_gemm.py --out FOLDER [qwen2_0_5b:8x2048 …]

In a training step a GPU works at its power limit, where an algorithm that needs less energy is the quicker one, and
reads other weights for every layer. So a candidate is timed as a graph of the product with several layers' operands,
replayed without a pause until its clock has settled; first all candidates briefly, then those close to the best, there
and back. The best is entered only where it beats the library's first candidate by more than 1 %.

The table goes into apr/gemm_tables, for this GPU and this version of the library; a run records the algorithms that it
used, so a later table changes no run in progress.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import TransformerTrainConfig
from apr.data.batch import LMBatch
from apr.device import Device
from apr.errors import KernelError
from apr.gemm import R_16BF, Shape
from apr.gemm_table import table_path
from apr.presets import preset
from apr.tools.timing import FLUSH, Lab
from apr.train.cuda_trainer import CudaTransformerTrainer

CANDIDATES, CLOSE, FINALISTS, GAIN = 32, 1.08, 6, 0.99
BRIEF, LONG = (2e-3, 4e-3), (30e-3, 50e-3)  # seconds of work before the clock is read, and those that are timed
MOST_LAYERS = 24
ROWS = ["qwen2_0_5b:8x2048", "qwen2_0_5b:32x1024", "llama_370m:8x2048", "qwen2_0_5b:1x512"]  # of bench_step.py --rows


def shapes_of(dev: Device, name: str, batch: int, length: int) -> list[tuple[Shape, float]]:
    """Every product of a training step and of an evaluation, in bf16.

    Two micro-batches: the first sets the gradients (beta 0), the second adds to them (beta 1).
    """
    config = TransformerTrainConfig(batch_size=batch, max_seq_len=length, precision="bf16")
    trainer = CudaTransformerTrainer(preset(name), config, dev, graphs=False)
    trainer.train_batch([LMBatch.from_rows(np.zeros((batch, length + 1), np.int32))] * 2, 0.0)
    return list(trainer.gemm.products)


class Graph:
    """A product with each layer's operands, by one algorithm, as a graph. Raises KernelError if it is not supported."""

    def __init__(self, lab: Lab, layers: Sequence[tuple[Any, ...]], shape: Shape, beta: float, algorithm: str) -> None:
        self.dev, gemm, name = lab.dev, lab.gemm, shape.name(beta)
        gemm.table[name] = algorithm
        gemm.products.pop((shape, beta), None)
        graphs: list[Any] = []

        def multiply() -> None:
            for out, a, b, bias in layers:
                gemm.multiply(out, a, b, shape, beta, bias)

        multiply()  # what the library loads for it, it cannot load while a graph is captured
        with self.dev.capture(graphs):
            multiply()
        self.graph, self.algorithm, self.layers = graphs[0], algorithm, len(layers)
        self.milliseconds = math.inf  # of one product
        self.milliseconds = self.time(0.0, 0.0)

    def time(self, before: float, timed: float) -> float:
        """Milliseconds of one product, over `timed` seconds, after `before` seconds of the same."""
        events = [self.dev.cupy.cuda.Event() for _ in range(3)]
        each = self.milliseconds * self.layers
        runs = [max(1, math.ceil(1e3 * seconds / each)) for seconds in (before, timed)]
        for event, count in zip(events, [*runs, 0], strict=True):
            event.record(self.dev.stream)
            for _ in range(count):
                self.graph.launch(self.dev.stream)
        events[2].synchronize()
        return self.dev.cupy.cuda.get_elapsed_time(events[1], events[2]) / (runs[1] * self.layers)


def layers_of(lab: Lab, s: Shape) -> list[tuple[Any, ...]]:
    """Operands (out, a, b, bias) of so many layers that no cache holds them all."""
    kinds = [("bf16" if kind == R_16BF else "f32") for kind in (s.output, s.inputs, s.inputs, s.output)]
    sizes = (s.m * s.n, s.m * s.k, s.n * s.k, s.m * s.bias)
    count = min(MOST_LAYERS, math.ceil(FLUSH / (2 * sum(sizes))))
    return [tuple(lab.random((size,), kind) if size else None for size, kind in zip(sizes, kinds, strict=True))
            for _ in range(count)]


def tune(lab: Lab, shape: Shape, beta: float) -> tuple[list[Graph], int]:
    """The library's first candidate, and those close to the best, with settled milliseconds; how many there are."""
    layers, graphs = layers_of(lab, shape), []
    for algorithm in lab.gemm.algorithms(shape, beta, CANDIDATES, layers[0][3]):
        try:
            graphs.append(Graph(lab, layers, shape, beta, algorithm))
        except KernelError:
            continue  # a candidate that the library lists, and then does not support
    for graph in graphs:
        graph.milliseconds = graph.time(*BRIEF)
    first, *others = graphs
    limit = CLOSE * min(graph.milliseconds for graph in graphs)
    close = sorted((g for g in others if g.milliseconds < limit), key=lambda g: g.milliseconds)
    finalists = [first, *close[:FINALISTS]]
    there = [graph.time(*LONG) for graph in finalists]
    back = [graph.time(*LONG) for graph in reversed(finalists)]
    for graph, *times in zip(finalists, there, reversed(back), strict=True):
        graph.milliseconds = statistics.mean(times)
    return finalists, len(graphs)


def main() -> None:
    """Tune, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=ROWS, help="presets and their batches")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dev, products = Device(), dict[tuple[Shape, float], None]()
    for text in args.models:
        name, _, size = text.partition(":")
        batch, _, length = size.partition("x")
        products |= dict.fromkeys(shapes_of(dev, name, int(batch), int(length)))
    lab, table, gained = Lab(dev), {}, 0.0
    lab.gemm.table.clear()
    for shape, beta in products:
        finalists, count = tune(lab, shape, beta)
        first, best = finalists[0], min(finalists, key=lambda g: g.milliseconds)
        if best.milliseconds < GAIN * first.milliseconds:
            table[shape.name(beta)], gained = best.algorithm, gained + first.milliseconds - best.milliseconds
        print(f"{shape.name(beta):44} {count:3} candidates  first {first.milliseconds:.4f}  "
              f"best {best.milliseconds:.4f} ms  {2e-9 * shape.m * shape.n * shape.k / best.milliseconds:.0f} TFLOP/s",
              flush=True)
    path = args.out / table_path(dev.name, lab.gemm.version).name
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"gpu": dev.name, "cublaslt": lab.gemm.version, "algorithms": table}, indent=1) + "\n")
    print(f"{len(table)} of {len(products)} products gain, {gained:.3f} ms in all, each once")


if __name__ == "__main__":
    main()
