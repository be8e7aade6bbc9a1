"""`apr import`: a Hugging Face folder, GGUF file, checkpoint or model of the hub becomes an .apr file."""

import argparse
import os
from pathlib import Path

from apr.cli.export_model import DTYPES, report
from apr.cli.hub import download, looks_like_a_name
from apr.cli.progress import counting
from apr.errors import ConfigError
from apr.formats.export import export_apr
from apr.formats.open_model import open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument
    add("source", help="Hugging Face folder, .gguf or .apr file, checkpoint, run, or OWNER/NAME of the hub")
    add("-o", "--output", type=Path, required=True, metavar="X.apr", help="the file to make")
    add("--dtype", choices=[d for d in DTYPES if d != "q8_0"], help="type of the weights (default: as they are stored)")
    add("--revision", help="branch, tag or commit of a model of the hub")
    add("--json", action="store_true", help="print the result as one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Import; prints what was understood, and from where."""
    if os.path.lexists(args.output):
        raise ConfigError(str(args.output), "a path that does not exist yet", "something there",
                          "choose another --output")
    path, name, facts = Path(args.source), None, []
    if not os.path.lexists(path) and looks_like_a_name(args.source):
        path, name = download(args.source, args.revision), args.source
        facts.append(f"{name} from the hub, revision {path.name}")
    elif args.revision is not None:
        raise ConfigError("--revision", "a model of the hub", f"the path {args.source}", "leave it out")
    with open_model(path) as source, counting("importing", 2 * len(source.shapes)) as done:
        files = export_apr(source, args.output, DTYPES[args.dtype], name, done)
        report(source, args.output, "apr", DTYPES[args.dtype], files, [*facts, *source.facts], args.json)
    return 0
