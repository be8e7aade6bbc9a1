"""`apr cache`: the kernel cache listed, explained, verified, filled ahead of a run, or emptied."""

import argparse
import json
import sys
from typing import Any

from apr.buffers import STORAGE
from apr.driver import probe
from apr.errors import ConfigError, IntegrityError, one_line
from apr.presets import preset
from apr.ptx_cache import arch_of
from apr.tools.kernel_cache import ARCHS, difference, find, ingredients, open_store, rows, verify, warm

ACTIONS = {"list": "every entry: key, size, kernels with their registers, time to compile",
           "explain": "what a key was made of; of two keys, where they differ",
           "verify": "check every entry, and that its constants are in its code; exit 6 if one is bad",
           "warm": "compile what a preset needs, which takes no GPU",
           "clear": "remove every entry, and what killed processes left"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(f"  {name:8} {text}" for name, text in ACTIONS.items())
    parser.add_argument("action", choices=list(ACTIONS), metavar="|".join(ACTIONS))
    parser.add_argument("key", nargs="*", help="explain: one key or two, or parts of them that no other key has")
    parser.add_argument("--preset", help="warm: the model")
    parser.add_argument("--precision", choices=list(STORAGE), help="warm: default both")
    parser.add_argument("--arch", help=f"warm: as sm_90a (default: the GPU's, or {', '.join(ARCHS)} without one)")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")


def run(args: argparse.Namespace) -> int:
    """Do it. Raises IntegrityError after `verify` has listed a bad entry."""
    if (len(args.key) not in (1, 2)) if args.action == "explain" else args.key:
        raise ConfigError("apr cache", "one or two keys after 'explain', none after the others",
                          f"{len(args.key)} after '{args.action}'", "see 'apr cache --help'")
    if args.action != "warm" and (args.preset or args.precision or args.arch):
        raise ConfigError("apr cache", "--preset, --precision and --arch with 'warm' alone", f"'{args.action}'",
                          "drop them")
    {"list": _list, "explain": _explain, "verify": _verify, "warm": _warm, "clear": _clear}[args.action](args)
    return 0


def _say(args: argparse.Namespace, row: dict[str, Any], text: str) -> None:
    print(json.dumps(row) if args.json else one_line(text), flush=True)


def _list(args: argparse.Namespace) -> None:
    store, count, total = open_store(), 0, 0
    for row in rows(store):
        count, total = count + 1, total + row["bytes"]
        kernels = ", ".join(f"{name} {registers}" for name, registers in row["entries"].items())
        _say(args, row, f"{row['key']}  " + (row["problem"] or f"{row['bytes'] / 1000:.1f} kB, "
                                             f"{row['milliseconds']} ms, registers: {kernels}"))
    if not args.json:
        print(f"{count} entries, {total / 1000:.1f} kB, in {store.path}")


def _explain(args: argparse.Namespace) -> None:
    store = open_store()
    entries = [find(store, text) for text in args.key]
    if len(entries) == 1:
        fields = ingredients(entries[0])
        _say(args, {"key": entries[0].key, "fields": fields}, entries[0].key)
        for name, value in fields.items() if not args.json else ():
            print(one_line(f"  {name:14} {value}"))
        return
    differs = difference(*entries)
    if args.json:
        print(json.dumps({"keys": [e.key for e in entries], "differ": differs}))
        return
    for name, (a, b) in differs.items():
        print(one_line(f"{name:14} {a or '-'}  ->  {b or '-'}"))
    if not differs:
        print("the same key")


def _verify(args: argparse.Namespace) -> None:
    store, bad, count = open_store(), 0, 0
    for key, problem in verify(store):
        count, bad = count + 1, bad + bool(problem)
        if args.json or problem:
            _say(args, {"key": key, "problem": problem}, f"{key}: {problem}")
    if bad:
        raise IntegrityError(f"kernel cache {store.path}", "sound entries", f"{bad} of {count} bad",
                             "'apr cache clear' removes them; a run builds them again by itself")
    if not args.json:
        print(f"{count} entries, all sound, in {store.path}")


def _warm(args: argparse.Namespace) -> None:
    if args.preset is None:
        raise ConfigError("apr cache warm", "--preset NAME", "none", "name the model to warm for")
    archs = [args.arch] if args.arch else sorted({arch_of(d.capability) for d in probe().devices}) or list(ARCHS)
    storages = [STORAGE[p] for p in ([args.precision] if args.precision else STORAGE)]
    config = preset(args.preset)
    for row in warm([(config, s) for s in storages], archs, lambda text: print(one_line(text), file=sys.stderr)):
        _say(args, row, f"{row['arch']}: {row['modules']} modules, {row['compiled']} compiled, {row['found']} found, "
                        f"{row['bytes'] / 1000:.1f} kB")


def _clear(args: argparse.Namespace) -> None:
    store = open_store()
    entries, leftovers = store.clear()
    _say(args, {"entries": entries, "leftovers": leftovers, "path": str(store.path)},
         f"removed {entries} entries and {leftovers} leftovers from {store.path}")
