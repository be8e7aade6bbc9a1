"""`apr trace MODEL`: what a model computes at every point, as statistics, tensors, or differences from another run."""

import argparse
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from apr.cli.prompts import is_utf8
from apr.cli.trace_report import Report
from apr.config import require
from apr.errors import ConfigError, one_line
from apr.formats.open_model import open_model
from apr.formats.source import ModelSource
from apr.taps import split_name
from apr.tools.config_diff import POINTS, check_shapes
from apr.tools.device import Choice, choose_device
from apr.tools.trace import Trace, capture, check_precision, prompt_tokens
from apr.tools.trace_diff import diff, judge
from apr.tools.trace_file import check_free, is_trace, open_trace, save_trace, trace_path
from apr.tools.trace_points import parse_layers, parse_stages, select

WORD = re.compile(r"(cpu|cuda(?::[0-9]+)?)(?::(fp32|bf16))?")
OF_A_RUN = ("prompt", "tokens", "device", "precision", "backward", "layers", "save_tensor")  # a saved trace is of one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="the model, or a trace that --save-tensor saved")
    add("--prompt", metavar="TEXT", help='the text to run on ("What is 2+2?")')
    add("--tokens", metavar="IDS", help="token ids to run on instead, as 1,2,3")
    add("--device", metavar="D", help="cpu, cuda, cuda:N or auto (auto, or APR_DEVICE)")
    add("--precision", choices=["fp32", "bf16"], help="of weights and arithmetic (GPU: bf16, CPU: fp32)")
    add("--payload", action="store_true", help="run the model and print the statistics of every point")
    add("--backward", action="store_true", help="gradients too, of the mean loss of each token's successor")
    add("--layers", metavar="A..B", help="these layers only, both ends included (all)")
    add("--save-tensor", metavar="STAGES", help="stages to save, as attn_norm,q_rope,dattn_norm, or all")
    add("--output", type=Path, metavar="DIR", help="the folder to save them in")
    add("--diff", metavar="OTHER", help="compare with: a model, a saved trace, or cpu, cuda, cuda:fp32, cuda:bf16")
    add("--tolerance", type=float, metavar="X", help="relative L2 that a point may differ by (by precision and depth)")
    add("--json", action="store_true", help="print lines of JSON: one per point, and a summary")


@dataclass(frozen=True)
class Other:
    """What --diff names: a saved trace, or a model (this one, for cpu and cuda) and where it is to run."""

    trace: Trace | None
    source: ModelSource | None
    choice: Choice


def run(args: argparse.Namespace) -> int:
    """Trace; returns 0, or raises GateError (5) when a difference is beyond tolerance."""
    _check(args)
    report = Report(args.json)
    if is_trace(args.model):
        _saved(args, report)
        return 0
    with ExitStack() as files:
        source = files.enter_context(open_model(args.model))
        layers = None if args.layers is None else parse_layers(args.layers, source.config)
        stages = None if args.save_tensor is None else parse_stages(args.save_tensor, source.config, args.backward)
        if args.payload or args.save_tensor is not None or args.diff is not None:
            choice = choose_device(args.device)
            choice = replace(choice, precision=args.precision or choice.precision)
            other = None if args.diff is None else _other(args, source, choice, files)
            _run(args, report, source, choice, layers, stages, other)
        else:
            report.skeleton(source, select(source.config, None, layers, args.backward))
    return 0


def _run(args: argparse.Namespace, report: Report, source: ModelSource, choice: Choice, layers: range | None,
         stages: frozenset[str] | None, other: Other | None) -> None:
    """The model is computed, and what was asked is printed, saved and compared."""
    tokens, origin = _tokens(args, source, other)
    saved = [] if args.save_tensor is None else select(source.config, stages, layers, args.backward)
    shown = select(source.config, None, layers, args.backward) if args.payload or other else []
    if other is not None and other.trace is not None and layers is None and not args.backward:
        shown = list(other.trace.arrays)
    backward = args.backward or any(split_name(name)[2] for name in shown)
    mine = capture(source, choice, tokens, [*shown, *saved], [*saved, *(shown if other else [])], backward,
                   hashed=args.save_tensor is not None)
    if args.payload:
        report.payload(mine, shown)
    if args.save_tensor is not None:
        report.saved(save_trace(_keeping(mine, saved), args.output), len(saved))
    if other is None:
        report.summary(mine, origin)
        return
    theirs = other.trace
    if theirs is None:
        assert other.source is not None
        theirs = capture(other.source, other.choice, tokens, shown, shown, backward)
    _compare(args, report, _keeping(mine, shown), theirs, origin)


