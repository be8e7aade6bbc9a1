"""Generation with a whole model on a GPU, beside PyTorch with a static cache: tokens per second, and the roof.

    python benchmarks/bench_decode.py [--preset qwen2_0_5b] [--results DIR] [--no-peer] [--quick] [--load]

Weights are random, prompts too. What is measured, a row each of results/<gpu>/decode.csv:

    step      decoding steps between two device events, each one replay of the graph, at a context that is in the cache
    generate  the same by the clock, through CudaEngine.generate: what a caller gets, the first token left out
    first     from the call of generate to its first token (ms): prefill of the prompt and one step
    prefill   the prompt alone, until the GPU has done it; tok_s are the prompt's tokens

    roof = copy rate of this GPU / (bytes of weights and of keys and values that a step must read), times the batch

The peer decodes greedily with torch.compile(mode="reduce-overhead"); its prompts go through it uncompiled. --load
measures, instead, how long a model file that the page cache holds takes to the GPU, beside safetensors.torch.load_file.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import HERE, Bench, append, plain, results_file, versions
from peers import Peers, find_torch

from apr.config import Sampling, TransformerConfig, encode
from apr.device import Device
from apr.errors import AprError, DeviceFault, one_line
from apr.formats.export import export_safetensors
from apr.formats.model_file import write_apr_model
from apr.formats.open_model import open_model
from apr.hf_config import to_hf
from apr.infer.cuda_engine import CudaEngine
from apr.presets import preset
from apr.tools.decode_speed import (
    DRAWN,
    STEPS,
    first_seconds,
    generate_seconds,
    prompts_of,
    random_model,
    source_of,
    step_bytes,
    step_seconds,
)
from apr.tools.timing import ceilings

COLUMNS = ("date", "commit", "driver", "cupy", "preset", "precision", "batch", "context", "sampling", "what", "ms",
           "tok_s", "roof_tok_s", "of_roof", "peer", "peer_tok_s", "ratio", "torch")


class Plan(NamedTuple):
    """What is measured with one engine."""

    precision: str
    batch: int
    contexts: tuple[int, ...]
    prompts: tuple[int, ...] = ()
    drawn: bool = False  # with temperature and top_p too
    peer: bool = True


PLANS = (Plan("bf16", 1, (128, 2000), (512, 2048), drawn=True), Plan("bf16", 8, (128,), drawn=True),
         Plan("fp32", 1, (128,), (512,), peer=False))


class TorchSide:
    """The peer with the same weights; times by the clock, the GPU waited for at both ends."""

    def __init__(self, torch: Any, c: TransformerConfig, arrays: dict[str, np.ndarray], plan: Plan, S: int) -> None:
        from torch_decode import TorchDecoder

        self.torch, self.c = torch, c
        weights = {name: (torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if plan.precision == "bf16"
                          else torch.from_numpy(a)) for name, a in arrays.items()}
        dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
        self.decoder = TorchDecoder(encode(c), weights, plan.batch, S, dtype, "cuda")

    def seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """The median, after a warm-up."""
        times = []
        for _ in range(repeats + 2):
            self.torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            self.torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def step_seconds(self, prompts: list[list[int]], steps: int, repeats: int) -> float:
        """Of a decoding step: many less few, so that the prompt does not count."""
        ids = self.torch.tensor(prompts, device="cuda")
        few, many = (self.seconds(lambda n=n: self.decoder.generate(ids, n), repeats) for n in (2, steps))
        return (many - few) / (steps - 2)

    def first_seconds(self, length: int, repeats: int) -> float:
        """Of a prompt and the token after it."""
        ids = self.torch.tensor(prompts_of(self.c, 1, length), device="cuda")
        return self.seconds(lambda: self.decoder.generate(ids, 1), repeats)


def measured(name: str, plan: Plan, b: Bench, copy: float) -> Iterator[dict[str, Any]]:
    """The rows of a plan; one that fails is named on stderr, and the others go on. Raises DeviceFault."""
    c, repeats, peer = preset(name), 3 if b.quick else 15, None
    arrays, S = random_model(c, plan.precision), max((*plan.contexts, *plan.prompts)) + STEPS + 8
    b.dev.cache.frozen = False
    engine = CudaEngine(source_of(c, arrays, plan.precision), b.dev, plan.precision, plan.batch, S)
    if b.peers is not None and plan.peer:
        peer = attempt("PyTorch", lambda: TorchSide(b.peers.torch, c, arrays, plan, S))  # type: ignore[union-attr]
    common = {"preset": name, "precision": plan.precision, "batch": plan.batch}

    def row(what: str, context: int, sampling: str, seconds: float, tokens: int, other: float | None) -> dict[str, Any]:
        out = {**common, "what": what, "context": context, "sampling": sampling, "ms": 1e3 * seconds,
               "tok_s": tokens / seconds}
        if what in ("step", "generate"):
            size = step_bytes(c, 2 if plan.precision == "bf16" else 4, plan.batch, context + STEPS // 2)
            out |= {"roof_tok_s": plan.batch * copy / size, "of_roof": tokens / seconds * size / copy / plan.batch}
        return out if other is None else {**out, "peer": f"torch {'compile' if what == 'step' else 'eager'}",
                                          "peer_tok_s": tokens / other, "ratio": other / seconds}

    for context in plan.contexts:
        prompts = prompts_of(c, plan.batch, context)
        other = peer and attempt("PyTorch", lambda p=prompts: peer.step_seconds(p, STEPS, max(3, repeats // 5)))
        for label, settings in (("greedy", {}), ("drawn", DRAWN))[:1 + plan.drawn]:
            how = Sampling(c.V, **settings)
            for what, measure in (("step", step_seconds), ("generate", generate_seconds)):
                found = attempt(what, lambda p=prompts, h=how, m=measure: m(engine, p, h, STEPS, repeats))
                if found:
                    yield row(what, context, label, found, plan.batch, other if (what, label) == ("step", "greedy")
                              else None)
    for length in plan.prompts:
        both = attempt("first", lambda n=length: first_seconds(engine, n, repeats))
        other = peer and attempt("PyTorch", lambda n=length: peer.first_seconds(n, repeats))
        for what, found in zip(("first", "prefill"), both or (), strict=False):
            yield row(what, length, "greedy", found, length, other if what == "first" else None)


def attempt(what: str, function: Callable[[], Any]) -> Any:
    """The result, or None where it failed, which is said. Raises DeviceFault, which ends all."""
    try:
        return function()
    except DeviceFault:
        raise
    except Exception as e:
        print(one_line(f"{what}: {type(e).__name__}: {e}", 300), file=sys.stderr)
        return None


def load_times(name: str, b: Bench) -> dict[str, float]:
    """GiB per second from a file in the page cache to the GPU: ours from .apr and safetensors, and safetensors' own."""
    c, out = preset(name), {}
    arrays = random_model(c, "bf16")
    size = sum(a.nbytes for a in arrays.values()) / 2**30
    with tempfile.TemporaryDirectory() as folder, source_of(c, arrays, "bf16") as source:
        apr_file, plain = Path(folder) / "model.apr", Path(folder) / "model.safetensors"
        write_apr_model(apr_file, source, name="random")
        export_safetensors(source, plain)
        hf = Path(folder) / "hf"
        hf.mkdir()
        (hf / "config.json").write_text(json.dumps(to_hf(c)))
        (hf / "model.safetensors").hardlink_to(plain)

        def ours(path: Path) -> None:
            b.dev.cache.frozen = False
            with open_model(path) as opened:
                CudaEngine(opened, b.dev, "bf16", 1, 256)
            b.dev.synchronize()
        runs: dict[str, Callable[[], Any]] = {"apr, .apr": lambda: ours(apr_file), "apr, safetensors": lambda: ours(hf)}
        if b.peers is not None:
            torch = b.peers.torch

            def theirs() -> None:
                from safetensors.torch import load_file

                load_file(plain, device=f"cuda:{b.dev.ordinal}")
                torch.cuda.synchronize()
            runs["safetensors.torch.load_file"] = theirs
        for label, run in runs.items():
            times = []
            for _ in range(4):  # the first compiles and fills the page cache
                start = time.perf_counter()
                if attempt(label, lambda r=run: (r(),)) is None:
                    break
                times.append(time.perf_counter() - start)
                gc.collect()
            if len(times) == 4:
                out[label] = size / statistics.median(times[1:])
    for label, rate in out.items():
        print(f"{label:30}{size:7.2f} GiB {size / rate:8.3f} s {rate:8.2f} GiB/s", flush=True)
    return out


