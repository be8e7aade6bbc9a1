"""`apr parity MODEL`: the GPU against the reference, or two files, or a file of scores, at every position."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apr.cli.prompts import is_utf8
from apr.config import require
from apr.device import Device
from apr.errors import ConfigError, MeasureError, UnavailableError, one_line
from apr.formats.open_model import open_model
from apr.formats.source import ModelSource
from apr.infer.cpu_engine import CpuEngine, load_params
from apr.infer.cuda_engine import BATCHES, CudaEngine
from apr.infer.engine import Engine
from apr.infer.prompt import Prompter, open_prompter
from apr.paths import override_record, say_overrides
from apr.strict import plain
from apr.tools.config_diff import PARAMS, check_shapes
from apr.tools.device import Choice, choose_device
from apr.tools.parity import Report, against_model, against_reference, against_scores
from apr.tools.parity_judge import Position
from apr.tools.parity_prompts import TOKENS, Prompt, built_in, check_tokens, given
from apr.tools.parity_truth import read_logits
from apr.tools.weights import byte_faults

SHOWN = 10  # failing positions and differing tensors in the table for people; --json has them all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help=".apr or GGUF file, Hugging Face folder, checkpoint or run")
    add("--against", type=Path, metavar="OTHER", help="compare with another file of this model, instead of CPU and GPU")
    add("--logits", type=Path, metavar="FILE",
        help="compare with scores in a .safetensors: ids (T) or (B, T), logits (T, V) or (B, T, V)")
    add("--device", metavar="D", help="cpu, cuda, cuda:N or auto; with --against or --logits: cpu unless given")
    add("--precision", choices=["fp32", "bf16"], help="of the GPU's weights and arithmetic (GPU: bf16, CPU: fp32)")
    add("--prompt", action="append", metavar="TEXT", help="instead of the built-in prompts; may be given again")
    add("--tokens", type=int, default=TOKENS, metavar="N", help=f"of all prompts together, at most ({TOKENS})")
    add("--batch-size", type=int, metavar="N", help="prompts at a time (GPU: 1, CPU: 8)")
    add("--json", action="store_true", help="print a line of JSON for each position, then one with the verdict")


def run(args: argparse.Namespace) -> int:
    """Compare, print, and return 0; a failed comparison is raised as GateError, one of nothing as MeasureError."""
    _check(args)
    choice = _choose(args)
    say_overrides(_say)
    with open_model(args.model) as source:
        if args.against is not None:
            with open_model(args.against) as other:
                check_shapes(source.config, other.config, f"{args.model} and {args.against}", PARAMS)
                prompts = _prompts(args, source)
                report = against_model(source, other, lambda s: _engine(args, choice, s, prompts), prompts)
        elif args.logits is not None:
            prompts, scores, rounding = read_logits(args.logits, source.config)
            report = against_scores(_engine(args, choice, source, prompts), source, prompts, scores, rounding)
        else:
            prompts = _prompts(args, source)
            engine = _engine(args, choice, source, prompts)
            assert isinstance(engine, CudaEngine)
            report = against_reference(engine, source, prompts, byte_faults(engine.net, source))
    (_print_json if args.json else _print_table)(report)
    report.require()
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.against is not None and args.logits is not None:
        raise ConfigError("command line", "--against or --logits", "both", "give one")
    if args.logits is not None and args.prompt is not None:
        raise ConfigError("command line", "--logits, whose file has the prompts, or --prompt", "both", "give one")
    for text in args.prompt or []:
        require("--prompt", text, "a text in UTF-8 that is not empty", bool(text) and is_utf8(text), "command line")
    check_tokens(args.tokens)
    require("--batch-size", args.batch_size, f"from 1 to {BATCHES[-1]}",
            args.batch_size is None or 1 <= args.batch_size <= BATCHES[-1], "command line")


def _choose(args: argparse.Namespace) -> Choice:
    """The device. Raises MeasureError where the GPU is to be compared and there is none, or the CPU was asked for."""
    alone = args.against is None and args.logits is None
    choice = choose_device(args.device if alone or args.device is not None else "cpu")
    if alone and choice.kind != "cuda":
        raise MeasureError("apr parity", "a GPU to hold against the reference", f"--device {args.device or 'auto'}, "
                           "which is the CPU here", "use a machine with a GPU, or give --against or --logits")
    if choice.kind == "cpu" and args.precision == "bf16":
        raise UnavailableError("--precision", "fp32 on the CPU", "bf16", "leave it out, or use a GPU")
    return choice


def _prompts(args: argparse.Namespace, source: ModelSource) -> list[Prompt]:
    if args.prompt is not None:
        return given(args.prompt, source.config, open_prompter(source), args.tokens)
    return built_in(source.config, prompter_of(source), args.tokens)


def prompter_of(source: ModelSource) -> Prompter | None:
    """The model's tokenizer and what belongs to it; None, which is said, for a model without one."""
    if source.has_tokenizer:
        return open_prompter(source)
    _say("the model has no tokenizer: the prompts are token ids, without texts")
    return None


