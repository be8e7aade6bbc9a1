"""Soaks of seconds and of a minute; and that the judge of one sees what it is there for."""

import hashlib
import json
import os
import random
import signal
import sys

import pytest
import slopes
import soak
import soak_faults
import soak_report

from apr.ptx_store import Entry, decode

LEVEL = [100 * slopes.MIB + (i % 7) * slopes.MIB for i in range(40)]


def soaked(tmp_path, *arguments):
    """The record of a soak that was found good."""
    code = soak.main(["--folder", str(tmp_path / "runs"), "--json", str(tmp_path / "soak.json"), *arguments])
    record = json.loads((tmp_path / "soak.json").read_text())
    assert code == 0, soak_report.judge(record)
    return record


@pytest.mark.parametrize(("seconds", "faults"), [
    pytest.param(8, 6, id="A1-E1-small"), pytest.param(60, 24, id="A1-E1-medium", marks=pytest.mark.long)])
def test_A1_what_is_ended_and_damaged_at_random_ends_as_if_it_had_not_been(tmp_path, seconds, faults):
    record = soaked(tmp_path, "--seconds", str(seconds), "--faults", str(faults))
    assert sum(record["faults"].values()) >= faults and record["undisturbed"] == record["disturbed"]
    assert record["undisturbed"]["step"] == record["steps"] and len(record["lost"]) >= 2
    models = [name for name in record["undisturbed"] if name.endswith(".apr")]
    assert len(models) == record["steps"] // record["steps_per_epoch"] >= 12


@pytest.fixture
def record():
    """Of a soak in which all held."""
    end = {"step": 48, "parameters_sha256": "aa", "optimizer_sha256": "bb", "epoch-000.apr": "cc"}
    series = slopes.summary([(float(i), {"host memory": LEVEL[i], "handles": 5 + i % 2}) for i in range(40)])
    return {"device": "cpu", "seed": 1, "seconds": 9.0, "asked": 2, "steps": 48, "faults": {"A1 SIGKILL": 2},
            "exits": [{"fault": "A1 SIGKILL", "code": -9, "expected": [-9]} for _ in range(2)],
            "lost": {"A1 SIGKILL": [0, 3]},
            "complaints": [], "undisturbed": end, "disturbed": dict(end), "log_difference": "",
            "slopes": {"the undisturbed run": series, "processes at their first step": {}}}


def test_U1_a_good_record_is_good(record):
    assert soak_report.judge(record) == []
    assert soak_report.report(record)[-1].startswith("equal to the undisturbed run: parameters, m and v, 1 models, log")


@pytest.mark.parametrize("name", ["step", "parameters_sha256", "optimizer_sha256", "epoch-000.apr"])
@pytest.mark.parametrize("change", ["another", "none", "one more"])
def test_U1_a_hash_that_differs_is_seen(record, name, change):
    if change == "another":
        record["disturbed"][name] = "another"
    else:
        del record["disturbed" if change == "none" else "undisturbed"][name]
    wrong, = soak_report.judge(record)
    assert wrong.startswith(f"{name} differs")
    assert f"WRONG: {wrong}" in soak_report.report(record)


@pytest.mark.parametrize(("changes", "says"), [
    ({"undisturbed": {}, "disturbed": {}}, "nothing was compared"), ({"log_difference": "event 3"}, "the logs differ"),
    ({"asked": 3}, "2 faults, 3 were asked for"), ({"complaints": ["a traceback"]}, "a traceback"),
    ({"slopes": {}}, "too few samples")])
def test_U1_what_was_not_shown_is_not_passed(record, changes, says):
    wrong, = soak_report.judge({**record, **changes})
    assert says in wrong


@pytest.mark.parametrize("code", [0, 1, 2, 5, 7, 75, -11])
def test_U5_an_exit_code_of_another_kind_is_seen(record, code):
    record["exits"][1]["code"] = code
    assert soak_report.judge(record) == [f"A1 SIGKILL: exit code {code}, not -9"]


