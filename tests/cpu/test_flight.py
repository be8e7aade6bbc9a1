"""Steps under way: the loop gives the numbers of each step to it, a step late, and drains where it must."""

import math
from dataclasses import replace

import pytest
from test_pretrain_loop import Script, run

import apr.train.flight as flight
from apr.errors import DeviceFault, GateError, Stopped
from apr.train.base import StartedStep
from apr.train.pretrain import LoopState

TIMES = ("tokens_per_sec", "wall_ms", "wall_seconds")


class Late(Script):
    """Steps whose numbers are there when they are asked for; `log` has what was done when."""

    def __init__(self, alone=(), **script):
        super().__init__(**script)
        self.alone, self.log, self.open = set(alone), [], 0

    def ahead(self, step):
        return int(step not in self.alone)

    def start(self, step, lr):
        self.rates.append(lr)
        if step >= self.steps:
            return None
        self.open += 1
        self.log.append(f"start {step}")
        started = StartedStep()

        def wait():
            self.open -= 1
            self.log.append(f"finish {step}")
            started.stats = self.stats(step, lr)
        started.wait = wait
        return started

    def validate(self, epoch):
        assert self.open == 0, "validated while a step was under way"
        return super().validate(epoch)

    def save(self, artifact, state):
        assert self.open == 0, "saved while a step was under way"
        super().save(artifact, state)


def clean(events):
    return [{k: v for k, v in e.items() if k not in TIMES} for e in events]


def saved(script):
    return [(artifact and replace(artifact, wall_seconds=0.0), step) for artifact, step in script.saved]


def test_a_run_is_the_same_whether_its_steps_overlap():
    losses, runs = {s: 5.0 + s / 100 for s in range(12)}, []
    for script in (Script(losses), Late(losses=losses), Late(losses=losses, alone=range(0, 12, 3))):
        events = []
        run(script, events)
        runs.append((clean(events), script.rates, saved(script)))
    assert runs[0] == runs[1] == runs[2]


def test_the_next_step_is_started_first_and_none_is_under_way_at_an_epochs_end():
    script = Late(alone=[7])
    run(script, [])
    first = "start 0, start 1, finish 0, start 2, finish 1, start 3, finish 2, start 4, finish 3, finish 4"
    second = "start 5, start 6, finish 5, finish 6, start 7, start 8, finish 7, start 9"
    assert ", ".join(script.log[:18]) == f"{first}, {second}"
    assert script.open == 0 and len(script.log) == 24


@pytest.mark.parametrize("bad", [0, 3, 4, 6, 11])
def test_a_step_that_is_not_finite_ends_the_run_by_its_own_number(bad):
    """The next step has been started by then: it is waited for, and neither judged, logged nor saved."""
    script, events = Late(losses={bad: math.nan, bad + 1: math.inf}), []
    with pytest.raises(GateError, match=f"INV-TRAIN-007 at step {bad}: expected a finite loss, found nan"):
        run(script, events)
    guard, end = events[-2:]
    assert (guard["event"], guard["step"], end["status"], end["steps_recorded"]) == ("guard", bad, "ABORTED", bad)
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(bad))
    assert script.open == 0 and script.saved[-1][1] <= bad
    started = int(script.log[-1].split()[1])
    assert started == (bad if bad in (4, 11) else bad + 1)  # at an epoch's end nothing is started


def test_a_fault_of_the_gpu_in_the_step_behind_does_not_hide_the_guard():
    script = Late(losses={2: math.nan})
    plain = script.stats

    def stats(step, lr):
        if step == 3:
            raise DeviceFault("the GPU", "no fault", "one", "stop")
        return plain(step, lr)
    script.stats = stats
    with pytest.raises(GateError, match="at step 2"):
        run(script, [])


@pytest.mark.parametrize("at", range(1, 11))
def test_a_stop_finishes_what_was_started_and_going_on_is_the_same_run(at):
    whole, first, rest, state = [], [], [], LoopState()
    run(Late(), whole)
    script = Late()
    with pytest.raises(Stopped):
        run(script, first, lambda: "SIGTERM" if state.step >= at else None, state)
    assert script.open == 0 and script.saved[-1][1] == state.step
    assert state.step == (at if at % 5 == 0 else at + 1)  # none is started beyond an epoch
    run(Late(), rest, state=state)
    steps = [[e for e in clean(events) if e["event"] == "step"] for events in (whole, first + rest)]
    assert steps[0] == steps[1] and clean(rest)[-1] == clean(whole)[-1]


@pytest.mark.parametrize("steps", [0, 1, 5, 7])
def test_exhausted_data_end_after_the_steps_that_had_some(steps):
    script, events = Late(steps=steps), []
    assert run(script, events)["status"] == "EXHAUSTED" and script.open == 0
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(steps)) and script.saved[-1][1] == steps


def test_times_are_between_results_or_from_a_start_that_nothing_preceded(monkeypatch):
    """Each start takes 1 s, each wait 10 s, and everything between the steps of the first epoch and the second 100."""
    now, events = [0.0], []

    def pass_by(seconds):
        now[0] += seconds
    script = Late()
    start, stats, save = script.start, script.stats, script.save
    script.start = lambda step, lr: (pass_by(1.0), start(step, lr))[1]
    script.stats = lambda step, lr: (pass_by(10.0), stats(step, lr))[1]
    script.save = lambda *arguments: (pass_by(100.0), save(*arguments))[1]
    monkeypatch.setattr(flight.time, "perf_counter", lambda: now[0])
    run(script, events)
    seconds = [e["wall_ms"] / 1000 for e in events if e["event"] == "step"]
    assert seconds == [12, 11, 11, 11, 10, 12, 11, 11, 11, 10, 12, 10]
