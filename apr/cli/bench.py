"""`apr bench`: how quick training steps, their ops, and generation are on this machine's GPU. It needs no PyTorch."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from apr.buffers import STORAGE, plan
from apr.config import require
from apr.errors import ConfigError, did_you_mean
from apr.paths import environment, override_record, say_overrides
from apr.presets import preset
from apr.tools.bench import OPS, Row, measure_decode, measure_ops, measure_step
from apr.tools.device import choose_device
from apr.tools.step_cost import MFU, PEAK, PRODUCT
from apr.tools.timed_device import TimedDevice

WHAT = {"step": "a whole training step: tokens per second, MFU, memory beside the plan, each group beside its floor",
        "op": "each op of a training step, or the one named, as the step launches it",
        "decode": "generation: a token, a prompt, and the first token after it"}
BATCH = {"step": 8, "op": 8, "decode": 1}
OWN = {"seq_length": ("step", "op"), "rounds": ("step",), "steps": ("step",), "context": ("decode",),
       "prompt_length": ("decode",), "op": ("op",)}  # arguments that not every kind has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(f"  {name:8} {text}" for name, text in WHAT.items())
    parser.add_argument("what", choices=list(WHAT), metavar="|".join(WHAT))
    parser.add_argument("op", nargs="?", help="op: only this one, such as rmsnorm or linear")
    parser.add_argument("--preset", default="qwen2_0_5b", help="the model's shape (qwen2_0_5b)")
    parser.add_argument("--batch-size", type=int, help="sequences (8; decode: 1)")
    parser.add_argument("--seq-length", type=int, help="step, op: tokens of a sequence (2048)")
    parser.add_argument("--context", type=int, help="decode: tokens in the cache (128)")
    parser.add_argument("--prompt-length", type=int, help="decode: tokens of the prompt (512)")
    parser.add_argument("--precision", choices=list(STORAGE), default="bf16", help="default bf16")
    parser.add_argument("--rounds", type=int, help="step: rounds, whose median counts (5)")
    parser.add_argument("--steps", type=int, help="step: steps of a round (5)")
    parser.add_argument("--device", metavar="cuda[:N]", help="the GPU (the first)")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises ConfigError, then UnavailableError without a GPU, before anything else."""
    measured = prepared(args)
    for row in measured:
        print(json.dumps({**row, **override_record()}) if args.json else "\n".join(lines(row)), flush=True)
    return 0


def prepared(args: argparse.Namespace) -> Iterator[Row]:
    """The arguments checked, the GPU found, nothing measured yet."""
    for name, kinds in OWN.items():
        if getattr(args, name) is not None and args.what not in kinds:
            where = f"apr bench {args.what}"
            raise ConfigError(where, "arguments of this kind", f"{name.replace('_', '-')} {getattr(args, name)}",
                              f"it belongs to 'apr bench {kinds[0]}'")
    if args.op is not None and args.op not in (ops := sorted(set(OPS.values()))):
        raise ConfigError("apr bench op", "an op of a training step", args.op, did_you_mean(args.op, ops))
    model, batch = preset(args.preset), _number(args, "batch_size", BATCH[args.what])
    length, context = _number(args, "seq_length", 2048), _number(args, "context", 128)
    prompt, rounds, steps = _number(args, "prompt_length", 512), _number(args, "rounds", 5), _number(args, "steps", 5)
    if args.what != "decode":
        plan(model, batch, length, args.precision)
    word = args.device or environment().get("APR_DEVICE", "cuda")
    if word == "cpu":
        raise ConfigError("--device cpu", "a GPU to measure", "the CPU", "'make bench' measures training on the CPU")
    dev = TimedDevice(choose_device("cuda" if word == "auto" else word).ordinal, warn=say)
    say_overrides(say)
    say(f"{dev.name}: {args.preset}, batch {batch}, {args.precision}")
    if args.what == "step":
        return measure_step(dev, model, batch, length, args.precision, rounds, steps, say)
    if args.what == "op":
        return measure_ops(dev, model, batch, length, args.precision, args.op, say)
    return measure_decode(dev, model, batch, context, prompt, args.precision, say)


def _number(args: argparse.Namespace, name: str, default: int) -> int:
    value = default if getattr(args, name) is None else int(getattr(args, name))
    require("--" + name.replace("_", "-"), value, "at least 1", value >= 1, "apr bench")
    return value


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def lines(row: dict[str, Any]) -> Iterator[str]:
    """A row for people."""
    if row["bench"] == "step":
        yield f"{row['tok_s']:.0f} tok/s, {row['ms']:.2f} ms a step (p20 {row['p20_ms']:.2f}, p80 {row['p80_ms']:.2f})"
        yield (f"MFU {row['mfu']:.1%} of {PEAK / 1e12:.1f} TFLOP/s, {row['of_measured']:.1%} of {PRODUCT / 1e12:.0f}; "
               + MFU.format(peak=PEAK / 1e12))
        yield (f"memory {row['gib']:.2f} GiB, planned {row['plan_gib']:.2f} ({row['off_plan']:+.1%}); held before it "
               f"{row['context_gib']:.2f} GiB")
        yield f"this GPU: copy {row['copy_gbps']:.0f} GB/s, product {row['product_tflops']:.0f} TFLOP/s"
        yield "paths: " + (", ".join(f"{op} {path}" for op, path in row["paths"].items()) or "general")
        yield f"{'group':22}{'ms':>9}{'floor':>9}{'of floor':>10}  path"
    elif row["bench"] == "group":
        yield f"{row['group'][:22]:22}{row['ms']:9.3f}{_floor(row)}  {row['path']}"
    elif row["bench"] == "op":
        yield f"{row['op']:14}{row['ms']:9.3f} ms a step, floor{_floor(row)}  {row['path']}"
        for k in row["kernels"]:
            rate = f"{k['tflops']:9.1f} TFLOP/s" if "tflops" in k else ""
            yield f"    {k['kernel']:40}{k['launches']:6.0f} x {k['us']:9.1f} us{rate}"
    else:
        roof = f", {row['of_roof']:.0%} of the roof" if "of_roof" in row else ""
        yield (f"{row['what']:9} batch {row['batch']}, {row['context']} tokens: {row['ms']:.3f} ms, "
               f"{row['tok_s']:.0f} tok/s{roof}")


def _floor(row: dict[str, Any]) -> str:
    if not row["floor_ms"]:
        return f"{'':19}"
    share = f"{row['ms'] / row['floor_ms']:9.2f}x" if row["ms"] else f"{'fused':>10}"
    return f"{row['floor_ms']:9.3f}{share}"