def record(row: dict[str, Any], gpu: str, results: Path) -> None:
    """Append a row to the file of this GPU."""
    append(results_file(results, gpu, "decode"), [plain(row)], COLUMNS)


def show(row: dict[str, Any]) -> None:
    """A row for people."""
    roof = f"{row['of_roof']:9.0%}" if "of_roof" in row else " " * 9
    peer = f"  {row['peer']:14}{row['peer_tok_s']:10.0f}{row['ratio']:7.2f}" if "peer" in row else ""
    print(f"{row['precision']:6}{row['batch']:>6}{row['context']:>9}  {row['sampling']:9}{row['what']:10}"
          f"{row['ms']:9.3f}{row['tok_s']:10.0f}{roof}{peer}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, append rows; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen2_0_5b")
    parser.add_argument("--results", type=Path, metavar="DIR",
                        help="append rows to DIR/<gpu>/decode.csv (default: benchmarks/results, with --quick nowhere)")
    parser.add_argument("--no-peer", action="store_true", help="apr alone, without PyTorch")
    parser.add_argument("--quick", action="store_true", help="few repetitions: to see that all runs")
    parser.add_argument("--load", action="store_true", help="measure loading instead")
    args = parser.parse_args(argv)
    try:
        preset(args.preset)
        dev = Device(warn=lambda text: print(text, file=sys.stderr))
        torch: Peers | None = None if args.no_peer else find_torch(dev)
        b = Bench(dev, args.quick, peers=torch)
        if args.load:
            return 0 if load_times(args.preset, b) else 1
        results = args.results or (None if args.quick else HERE / "results")
        return measure_all(args.preset, b, results)
    except AprError as e:
        print(f"apr: {e}", file=sys.stderr)
        return e.exit_code


def measure_all(name: str, b: Bench, results: Path | None) -> int:
    """Every plan; 0, or 1 if one gave nothing. Raises DeviceFault."""
    copy, about, code = ceilings(b)["copy"], versions(b), 0
    b.blocks.clear()
    print(f"{b.dev.name}: {name}, copy {copy / 1e9:.0f} GB/s; ratio is ours / peer in tok/s\n"
          f"{'':6}{'batch':>6}{'context':>9}  {'sampling':9}{'what':10}{'ms':>9}{'tok/s':>10}{'of roof':>9}  "
          f"{'peer':14}{'tok/s':>10}{'ratio':>7}", flush=True)
    for plan in PLANS:
        rows = measured(name, plan, b, copy)
        count = 0
        while row := attempt(f"{plan.precision} batch {plan.batch}", lambda r=rows: next(r, None)):
            count += 1
            show(row)
            if results is not None:
                known = about if "peer" in row else {**about, "torch": ""}
                record({**known, **row}, b.dev.name, results)
        code = code if count else 1
        del rows
        gc.collect()
        if b.peers is not None:
            b.peers.torch._dynamo.reset()
            b.peers.torch.cuda.empty_cache()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
