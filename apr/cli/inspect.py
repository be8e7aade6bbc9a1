"""`apr inspect`: a description of a file or folder, for people or as JSON."""

import argparse
import json
from pathlib import Path
from typing import Any

from apr.errors import one_line
from apr.tools.inspect_file import inspect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("path", type=Path, help=".apr, .safetensors, tokenizer.json, .bin; "
                                                "or a run, checkpoint, model, shard or tokenizer folder")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Print what is there."""
    found = inspect(args.path)
    if args.json:
        print(json.dumps(found))
        return 0
    tensors = found.pop("tensors", [])
    for key, value in found.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, item in value.items():
                print(f"  {name:28} {_short(item)}")
        elif key == "facts":
            print("facts:", *(f"  {one_line(fact)}" for fact in value), sep="\n")
        else:
            print(f"{key:14} {_short(value)}")
    if tensors:
        print(f"tensors        {len(tensors)}, {sum(t['bytes'] for t in tensors):,} bytes")
        for t in tensors:
            print(f"  {t['dtype']:5} {'x'.join(map(str, t['shape'])) or 'scalar':16} {one_line(t['name'])}")
    return 0


def _short(value: Any) -> str:
    return one_line(value if isinstance(value, str) else json.dumps(value), 200)
