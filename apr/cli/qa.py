"""`apr qa MODEL`: the gates, each run or reported as not run, as a table or one JSON object."""

import argparse
import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path

from apr.cli.parity import prompter_of
from apr.config import require
from apr.device import Device
from apr.errors import ConfigError, UnavailableError, did_you_mean, one_line
from apr.formats.open_model import open_model
from apr.formats.source import ModelSource
from apr.infer.cpu_engine import CpuEngine, load_params
from apr.infer.cuda_engine import CudaEngine
from apr.infer.engine import Engine
from apr.paths import say_overrides
from apr.strict import plain
from apr.tools.config_diff import PARAMS, check_shapes
from apr.tools.device import Choice, choose_device
from apr.tools.parity_truth import read_logits
from apr.tools.qa import NOT_APPLICABLE, THRESHOLDS, QaReport, previous_throughput, run_gates
from apr.tools.qa_gates import CONTEXT, NAMES, Gates, Subject
from apr.tools.weights import TensorFault, byte_faults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add, t = parser.add_argument, THRESHOLDS
    add("model", type=Path, metavar="MODEL", help=".apr or GGUF file, Hugging Face folder, checkpoint or run")
    add("--device", metavar="D", help="cpu, cuda, cuda:N or auto (auto, or APR_DEVICE)")
    add("--precision", choices=["fp32", "bf16"], help="of the GPU's weights and arithmetic (GPU: bf16, CPU: fp32)")
    add("--golden", type=Path, metavar="FILE", help="scores to reproduce, as for 'apr parity --logits'")
    add("--against", type=Path, metavar="OTHER", help="another file of this model, which must compute the same")
    add("--previous-report", type=Path, metavar="FILE", help="what an earlier --json printed, to compare speed with")
    add("--assert-tps", type=float, metavar="X",
        help=f"tokens per second to reach (GPU {t['tokens_per_second_gpu']:g}, CPU {t['tokens_per_second_cpu']:g})")
    add("--assert-gpu-speedup", type=float, default=t["gpu_speedup"], metavar="X",
        help=f"times that the GPU must be faster than the CPU ({t['gpu_speedup']:g})")
    add("--regression-threshold", type=float, default=t["regression_percent"], metavar="P",
        help=f"percent that throughput may fall below the previous report's ({t['regression_percent']:g})")
    add("--skip", action="append", default=[], metavar="GATE", help="do not run this gate; may be given again")
    add("--min-executed", type=int, default=1, metavar="N", help="exit 12 if fewer gates ran (1)")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Run the gates, print the report, return 0; a failed gate is raised as GateError, too few as MeasureError."""
    _check(args)
    choice = choose_device(args.device)
    say_overrides(_say)
    precision = args.precision or choice.precision
    if choice.kind == "cpu" and precision == "bf16":
        raise UnavailableError("--precision", "fp32 on the CPU", "bf16", "leave it out, or use a GPU")
    previous = None if args.previous_report is None else previous_throughput(args.previous_report)
    with ExitStack() as files:
        source = files.enter_context(open_model(args.model))
        other = None if args.against is None else files.enter_context(open_model(args.against))
        if other is not None:
            check_shapes(source.config, other.config, f"{args.model} and {args.against}", PARAMS)
        golden = None if args.golden is None else read_logits(args.golden, source.config)

        def make(of: ModelSource, kind: str) -> Engine:
            return _engine(of, kind, choice, precision)

        def uploads(engine: Engine) -> list[tuple[str, TensorFault | None]]:
            assert isinstance(engine, CudaEngine)
            return list(byte_faults(engine.net, source))

        subject = Subject(source, prompter_of(source), choice.kind, precision, make, uploads, other, golden, previous,
                          args.assert_tps, args.assert_gpu_speedup, args.regression_threshold)
        report = run_gates(str(args.model), choice.kind, precision, Gates(subject).by_name, args.skip,
                           args.min_executed)
    _print(report, args.json)
    report.require()
    return 0


def _engine(source: ModelSource, kind: str, choice: Choice, precision: str) -> Engine:
    """An engine for CONTEXT tokens, without the start gate: the gates here say more."""
    size = min(CONTEXT, source.config.max_position_embeddings)
    if kind == "cuda":
        return CudaEngine(source, Device(choice.ordinal, warn=_say), precision, 1, size)
    return CpuEngine(source.config, load_params(source), 8, size)


def _check(args: argparse.Namespace) -> None:
    for name, value in (("--assert-tps", args.assert_tps), ("--assert-gpu-speedup", args.assert_gpu_speedup),
                        ("--regression-threshold", args.regression_threshold)):
        require(name, value, "0 or more, finite", value is None or 0 <= value < math.inf, "command line")
    known = (*NAMES, *NOT_APPLICABLE)
    require("--min-executed", args.min_executed, f"from 1 to {len(NAMES)}", 1 <= args.min_executed <= len(NAMES),
            "command line")
    for name in args.skip:
        if name not in known:
            raise ConfigError("--skip", "the name of a gate", repr(name), did_you_mean(name, known))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print(report: QaReport, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plain(report.plain())), flush=True)
        return
    print(f"{'gate':24}{'status':9}{'value':>12}{'threshold':>12}{'ms':>10}  message")
    for g in report.gates:
        value, threshold = ("" if x is None else f"{x:.4g}" for x in (g.value, g.threshold))
        print(f"{g.name:24}{g.status:9}{value:>12}{threshold:>12}{g.duration_ms:10.0f}  {one_line(g.message, 160)}")
    print(f"{'passed' if report.passed else 'NOT PASSED'}: {len(report.executed)} gates ran, {len(report.failed)} of "
          f"them failed, {len(report.gates) - len(report.executed)} did not run [{report.device}, {report.precision}]",
          flush=True)
