"""`apr tokenize`: text to token shards."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from apr.data.shards import TOKENS_PER_SHARD, write_shards
from apr.data.text import documents
from apr.data.tokenizer import Tokenizer
from apr.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add = parser.add_argument
    add("input", nargs="+", type=Path, help="text files, JSONL, Parquet, or folders of them (source trees)")
    add("--output", metavar="DIR", type=Path, required=True, help="the folder of shards to make")
    add("--tokenizer", metavar="PATH", type=Path,
        help="tokenizer to use; without it one of --vocab-size is trained on the text")
    add("--vocab-size", type=int, metavar="N", help="entries of the tokenizer to train")
    add("--shard-tokens", type=int, metavar="N", default=TOKENS_PER_SHARD,
        help=f"tokens per shard ({TOKENS_PER_SHARD})")
    add("--content-field", metavar="NAME", default="content",
        help="field of the text in JSONL and Parquet rows (content)")
    add("--json", action="store_true", help="print the result as a line of JSON")


def run(args: argparse.Namespace) -> int:
    """Tokenize; prints where the shards are and how many tokens they hold."""
    if (args.tokenizer is None) == (args.vocab_size is None):
        raise ConfigError("apr tokenize", "one of --tokenizer and --vocab-size", "both or neither", "give one")
    if args.vocab_size is not None and not 257 <= args.vocab_size <= 2**20:
        raise ConfigError("--vocab-size", "257 (every byte and an end) to 1048576", str(args.vocab_size), "correct it")
    if args.shard_tokens < 1:
        raise ConfigError("--shard-tokens", "at least 1", str(args.shard_tokens), "correct it")
    if args.output.exists():
        raise ConfigError(str(args.output), "a folder that does not exist yet", "something there",
                          "choose another --output")
    skipped: Counter[str] = Counter()
    if args.tokenizer is not None:
        tokenizer = Tokenizer.load(args.tokenizer)
    else:
        tokenizer = Tokenizer.train(documents(args.input, args.content_field, Counter()), args.vocab_size)
    texts = documents(args.input, args.content_field, skipped)
    console = Console(stderr=True)
    columns = (TextColumn("{task.fields[done]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, done="")

        def show(docs: int, tokens: int) -> None:
            progress.update(task, done=f"{docs:,} documents, {tokens:,} tokens")

        manifest = write_shards(args.output, tokenizer.encode_stream(texts), tokenizer, args.shard_tokens, show)
    result = {"output": str(args.output), "documents": manifest["documents"], "tokens": manifest["token_count"],
              "vocab_size": tokenizer.vocab_size, "shards": len(manifest["shards"]),
              "tokenizer_sha256": tokenizer.sha256, "skipped": dict(skipped)}
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{args.output}: {result['documents']:,} documents, {result['tokens']:,} tokens "
              f"in {result['shards']} shards, vocabulary {tokenizer.vocab_size:,}")
        if skipped:
            print("passed over: " + ", ".join(f"{n} {why}" for why, n in sorted(skipped.items())), file=sys.stderr)
    return 0
