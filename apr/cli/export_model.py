"""`apr export`: a model becomes a Hugging Face folder, a GGUF file or a safetensors file."""

import argparse
import json
from pathlib import Path
from typing import Any

from apr.cli.progress import counting
from apr.errors import ConfigError, one_line
from apr.formats.export import export_gguf, export_hf, export_safetensors
from apr.formats.open_model import open_model
from apr.formats.source import ModelSource
from apr.params import parameter_count

DTYPES = {None: None, "f32": "F32", "bf16": "BF16", "f16": "F16", "q8_0": "Q8_0"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument
    add("model", type=Path, help=".apr or .gguf file, Hugging Face folder, checkpoint or run")
    add("--format", choices=["hf", "gguf", "safetensors"], required=True,
        help="hf: a folder that transformers loads; safetensors: the weights alone")
    add("-o", "--output", type=Path, required=True, metavar="PATH", help="the folder or file to make")
    add("--dtype", choices=[d for d in DTYPES if d], help="type of the weights (default: as they are stored)")
    add("--json", action="store_true", help="print the result as one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Export; prints what was understood, and what was written."""
    if args.dtype == "q8_0" and args.format != "gguf":
        raise ConfigError("--dtype q8_0", "--format gguf", f"--format {args.format}", "take bf16, or --format gguf")
    dtype, facts = DTYPES[args.dtype], list[str]()
    with open_model(args.model) as source, counting("exporting", 2 * len(source.shapes)) as done:
        if args.format == "hf":
            files = export_hf(source, args.output, dtype, done=done)
        elif args.format == "safetensors":
            files = export_safetensors(source, args.output, dtype, done)
        else:
            files, facts = export_gguf(source, args.output, dtype, done)
        report(source, args.output, args.format, dtype, files, [*source.facts, *facts], args.json)
    return 0


def report(source: ModelSource, output: Path, kind: str, dtype: str | None, files: list[str], facts: list[str],
           as_json: bool) -> None:
    """Print what was read and written: lines for people, or one line of JSON."""
    result: dict[str, Any] = {"source": str(source.path), "source_format": source.format, "output": str(output),
                              "format": kind, "dtype": dtype, "tensors": len(source.shapes),
                              "parameters": parameter_count(source.config), "files": files, "facts": facts}
    if as_json:
        print(json.dumps(result), flush=True)
        return
    for fact in facts:
        print(one_line(fact))
    print(one_line(f"wrote {output}: {len(source.shapes)} of {len(source.shapes)} tensors, "
                   f"{result['parameters']:,} parameters, {'as stored' if dtype is None else dtype}"), flush=True)
