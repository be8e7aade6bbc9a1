"""The prompts of `apr run`: from the command line, stdin, or a file of lines or JSONL."""

import argparse
import sys
from pathlib import Path
from typing import Any

from apr.errors import ConfigError, FormatError
from apr.files import read_bytes
from apr.infer.prompt import Prompter
from apr.strict import parse_json

MAX_BYTES = 4 * 2**20  # of a prompt from stdin, and of a line
MAX_FILE = 64 * 2**20
Prompt = str | list[dict[str, Any]]  # a text, or messages


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts that the arguments name, at least one.

    Raises ConfigError: two sources, nothing, not UTF-8; FormatError naming the line of a bad file.
    """
    if args.prompts is not None:
        if args.prompt is not None:
            raise ConfigError("command line", "PROMPT or --prompts", "both", "give one")
        return _from_file(args.prompts)
    text = _stdin() if args.prompt in (None, "-") else args.prompt
    where = "stdin" if args.prompt in (None, "-") else "PROMPT"
    if not text:
        raise ConfigError(where, "a prompt", "an empty one", "write something for the model to continue")
    if not is_utf8(text):
        raise ConfigError(where, "UTF-8", "other bytes", "convert it")
    return [text]


def encode_prompts(prompts: list[Prompt], prompter: Prompter, raw: bool, system: str | None) -> list[list[int]]:
    """Token ids: by the chat template if there is one and not `raw`; `system` goes before the messages of each.

    Raises ConfigError for messages or `system` where the template is not used, and for a prompt of no tokens.
    """
    if raw or prompter.template is None:
        if system is not None or any(not isinstance(p, str) for p in prompts):
            why = "--raw" if raw else "a model without a chat template"
            raise ConfigError("--system" if system is not None else "prompts", "plain text for " + why,
                              "messages", "leave out " + ("--raw" if raw else "--system and messages"))
        out = [prompter.raw(p) for p in prompts if isinstance(p, str)]
    else:
        before = [] if system is None else [{"role": "system", "content": system}]
        out = prompter.chat([before + ([{"role": "user", "content": p}] if isinstance(p, str) else p)
                             for p in prompts])
    for number, ids in enumerate(out):
        if not ids:
            raise ConfigError(f"prompt {number + 1}", "at least one token", "none", "write something to continue")
    return out


def is_utf8(text: str) -> bool:
    """Whether a command-line argument was UTF-8: Python keeps other bytes as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("PROMPT", "a prompt, or text on stdin", "neither", "give one: apr run MODEL 'some text'")
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError("stdin", f"at most {MAX_BYTES} bytes", "more", "shorten the prompt")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError("stdin", "UTF-8", f"byte 0x{data[e.start]:02x} at offset {e.start}", "convert it") from None


def _from_file(path: Path) -> list[Prompt]:
    data = read_bytes(path, MAX_FILE)
    lines = [(n, line.removesuffix(b"\r")) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise FormatError(str(path), "a prompt on each line", "an empty file", "write prompts into it")
    as_json = path.suffix in (".jsonl", ".json")
    return [_line(line, f"{path} line {number}", as_json) for number, line in lines]


def _line(line: bytes, where: str, as_json: bool) -> Prompt:
    if len(line) > MAX_BYTES:
        raise FormatError(where, f"at most {MAX_BYTES} bytes", f"{len(line)}", "shorten the prompt")
    if not as_json:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as e:
            raise FormatError(where, "UTF-8", f"byte 0x{line[e.start]:02x} at offset {e.start}",
                              "convert it") from None
    value = parse_json(line, where, MAX_BYTES)
    if isinstance(value, dict):
        text, messages = value.get("prompt"), value.get("messages")
        if isinstance(text, str) and text and messages is None:
            return text
        if isinstance(messages, list) and messages and text is None and all(_is_message(m) for m in messages):
            return messages
    raise FormatError(where, '{"prompt": "text"} or {"messages": [{"role": "user", "content": "text"}]}',
                      line.decode("utf-8", "replace")[:80], "correct the line")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value
