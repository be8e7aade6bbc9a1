"""`apr COMMAND …`: dispatch, and the one place where errors become a line and an exit code.

Results go to stdout, progress and messages to stderr. Commands are imported when they are called, so that `apr --help`
is quick and a command's optional packages are its own.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from apr import __version__
from apr.errors import AprError, ConfigError, DeviceFault, OutOfMemoryError, one_line
from apr.files import os_error
from apr.paths import environment

COMMANDS = {
    "pretrain": "train a model on text or token shards",
    "run": "generate text with a model",
    "tokenize": "turn text, source trees, JSONL or Parquet into token shards",
    "import": "turn a Hugging Face folder, a GGUF file or a model of the hub into an .apr file",
    "export": "turn a model into a Hugging Face folder, a GGUF file or a safetensors file",
    "inspect": "show what a model file, checkpoint, run, tokenizer or shard folder holds, and verify it",
    "parity": "hold a model's scores against the reference's, another file's or given ones, at every position",
    "trace": "show what a model computes at every point: statistics, tensors, differences from another run",
    "bisect": "name the first stage where the GPU departs from the reference, and the likely cause",
    "qa": "run the gates that a model must pass before it is used, and report each",
    "plan": "show the GPU memory that training a model takes, and whether it fits",
    "contracts": "validate, list, show and falsify what each part promises, and say what is proven",
    "cache": "list, explain, verify, fill or empty the cache of compiled kernels",
    "bench": "measure training steps, their ops and generation on this machine's GPU",
    "doctor": "show what this machine has of what apr needs, and what can be done with it",
}
MODULES = {"import": "import_model", "export": "export_model"}  # where it is not the command's own name


class Parser(argparse.ArgumentParser):
    """argparse with apr's kind of error: one line, exit code 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError("command line", "valid arguments", message, f"see '{self.prog} --help'")


def module(command: str) -> Any:
    """The module of one command, loaded: its `add_arguments` and `run`."""
    return importlib.import_module(f"apr.cli.{MODULES.get(command, command)}")


def build(command: str) -> Parser:
    """The parser of one command, its module loaded."""
    parser = Parser(prog=f"apr {command}", description=COMMANDS[command], allow_abbrev=False)
    module(command).add_arguments(parser)
    return parser


def _overview() -> Parser:
    parser = Parser(prog="apr", description="Decoder language models, trained, checked and run without PyTorch.",
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="commands:\n" + "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
                    + "\n\n'apr COMMAND --help' shows a command's flags. Exit codes: apr/errors.py.")
    parser.add_argument("--version", action="version", version=f"apr {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_trace = False
    try:
        show_trace = environment().get("APR_TRACEBACK") == "1"
        command = _overview().parse_args(arguments[:1]).command
        args = build(command).parse_intermixed_args(arguments[1:])
        return int(module(command).run(args) or 0)
    except DeviceFault as e:  # nothing may ask CUDA for anything again, not even to give memory back
        code = _fail(e)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except AprError as e:
        return _fail(e)
    except BrokenPipeError:  # the reader of our output has gone; nothing is left to say, to anyone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 7
    except OSError as e:
        return _fail(os_error(str(e.filename or "input/output"), e))
    except MemoryError as e:
        return _fail(OutOfMemoryError("memory", "enough for this model and batch", one_line(str(e)) or "none left",
                                      "lower --batch-size, --seq-length or --context"))
    except KeyboardInterrupt:
        return 130
    except Exception as e:
        if show_trace:
            traceback.print_exc()
        return _fail(AprError("internal error", "no such thing", f"{type(e).__name__}: {e}",
                              "this is a defect of apr; APR_TRACEBACK=1 shows where"))


def _fail(error: AprError) -> int:
    print(f"apr: {error}", file=sys.stderr)
    return error.exit_code
