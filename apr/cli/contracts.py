"""`apr contracts`: what each part promises, checked against the code; falsifiers executed; what that has proven."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from apr.cli.progress import counting
from apr.contract import Contract, Falsifier, OpContract, load_all
from apr.driver import cuda_problems, probe
from apr.errors import ConfigError, FormatError, GateError, MeasureError, NotFoundError, UnavailableError, did_you_mean
from apr.errors import one_line as clean
from apr.paths import contracts_dir
from apr.tools.contracts import checkout, fits, validate
from apr.tools.falsify import FAULTS, NOT_RUN, SUITES, Outcome, count, falsify, resting, select
from apr.tools.receipts import STANDINGS, Standing, digest, machine, standings, write_receipt

ACTIONS = {"validate": "check every file, and that the code has its mutants' texts, tests and parameters; else exit 4",
           "list": "every contract: how many falsifiers, and what they have proven",
           "show": "one contract, and the last outcome of each falsifier",
           "falsify": "apply every mutant (or those of these contracts and ids) in a copy, run its test; exit 5 if one "
                      "survives",
           "status": "what the receipts of the runs prove of each contract: " + ", ".join(STANDINGS)}
OF_FALSIFY = ("cpu", "gpu", "workers", "receipt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(f"  {name:9} {text}" for name, text in ACTIONS.items())
    parser.add_argument("action", choices=list(ACTIONS), metavar="|".join(ACTIONS))
    parser.add_argument("name", nargs="*", help="show: a contract; falsify: contracts, or ids of falsifiers")
    parser.add_argument("--root", type=Path, help="the checkout (default: that of this apr)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--cpu", action="store_true", help="falsify: only what needs no GPU")
    where.add_argument("--gpu", action="store_true", help="falsify: only what needs one (default: also, if it is here)")
    parser.add_argument("--workers", type=_workers, metavar="N", help="falsify: copies at once (default: cores; GPU 6)")
    parser.add_argument("--receipt", type=Path, metavar="FILE", help="falsify: record the outcomes here")
    parser.add_argument("--require", choices=list(STANDINGS), help="status: exit 5 if a contract is less than this")
    parser.add_argument("--json", action="store_true", help="print lines of JSON")


def run(args: argparse.Namespace) -> int:
    """Do it. Raises FormatError after `validate` has listed the faults, GateError after `falsify` and `status`."""
    names = {"show": len(args.name) == 1, "falsify": True}.get(args.action, not args.name)
    if not names:
        raise ConfigError("apr contracts", "one name after 'show', any number after 'falsify', none after the others",
                          f"{len(args.name)} after '{args.action}'", "see 'apr contracts --help'")
    for flag in [f for f in OF_FALSIFY if getattr(args, f) and args.action != "falsify"] + (
            ["require"] if args.require and args.action != "status" else []):
        raise ConfigError("apr contracts", f"--{flag} with '{'status' if flag == 'require' else 'falsify'}' alone",
                          f"'{args.action}'", "drop it")
    {"validate": _validate, "list": _list, "show": _show, "falsify": _falsify, "status": _status}[args.action](args)
    return 0


def _workers(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 256):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 256")
    return int(text)


def _say(args: argparse.Namespace, row: dict[str, Any], text: str) -> None:
    print(json.dumps(row) if args.json else clean(text), flush=True)


def _here(args: argparse.Namespace) -> tuple[tuple[Contract, ...], dict[str, Standing]]:
    """The contracts and their standings; those of an installed package too, where nothing was run."""
    folder = contracts_dir() if args.root is None else checkout(args.root) / "contracts"
    contracts = load_all(folder)
    return contracts, standings(folder.parent if (folder.parent / "tests").is_dir() else None, contracts)


def _root(args: argparse.Namespace) -> Path:
    return checkout(contracts_dir().parent if args.root is None else args.root)


def _validate(args: argparse.Namespace) -> None:
    contracts, faults = validate(_root(args))
    for fault in faults:
        _say(args, {"where": fault.where, "expected": fault.expected, "found": fault.found, "fix": fault.fix},
             str(fault))
    total = {"contracts": len(contracts), "falsifiers": sum(len(c.falsifiers) for c in contracts),
             "errors": len(faults)}
    _say(args, total, ", ".join(f"{number} {name}" for name, number in total.items()))
    if faults:
        raise FormatError("contracts", "no errors", f"{len(faults)}", "correct what is listed")


def _list(args: argparse.Namespace) -> None:
    contracts, standing = _here(args)
    for c in contracts:
        suites = {name: sum(f.suite == suite for f in c.falsifiers)
                  for name, suite in (("cpu", "cpu"), ("gpu", "gpu"), ("rest", ""))}
        status = standing[c.name].status
        _say(args, {"name": c.name, **suites, "status": status},
             f"{c.name:40} {suites['cpu']:3} CPU {suites['gpu']:3} GPU {suites['rest']:3} resting on others  {status}")


def _show(args: argparse.Namespace) -> None:
    contracts, standing = _here(args)
    by_name = {c.name: c for c in contracts}
    if args.name[0] not in by_name:
        raise NotFoundError(f"contract '{args.name[0]}'", "a contract", "none of that name",
                            did_you_mean(args.name[0], by_name))
    contract, of = by_name[args.name[0]], standing[args.name[0]]
    if args.json:
        rows = [{"id": f.id, "claim": f.claim, "test": f.test, "rests_on": f.rests_on, "outcome": of.outcomes[f.id]}
                for f in contract.falsifiers]
        print(json.dumps({"name": contract.name, "source": contract.source, "symbols": contract.symbols,
                          "equations": contract.equations, "status": of.status, "falsifiers": rows}))
        return
    for line in _described(contract, of):
        print(clean(line))


def _described(contract: Contract, of: Standing) -> list[str]:
    lines = [f"{contract.name}, version {contract.version}: {of.status} ({STANDINGS[of.status]})",
             f"source: {contract.source}"]
    if contract.document:
        lines += [f"document: version {contract.document.version}",
                  *(f"  corrected: {text}" for text in contract.document.corrected)]
    lines += [f"  {symbol}{parameters}" for symbol, parameters in contract.symbols.items()]
    lines += [f"  {name} = {text}" for name, text in contract.equations.items()]
    if isinstance(contract, OpContract):
        for section in ("inputs", "outputs", "backward"):
            lines += [f"  {section}: {name} [{', '.join((*a.shape, a.dtype, a.role))}]"
                      for name, a in getattr(contract, section).items()]
        t = contract.tolerance
        lines += [f"  baked: {', '.join(contract.baked) or 'nothing'}",
                  f"  tolerance: {t.rule} {t.value or t.floor:g}: {t.why}",
                  f"  inputs must include: {'; '.join(contract.inputs_must_include)}"]
    for f in contract.falsifiers:
        lines += [f"{f.id}  {of.outcomes[f.id]}: {f.claim}",
                  f"    {'with ' + f.mutant.file + ' edited, ' if f.mutant else ''}{f.test}" if f.test
                  else f"    rests on {', '.join(f.rests_on)}"]
        lines += [f"    equivalent: {f.equivalent}"] if f.equivalent else []
    return lines


def _falsify(args: argparse.Namespace) -> None:
    root = _root(args)
    if args.receipt is not None and not args.receipt.absolute().parent.is_dir():
        raise NotFoundError(str(args.receipt), "a folder to write it in", "no such folder", "make it first")
    contracts = load_all(root / "contracts")
    chosen = select(contracts, args.name)
    ids = {f.id for f in chosen}
    for fault in (fault for c in contracts if ids & {f.id for f in c.falsifiers} for fault in fits(root, c)):
        raise fault
    outcomes, tested, start, gpu = list[Outcome](), digest(root), time.monotonic(), False
    for suite, falsifiers in _suites(args, chosen).items():
        gpu |= suite == "gpu"
        with counting(f"{suite} falsifiers", len(falsifiers)) as advance:
            found = falsify(root, falsifiers, SUITES[suite], args.workers, advance)
        for o in found:
            reason = o.detail or FAULTS.get(o.outcome, "")
            _say(args, vars(o), f"{o.id}  {o.outcome} in {o.seconds:.1f} s by {o.test}" if o.outcome == "killed"
                 else f"{o.id}  {o.outcome}{': ' if reason else ''}{reason} [{o.test}]")
        outcomes += found
    _conclude(args, chosen, outcomes, tested, time.monotonic() - start, gpu)


def _suites(args: argparse.Namespace, chosen: list[Falsifier]) -> dict[str, list[Falsifier]]:
    """The falsifiers to run, by suite. Raises UnavailableError, and MeasureError if nothing can be run."""
    problems = [] if args.cpu else cuda_problems(probe())
    if args.gpu and problems:
        raise UnavailableError("apr contracts falsify --gpu", "a GPU that can be used", "; ".join(problems),
                               "--cpu runs what needs none")
    wanted = [s for s in SUITES if not (args.cpu and s == "gpu") and not (args.gpu and s == "cpu")
              and not (problems and s == "gpu")]
    suites = {suite: [f for f in chosen if f.suite == suite] for suite in wanted}
    suites = {suite: falsifiers for suite, falsifiers in suites.items() if falsifiers}
    if not suites:
        raise MeasureError("apr contracts falsify", "something to run",
                           f"{len(chosen)} falsifiers, none for {' or '.join(wanted)}", "nothing was measured")
    return suites


def _conclude(args: argparse.Namespace, chosen: list[Falsifier], outcomes: list[Outcome], tested: str,
              seconds: float, gpu: bool) -> None:
    words = {o.id: o.outcome for o in outcomes}
    for f in (f for f in chosen if f.rests_on):
        word = resting(f, words)
        _say(args, {"id": f.id, "outcome": word, "rests_on": f.rests_on}, f"{f.id}  {word}: {', '.join(f.rests_on)}")
    for f in chosen if args.json else ():
        if f.suite and f.id not in words:
            print(json.dumps({"id": f.id, "outcome": NOT_RUN, "test": f.test}))
    counts = count(chosen, words)
    killed, mutants = counts["killed"], counts["mutants"]
    share = f" ({100 * killed / mutants:.1f} %)" if mutants else ""
    rest = ", ".join(f"{word} {n}" for word, n in counts.items() if word not in ("mutants", "killed"))
    _say(args, {**counts, "seconds": round(seconds, 1)},
         f"killed {killed} of {mutants} mutants{share}, {rest}, {seconds:.0f} s")
    if args.receipt is not None:
        if digest(_root(args)) != tested:  # copies are taken when a suite begins
            raise MeasureError(f"{args.receipt}", "one state of the sources during the run", "they have changed",
                               "run it again; no receipt was written")
        write_receipt(args.receipt, machine(probe() if gpu else None), tested, seconds, counts, outcomes)
    if bad := [o for o in outcomes if o.outcome in FAULTS]:
        raise GateError("apr contracts falsify", "every mutant killed or equivalent, every claim held",
                        f"{len(bad)} not: {', '.join(f'{o.id} {o.outcome}' for o in bad[:5])}",
                        "sharpen the test, or say in the contract why no test can see the edit")


def _status(args: argparse.Namespace) -> None:
    contracts, standing = _here(args)
    for c in contracts:
        of = standing[c.name]
        words = list(of.outcomes.values())
        counts = {word: words.count(word) for word in dict.fromkeys(words)}
        _say(args, {"name": c.name, "status": of.status, "outcomes": dict(of.outcomes)},
             f"{c.name:40} {of.status:9} " + ", ".join(f"{n} {word}" for word, n in counts.items()))
    totals = {status: n for status in STANDINGS if (n := sum(s.status == status for s in standing.values()))}
    if not args.json:
        print(", ".join(f"{n} {status}" for status, n in totals.items()))
    order = list(STANDINGS)
    less = [n for n, s in standing.items() if args.require and order.index(s.status) > order.index(args.require)]
    if less:
        raise GateError("apr contracts status", f"every contract {args.require}", f"{len(less)} less: "
                        + ", ".join(f"{n} {standing[n].status}" for n in less[:5]), "'apr contracts falsify --receipt'")
