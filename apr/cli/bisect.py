"""`apr bisect`: the first stage where the GPU departs from the reference, how, and why."""

import argparse
import json
import sys
from pathlib import Path

from apr.device import Device
from apr.errors import GateError, UnavailableError, one_line
from apr.formats.open_model import open_model
from apr.formats.source import ModelSource
from apr.infer.cuda_engine import CudaEngine
from apr.tools.bisect import LONGER, Bisection, Finding, Phase
from apr.tools.device import choose_device
from apr.tools.subjects import EngineSubject, TrainerSubject

PRECISIONS = {"fp32": ("fp32",), "bf16": ("bf16",), "both": ("fp32", "bf16")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("model", type=Path, help=".apr file, Hugging Face folder or GGUF file")
    parser.add_argument("--train", action="store_true",
                        help="forward, loss, backward and optimizer, instead of prompt and decoding")
    parser.add_argument("--device", help="cuda or cuda:N (default: cuda)")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="both", help="default: both, fp32 first")
    parser.add_argument("--seed", type=int, default=0, help="of the token ids (default: 0)")
    parser.add_argument("--all", action="store_true", help="go on after the first finding")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each precision")


def run(args: argparse.Namespace) -> int:
    """Search. Raises GateError when something was found, UnavailableError without a GPU."""
    choice = choose_device(args.device or "cuda")
    if choice.kind != "cuda":
        raise UnavailableError("--device", "a GPU to hold against the reference", choice.text, "use --device cuda")
    with open_model(args.model) as source:
        for precision in PRECISIONS[args.precision]:
            bisection = _search(source, Device(choice.ordinal, warn=_warn), precision, args)
            if args.json:
                print(json.dumps(bisection.report()), flush=True)
            for finding in bisection.findings if not args.json else ():
                print(_text(finding))
            if bisection.findings:
                first = bisection.findings[0]
                raise GateError(f"{first.phase} {first.stage} ({precision})",
                                f"the GPU within {first.limit:g} of the reference" if first.limit else
                                "exactly what the file and the reference have",
                                f"relative L2 {first.relative_l2:.3g}: {first.cause.text}",
                                f"see contracts/{first.contract}.yaml")
    return 0


def _search(source: ModelSource, device: Device, precision: str, args: argparse.Namespace) -> Bisection:
    def say(phase: Phase) -> None:
        if not args.json:
            worst = f"worst {phase.worst:.2e} at {phase.worst_stage}" if phase.worst_stage else ""
            found = f"{len(phase.findings)} wrong" if phase.findings else "all right"
            print(f"{precision}  {phase.name:18} {phase.checks:5} checks  {found:10} {phase.seconds:7.2f} s  {worst}",
                  flush=True)

    if args.train:
        trainer = TrainerSubject(source, device, precision)
        bisection = Bisection(source, trainer, args.seed, args.all, say)
        bisection.training(trainer)
    else:
        context = min(source.config.max_position_embeddings, LONGER)
        engine = EngineSubject(CudaEngine(source, device, precision, 1, context))
        bisection = Bisection(source, engine, args.seed, args.all, say)
        bisection.inference(engine)
    return bisection


def _text(finding: Finding) -> str:
    return one_line(f"{finding.phase} {finding.stage}: {finding.cause.text} [{finding.cause.kind}]; relative L2 "
                    f"{finding.relative_l2:.3g} (limit {finding.limit:g}), scale {finding.scale:.6f}, largest "
                    f"difference {finding.max_abs:.3g}, {finding.not_finite} not finite; breaks {finding.contract}")


def _warn(line: str) -> None:
    print(line, file=sys.stderr)
