"""What came of a soak: the ends of its two runs side by side, the verdict on its record, and the tables of it."""

import hashlib
import itertools
import json

import slopes

TIMES = ("tokens_per_sec", "wall_ms", "wall_seconds")
OF_THE_DAY = ("kernel cache", "not saved")  # notes of what befell a run, not of what it trained


def end_state(run):
    """The hashes of what a run came to: parameters, m and v, and the .apr file of each epoch."""
    state = json.loads((max((run / "ckpt").glob("step-????????")) / "state.json").read_text())
    models = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((run / "ckpt").glob("epoch-*.apr"))}
    return {**{key: state[key] for key in ("step", "parameters_sha256", "optimizer_sha256")}, **models}


def log_lines(run):
    """The log without times, and without what tells of starts, of stops and of checks."""
    with open(run / "train.jsonl") as log:
        for line in log:
            try:
                event = json.loads(line)
            except ValueError:
                event = {"event": "no event", "line": line}
            stop = event["event"] == "checkpoint" and "epoch" not in event and event["step"] > 0
            if not (stop or event["event"] in ("start", "resume", "parity")
                    or (event["event"] == "note" and event["text"].startswith(OF_THE_DAY))):
                yield {k: v for k, v in event.items() if k not in TIMES}


def log_difference(one, other):
    """The first line in which two runs' logs differ, '' for none."""
    for number, (a, b) in enumerate(itertools.zip_longest(log_lines(one), log_lines(other))):
        if a != b:
            return f"event {number}: {a} and {b}"
    return ""


def wrong_exits(exits):
    """A line for each exit code that is not one of its fault."""
    return [f"{e['fault']}: exit code {e['code']}, not {' or '.join(map(str, e['expected']))}"
            for e in exits if e["code"] not in e["expected"]]


def judge(record):
    """What is wrong with a soak, a line each; nothing when all held."""
    wrong = [*record["complaints"], *wrong_exits(record["exits"])]
    one, other = record["undisturbed"], record["disturbed"]
    wrong += [f"{name} differs: {one.get(name)} and {other.get(name)}"
              for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    if not one or not other:
        wrong.append("the runs did not come to their end: nothing was compared")
    if record["log_difference"]:
        wrong.append(f"the logs differ: {record['log_difference']}")
    if (made := sum(record["faults"].values())) < record["asked"]:
        wrong.append(f"{made} faults, {record['asked']} were asked for")
    for part, series in record["slopes"].items():
        wrong += [f"{name} of {part} grows" for name, s in series.items() if s["grows"]]
    series = record["slopes"].get("the undisturbed run", {})
    if not series or any(s["grows"] is None for s in series.values()):
        wrong.append("too few samples of the undisturbed run to say whether anything grows")
    return wrong


def report(record):
    """The tables for a reader."""
    lines = [f"soak on {record['device']}, seed {record['seed']}: {record['seconds']:.0f} s, {record['steps']} steps, "
             f"{sum(record['faults'].values())} faults, {len(record['exits'])} processes", "",
             f"{'fault':34}{'times':>6}  {'exit codes':20}{'steps lost, mean':>17}{'max':>6}"]
    for fault, times in sorted(record["faults"].items()):
        codes = [e["code"] for e in record["exits"] if e["fault"] == fault]
        told = ", ".join(f"{code} x {codes.count(code)}" for code in sorted(set(codes)))
        lost = record["lost"].get(fault)
        lines.append(f"{fault:34}{times:6}  {told:20}"
                     + (f"{sum(lost) / len(lost):17.1f}{max(lost):6}" if lost else f"{'-':>17}{'-':>6}"))
    every = [steps for lost in record["lost"].values() for steps in lost]
    if every:
        lines.append(f"{'all':34}{sum(record['faults'].values()):6}  {'':20}{sum(every) / len(every):17.1f}"
                     f"{max(every):6}")
    for part, series in record["slopes"].items():
        lines += ["", *slopes.table(part, series)]
    wrong = judge(record)
    models = sum(name.endswith(".apr") for name in record["undisturbed"])
    return [*lines, "", *(f"WRONG: {line}" for line in wrong)] if wrong else \
        [*lines, "", f"equal to the undisturbed run: parameters, m and v, {models} models, log"]
