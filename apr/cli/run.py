"""`apr run MODEL [PROMPT]`: generate text. What the model writes goes to stdout as it comes, all else to stderr."""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from apr.cli.prompts import encode_prompts, is_utf8, read_prompts
from apr.config import Sampling, TransformerConfig, require
from apr.errors import ConfigError
from apr.formats.open_model import open_model
from apr.formats.source import ModelSource
from apr.infer.engine import Engine
from apr.infer.generate import Completion, Generation
from apr.infer.prompt import Prompter, open_prompter
from apr.params import parameter_count
from apr.paths import override_record, say_overrides
from apr.tools.device import Choice, choose_device
from apr.tools.load import load_engine

BATCH = 8  # prompts at a time, unless --batch-size says otherwise
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="the model, with its tokenizer")
    add("prompt", nargs="?", metavar="PROMPT", help="what to continue or to answer; '-' or none: stdin")
    add("--prompts", type=Path, metavar="FILE",
        help='a prompt per line; in a .jsonl file {"prompt": ...} or {"messages": [...]}')
    add("--system", metavar="TEXT", help="a system message before each prompt (needs a chat template)")
    add("--raw", action="store_true", help="give the prompt as it is, without the model's chat template")
    add("--max-tokens", type=int, default=128, metavar="N", help="tokens to generate, at most (128)")
    add("--temperature", type=float, default=0.0, metavar="X", help="0: always the likeliest token (0)")
    add("--top-k", type=int, default=0, metavar="N", help="draw from the N likeliest tokens; 0: all (0)")
    add("--top-p", type=float, default=1.0, metavar="X", help="draw from the likeliest that hold this much (1)")
    add("--seed", type=int, default=0, metavar="N", help="the draws' seed; the same one gives the same text (0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again")
    add("--device", metavar="D", help="cpu, cuda, cuda:N or auto (auto, or APR_DEVICE)")
    add("--no-gpu", action="store_true", help="the same as --device cpu")
    add("--precision", choices=["fp32", "bf16"], help="of weights and arithmetic (GPU: bf16, CPU: fp32)")
    add("--batch-size", type=int, metavar="N", help=f"prompts at a time (all, {BATCH} at most)")
    add("--context", type=int, metavar="N", help="longest sequence, prompt included (what the prompts need)")
    add("--json", action="store_true", help="print one line of JSON per prompt instead of text")


def run(args: argparse.Namespace) -> int:
    """Generate; returns 0, or 130 after Ctrl-C, what there is so far having been printed."""
    if args.no_gpu and args.device not in (None, "cpu"):
        raise ConfigError("--no-gpu", f"no other device, or only --device {args.device}", "both", "give one")
    _check_numbers(args)
    choice = choose_device("cpu" if args.no_gpu else args.device)
    say_overrides(_say)
    with open_model(args.model) as source:
        prompter = open_prompter(source)
        sampling = Sampling(vocab=prompter.tokenizer.vocab_size, temperature=args.temperature, top_k=args.top_k,
                            top_p=args.top_p, seed=args.seed)
        prompts = encode_prompts(read_prompts(args), prompter, args.raw, args.system)
        engine = _engine(args, source, choice, prompts)
    generation = Generation(engine, prompter.tokenizer, prompts, sampling, max_tokens=args.max_tokens,
                            eos=prompter.eos, stop=args.stop)
    facts = _facts(args.model, source, prompter, engine)
    printer = _JsonPrinter(facts) if args.json else _TextPrinter(facts, len(prompts))
    try:
        for piece in generation:
            printer.take(piece.index, piece.text, piece.completion)
    except KeyboardInterrupt:
        printer.interrupted(generation.completions())
        return INTERRUPTED
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    where = "command line"
    require("--max-tokens", args.max_tokens, "at least 1", args.max_tokens >= 1, where)
    require("--batch-size", args.batch_size, "at least 1", args.batch_size is None or args.batch_size >= 1, where)
    for text in args.stop:
        require("--stop", text, "a text in UTF-8 that is not empty", bool(text) and is_utf8(text), where)
    require("--system", args.system, "UTF-8", args.system is None or is_utf8(args.system), where)
    Sampling(vocab=1, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed)