def _engine(args: argparse.Namespace, choice: Choice, source: ModelSource, prompts: Sequence[Prompt]) -> Engine:
    """The engine to compare, without the start gate, which would end this before it has begun."""
    longest = max(len(p.ids) for p in prompts)
    if choice.kind == "cuda":
        return CudaEngine(source, Device(choice.ordinal, warn=_say), args.precision or choice.precision,
                          args.batch_size or 1, longest)
    return CpuEngine(source.config, load_params(source), args.batch_size or 8, longest)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def position_line(p: Position) -> dict[str, Any]:
    """A position as JSON: its place, its numbers, its limits and its verdict in one object."""
    values = {"prompt": p.prompt, "way": p.way, "position": p.position, "token_id": p.token_id}
    measured = {k: v for k, v in dataclasses.asdict(p.measured).items() if k != "rms"}
    limits = {"relative_l2_limit": p.limit.relative_l2, "kl_limit": p.limit.kl}
    out: dict[str, Any] = plain({**values, **measured, **limits, "verdict": p.verdict, "why": p.why})
    return out


def _print_json(report: Report) -> None:
    for p in report.positions:
        print(json.dumps(position_line(p)))
    print(json.dumps({"summary": plain({**report.summary(), **override_record()})}), flush=True)


def _print_table(report: Report) -> None:
    for f in report.field_faults:
        print(f"{'DIFFERS' if f.computed else 'differs'}: {f.name} {one_line(str(f.expected))} and "
              f"{one_line(str(f.found))}" + ("" if f.computed else " (the same is computed)"))
    for w in report.weight_faults:
        print(f"DIFFERS: {w.name}: {w.count} of {w.elements} elements, the first at {w.index}: {w.expected:g} and "
              f"{w.found:g}")
    print(f"weights: {report.weights_compared} compared, {len(report.weight_faults)} differ")
    print(f"{'prompt':12}{'way':11}{'tokens':>7}{'rel L2':>10}{'limit':>10}{'KL nats':>10}{'cosine':>11}"
          f"{'max |d|':>10}{'ties':>6}  verdict")
    for prompt, way in dict.fromkeys((p.prompt, p.way) for p in report.positions):
        print(_row(prompt, way, [p for p in report.positions if (p.prompt, p.way) == (prompt, way)]))
    for t in report.together:
        print(f"{'together':12}{t.way:11}{t.positions:7}{t.relative_l2:10.2e}{t.limit.relative_l2:10.2e}  "
              f"scale {t.scale:.6f} (within {t.limit.scale:.1e} of 1)  {t.verdict}")
    for p in report.failed[:SHOWN]:
        print(f"FAIL '{p.prompt}' ({p.way}) position {p.position}, token {p.token_id}: {p.why}")
    if len(report.failed) > SHOWN:
        print(f"… and {len(report.failed) - SHOWN} more positions (--json has all)")
    for hint in report.summary()["hints"]:
        print(f"hint: {hint}")
    print(f"{report.verdict}: {report.what} [{report.precision}], {len(report.positions)} positions, "
          f"{len(report.failed)} beyond limits", flush=True)


def _row(prompt: str, way: str, positions: list[Position]) -> str:
    """The worst of a prompt taken one way; a NaN is the worst."""
    def most(values: list[float]) -> float:
        return max(values, key=lambda v: math.inf if math.isnan(v) else v)

    m = [p.measured for p in positions]
    verdict = next((v for v in ("fail", "unmeasured") if any(p.verdict == v for p in positions)), "pass")
    return (f"{prompt:12}{way:11}{len(m):7}{most([x.relative_l2 for x in m]):10.2e}"
            f"{max(p.limit.relative_l2 for p in positions):10.2e}{most([x.kl for x in m]):10.2e}"
            f"{min(x.cosine for x in m):11.7f}{most([x.max_abs for x in m]):10.2e}"
            f"{sum(p.verdict == 'near tie' for p in positions):6}  {verdict}")