@pytest.mark.parametrize(("name", "values", "grows"), [
    ("host memory", LEVEL, False), ("host memory", [v + i * slopes.MIB for i, v in enumerate(LEVEL)], True),
    ("host memory", [v + min(i, 9) * 30 * slopes.MIB for i, v in enumerate(LEVEL)], False),  # warms up
    ("host memory", [v + (i % 10 == 9) * 900 * slopes.MIB for i, v in enumerate(LEVEL)], False),  # peaks
    ("host memory", [v + 9 * slopes.MIB * (i > 20) for i, v in enumerate(LEVEL)], True),  # more than 2 % and 8 MiB
    ("host memory", [v + (900 + 9 * (i > 20)) * slopes.MIB for i, v in enumerate(LEVEL)], False),  # less than 2 %
    ("host memory", [v + 5 * slopes.MIB * (i > 20) for i, v in enumerate(LEVEL)], False),  # less than 8 MiB
    ("host memory", [v - i * slopes.MIB for i, v in enumerate(LEVEL)], False), ("host memory", LEVEL[:7], None),
    ("device memory", [v + i * slopes.MIB for i, v in enumerate(LEVEL)], True),
    ("handles", [5 + i // 8 for i in range(40)], True), ("handles", [5 + i % 3 for i in range(40)], False),
    ("threads", [6 + i // 8 for i in range(40)], True), ("threads", [6] * 8, False)])
def test_U3_what_grows_is_seen_and_noise_is_not(record, name, values, grows):
    part = slopes.summary([(float(i), {name: value}) for i, value in enumerate(values)])
    assert part[name]["grows"] is grows
    for where in record["slopes"]:
        wrong = soak_report.judge({**record, "slopes": {**record["slopes"], where: part}})
        assert wrong == ([f"{name} of {where} grows"] if grows else
                         [] if grows is False or where.startswith("processes") else
                         ["too few samples of the undisturbed run to say whether anything grows"])


def test_U3_a_slope_is_per_hour():
    found = slopes.summary([(10.0 + i, {"handles": 3 + 2 * i}) for i in range(40)])["handles"]
    assert found["per_hour"] == pytest.approx(7200) and (found["first"], found["last"], found["max"]) == (3, 81, 81)


def test_U3_a_process_is_sampled_while_it_lives():
    found = slopes.sample(os.getpid(), "cpu")
    assert found["host memory"] > slopes.MIB and found["handles"] >= 3 and found["threads"] >= 1
    with open(__file__):
        assert slopes.sample(os.getpid(), "cpu")["handles"] == found["handles"] + 1
    with soak_faults.Child([sys.executable, "-c", ""], ".", {}) as child:
        assert child.finish() == 0
    assert slopes.sample(child.pid, "cpu") == {}


def written(run, events):
    """A run's log of these events."""
    run.mkdir()
    (run / "train.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return run


def test_U1_logs_are_equal_but_for_times_starts_stops_and_troubles(tmp_path):
    steps = [{"event": "step", "step": i, "train_loss": 5.0 - i, "wall_ms": 3.0} for i in range(3)]
    noise = [{"event": "start"}, {"event": "resume", "step": 2}, {"event": "checkpoint", "step": 2},
             *({"event": "note", "step": 0, "text": text} for text in ("kernel cache: x", "not saved: x"))]
    whole = written(tmp_path / "a", steps)
    assert soak_report.log_difference(whole, written(
        tmp_path / "b", [*noise, *({**s, "wall_ms": 9.0} for s in steps)])) == ""
    for name, other in (("c", steps[:2]), ("d", [*steps, steps[2]]), ("e", [*steps[:2], {**steps[2], "train_loss": 1}]),
                        ("f", [*steps, {"event": "note", "step": 3, "text": "resumed with other kernels"}]),
                        ("g", [{"event": "checkpoint", "step": 2, "epoch": 0}, *steps])):
        assert soak_report.log_difference(whole, written(tmp_path / name, other)) != ""
    torn = written(tmp_path / "torn", steps)
    with open(torn / "train.jsonl", "r+") as f:
        f.write('{"eve\n')
    assert "no event" in soak_report.log_difference(whole, torn)


def test_A8_every_injury_to_a_checkpoint_is_seen_by_the_second_reading(tmp_path):
    rng = random.Random(4)
    for number, (kind, injury) in enumerate({**soak_faults.DATA, **soak_faults.MANIFEST}.items()):
        folder = tmp_path / str(number) / "ckpt" / "step-00000008"
        folder.mkdir(parents=True)
        (folder / "state.json").write_bytes(data := rng.randbytes(500))
        sha = hashlib.sha256(data).hexdigest()
        (folder / "manifest.json").write_text(json.dumps({"files": {"state.json": {"sha256": sha}}}))
        assert soak.sound(tmp_path / str(number)) == [folder]
        injury(rng, folder / ("manifest.json" if kind in soak_faults.MANIFEST else "state.json"))
        assert soak.sound(tmp_path / str(number)) == [], kind


@pytest.mark.parametrize("kind", soak_faults.KERNELS)
def test_F3_every_injury_to_a_kernel_is_one(tmp_path, kind):
    path, entry = tmp_path / "x.kernel", Entry("key", {}, random.Random(5).randbytes(300))
    path.write_bytes(entry.encode())
    assert decode(path.read_bytes()) == entry
    soak_faults.KERNELS[kind](random.Random(6), path)
    assert not path.exists() or isinstance(decode(path.read_bytes()), str)


def test_E1_a_child_tells_its_events_and_how_it_ended():
    told = [{"event": "resume", "step": 4}, {"event": "step", "step": 4}, {"event": "step", "step": 5}]
    code = "import os, signal, sys\nfor e in sys.argv[1:]: print(e)\nprint('{\"event', end='', flush=True)\n" \
           f"print('words', file=sys.stderr, flush=True)\nos.kill(os.getpid(), {signal.SIGTERM:d})"
    with soak_faults.Child([sys.executable, "-c", code, *map(json.dumps, told)], ".", {}) as child:
        assert child.until("step", 5) == told[2] and (child.resumed, child.reached) == (4, 6)
        assert child.finish() == -15 and child.stderr == "words\n" and child.until("step") is None


@pytest.mark.parametrize("seconds", [8, 60, 1800])
def test_A1_a_plan_has_faults_enough_and_room_between_them(seconds):
    for faults in (6, 50, 200):
        plan = soak.planned(seconds, faults, soak.Pace(0.01, 0.03, 1.0))
        assert plan.rounds + plan.injuries == faults and plan.rounds >= 3
        assert plan.steps == plan.every * soak.EPOCHS * plan.rounds and plan.every >= 4
    kinds = soak.deck(random.Random(1), soak_faults.ENDS, 30)
    assert len(kinds) == 30 and set(kinds) == set(soak_faults.ENDS) and max(map(kinds.count, kinds)) <= 3