def _engine(args: argparse.Namespace, source: ModelSource, choice: Choice, prompts: list[list[int]]) -> Engine:
    size = _context(args, source.config, max(map(len, prompts)))
    for number, ids in enumerate(prompts, 1):
        if len(ids) > size:
            raise ConfigError(f"prompt {number}", f"at most {size} tokens, the context", f"{len(ids)}",
                              "shorten it" + (" or raise --context" if size < source.config.max_position_embeddings
                                              else ""))
    batch = min(len(prompts), args.batch_size or BATCH)
    return load_engine(source, choice, args.precision or choice.precision, batch, size, _say)


def _context(args: argparse.Namespace, config: TransformerConfig, longest: int) -> int:
    limit = config.max_position_embeddings
    if args.context is None:
        return min(limit, longest + args.max_tokens)
    require("--context", args.context, f"from 1 to {limit}, the model's", 1 <= args.context <= limit, "command line")
    return int(args.context)


def _facts(path: Path, source: ModelSource, prompter: Prompter, engine: Engine) -> dict[str, Any]:
    return {"model": str(path), "format": source.format, "family": source.config.hf_model_type,
            "parameters": parameter_count(source.config), "tokenizer_sha256": prompter.tokenizer.sha256,
            "device": engine.device, "precision": engine.precision, "path": dict(engine.path),
            "gate": dict(engine.gate), **override_record()}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _TextPrinter:
    """Text as it comes; of several prompts one after the other, each under a line with its number."""

    def __init__(self, facts: dict[str, Any], count: int) -> None:
        self.facts, self.count, self.now = facts, count, 0
        self.waiting = [""] * count
        self.ended: list[Completion | None] = [None] * count
        self.line_open = False
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        self._head()

    def take(self, index: int, text: str, completion: Completion | None) -> None:
        """A piece; printed when those before have ended."""
        self.waiting[index] += text
        self.ended[index] = completion
        while self.now < self.count:
            self._write(self.waiting[self.now])
            self.waiting[self.now] = ""
            done = self.ended[self.now]
            if done is None:
                return
            self._end(done)
            self.now += 1
            self._head()

    def interrupted(self, _completions: list[Completion]) -> None:
        """End the line."""
        if self.line_open:
            self._write("\n")
        _say("interrupted")

    def _head(self) -> None:
        if 1 < self.count > self.now:
            self._write(f"--- prompt {self.now + 1}\n")

    def _end(self, c: Completion) -> None:
        if self.line_open or not c.text:
            self._write("\n")
        first = "no token" if c.ttft_s is None else f"first token after {c.ttft_s * 1e3:,.0f} ms"
        _say(f"{c.prompt_tokens} prompt tokens ({c.prefill_tok_s:,.0f} tok/s), {first}, then {len(c.tokens)} in all at "
             f"{c.decode_tok_s:,.1f} tok/s; end: {c.finish_reason} [{self.facts['device']}, {self.facts['precision']}]")

    def _write(self, text: str) -> None:
        if not text:
            return
        if sys.stdout.isatty():  # what a model writes is not to be trusted with a terminal
            text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        sys.stdout.write(text)
        sys.stdout.flush()
        self.line_open = not text.endswith("\n")


class _JsonPrinter:
    """A line of JSON for each prompt, in order of their ends."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.printed: set[int] = set()

    def take(self, index: int, _text: str, completion: Completion | None) -> None:
        """A piece; printed is only the end."""
        if completion is not None:
            self._print(index, completion)

    def interrupted(self, completions: list[Completion]) -> None:
        """What the others have so far."""
        for index, completion in enumerate(completions):
            if index not in self.printed:
                self._print(index, completion)

    def _print(self, index: int, c: Completion) -> None:
        self.printed.add(index)
        line = {"index": index, "text": c.text, "tokens": list(c.tokens), "finish_reason": c.finish_reason,
                "prompt_tokens": c.prompt_tokens, "ttft_ms": None if c.ttft_s is None else round(c.ttft_s * 1e3, 3),
                "prefill_tok_s": round(c.prefill_tok_s, 1), "decode_tok_s": round(c.decode_tok_s, 2), **self.facts}
        print(json.dumps(line), flush=True)