def _keeping(trace: Trace, names: list[str]) -> Trace:
    """The trace with these arrays only."""
    wanted = set(names)
    return replace(trace, arrays={name: array for name, array in trace.arrays.items() if name in wanted})


def _saved(args: argparse.Namespace, report: Report) -> None:
    """MODEL is a trace."""
    given = [f"--{name.replace('_', '-')}" for name in OF_A_RUN if getattr(args, name) not in (None, False)]
    if given:
        raise ConfigError(given[0], "a model to run", f"{args.model}, a saved trace", "leave it out, or give the model")
    mine, origin = open_trace(args.model), "those of the saved trace"
    if args.payload or args.diff is None:
        report.payload(mine, list(mine.arrays))
    if args.diff is None:
        report.summary(mine, origin)
        return
    if not is_trace(Path(args.diff)):
        raise ConfigError("--diff", "a saved trace, to compare with one", one_line(args.diff, 100),
                          "give the model first, and the saved trace to --diff")
    other = open_trace(Path(args.diff))
    if trace_path(args.model).samefile(trace_path(Path(args.diff))):
        raise _same(args)
    _compare(args, report, mine, other, origin)


def _same(args: argparse.Namespace) -> ConfigError:
    """What agrees with itself shows nothing."""
    return ConfigError("--diff", "another model, trace, device or precision",
                       f"{one_line(args.diff, 100)}, what is traced already", "compare with something else")


def _compare(args: argparse.Namespace, report: Report, mine: Trace, other: Trace, origin: str) -> None:
    points = diff(mine, other, args.tolerance)
    report.difference(mine, other, points, origin)
    judge(points)


def _check(args: argparse.Namespace) -> None:
    """What argparse cannot see."""
    where = "command line"
    if args.prompt is not None and args.tokens is not None:
        raise ConfigError(where, "--prompt or --tokens", "both", "give one")
    require("--prompt", args.prompt, "a text in UTF-8 that is not empty",
            args.prompt is None or (bool(args.prompt) and is_utf8(args.prompt)), where)
    if (args.save_tensor is None) != (args.output is None):
        raise ConfigError(where, "--save-tensor and --output together", "one of them", "give both or neither")
    if args.tolerance is not None:
        require("--tolerance", args.tolerance, "from 0 to 1, with --diff",
                0 <= args.tolerance <= 1 and args.diff is not None, where)
    if args.output is not None:
        check_free(args.output)


def _other(args: argparse.Namespace, source: ModelSource, mine: Choice, files: ExitStack) -> Other:
    """What --diff names, opened, its shape the model's, its device chosen.

    Raises ConfigError for what is the model's own run, which would agree with itself.
    """
    path, names = Path(args.diff), f"{args.model} and {args.diff}"
    if match := WORD.fullmatch(args.diff):
        choice = choose_device(match[1])
        choice = replace(choice, precision=match[2] or choice.precision)
        check_precision(choice)
        if choice == mine:
            raise _same(args)
        return Other(None, source, choice)
    if is_trace(path):
        saved = open_trace(path)
        check_shapes(source.config, saved.config, names, POINTS)
        return Other(saved, None, mine)
    second = files.enter_context(open_model(path))
    if path.samefile(args.model):
        raise _same(args)
    check_shapes(source.config, second.config, names, POINTS)
    return Other(None, second, mine)


def _tokens(args: argparse.Namespace, source: ModelSource, other: Other | None) -> tuple[Sequence[int], str]:
    """The token ids, and where they are from."""
    if args.tokens is not None:
        words = args.tokens.split(",")
        if not all(re.fullmatch(r"\s*[0-9]{1,10}\s*", word) for word in words):
            raise ConfigError("--tokens", "ids between commas, as 1,2,3", repr(args.tokens)[:60], "correct it")
        return [int(word) for word in words], "--tokens"
    if args.prompt is None and other is not None and other.trace is not None:
        return other.trace.tokens, "those of the saved trace"
    return prompt_tokens(source, args.prompt)
