"""The loop's policy, driven by stand-ins: epochs, ends, guards, stops, and the events that it emits."""

import math
from dataclasses import replace

import pytest
from models import train_config

from apr.errors import GateError, Stopped
from apr.train.base import StartedStep, StepStats
from apr.train.pretrain import LoopConfig, LoopState, PretrainLoop, batch_of
from apr.train.schedule import lr_at
from apr.train.synthetic import SyntheticRun

VOCAB = 1000


class Script:
    """StepFn, ValFn and CheckpointFn that play given numbers and keep what they were asked."""

    def __init__(self, losses=None, vals=None, steps=10**9):
        self.losses, self.vals, self.steps = losses or {}, vals or {}, steps
        self.rates, self.saved = [], []

    def ahead(self, step):
        return 0

    def stats(self, step, lr):
        return StepStats(self.losses.get(step, 5.0), 0.5, lr, 64, True)

    def start(self, step, lr):
        self.rates.append(lr)
        return StartedStep(stats=self.stats(step, lr)) if step < self.steps else None

    def validate(self, epoch):
        return self.vals.get(epoch, 5.0)

    def save(self, artifact, state):
        self.saved.append((artifact, state.step))

    def finish(self):
        self.finished = self.saved[-1][1] if self.saved else None

    def optimizer_state_sha256(self):
        return "0" * 64


def run(script, events, stop=lambda: None, state=None, fresh=False, from_init=False, force_init_loss=False, **loop):
    config = LoopConfig(**{"steps_per_epoch": 5, "target_val_loss": 0.5, **loop})
    return PretrainLoop(config, train_config(max_steps=12, warmup_steps=3), VOCAB, fresh, script, script, script,
                        events.append, stop, state, from_init=from_init, force_init_loss=force_init_loss).run()


def test_a_whole_run():
    script, events = Script(), []
    end = run(script, events)
    assert [e["event"] for e in events] == ["eval", "checkpoint", *["step"] * 5, "eval", "checkpoint", *["step"] * 5,
                                            "eval", "checkpoint", *["step"] * 2, "eval", "checkpoint", "end"]
    assert end["status"] == "OK" and end["steps_recorded"] == 12
    assert end["epochs_completed"] == 3 and end["tokens_seen"] == 12 * 64
    assert script.rates == [lr_at(train_config(max_steps=12, warmup_steps=3), s) for s in range(12)]
    steps = [e for e in events if e["event"] == "step"]
    assert [e["lr"] for e in steps] == script.rates
    keys = {"event", "step", "train_loss", "grad_norm", "lr", "tokens_per_sec", "wall_ms", "tokens_seen"}
    assert all(e.keys() == keys for e in steps)  # INV-TRAIN-001
    artifact = script.saved[-1][0]
    assert artifact.epoch == 2 and artifact.tokens_seen == 768
    assert artifact.train_loss == 5.0 and artifact.train_ppl == math.exp(5.0)
    assert artifact.val_loss == 5.0 and artifact.val_ppl == math.exp(5.0)


def test_target_and_patience():
    end = run(Script(vals={0: 2.4, 1: 2.4}), [], min_epochs=2, target_val_loss=2.5)
    assert end["status"] == "OK" and end["epochs_completed"] == 2 and "converged" in end["detail"]
    end = run(Script(vals={0: 4.0, 1: 4.1, 2: 4.2}), [], patience=0, min_epochs=2)
    assert end["status"] == "EARLY_STOP" and end["epochs_completed"] == 2
    end = run(Script(), [], patience=0, min_epochs=1)  # as good as before is no improvement
    assert end["status"] == "EARLY_STOP" and end["epochs_completed"] == 2


def test_losses_are_weighted_by_their_tokens():
    """An epoch whose steps count unequal targets: no mean of means."""
    script = Script(losses={0: 2.0})
    plain = script.stats
    script.stats = lambda step, lr: replace(plain(step, lr), tokens=6 if step == 0 else 64)
    run(script, [])
    assert script.saved[1][0].train_loss == pytest.approx((2.0 * 6 + 5.0 * 64 * 4) / (6 + 64 * 4))


def test_validation_is_held_against_the_last_ten_training_losses():
    losses = dict.fromkeys(range(5, 10), 4.0)  # after five of 5.0: their mean is 4.5
    for val_loss, trips in ((0.89, True), (0.91, False)):
        script = Script(losses=losses, vals={0: 1.2, 1: val_loss, 2: val_loss})
        if trips:
            with pytest.raises(GateError, match="EVAL-METHODOLOGY-002"):
                run(script, [])
        else:
            assert run(script, [])["status"] == "OK"


@pytest.mark.parametrize("steps", [0, 1, 5, 7])
def test_exhausted_data_is_an_end_and_no_number(steps):
    script, events = Script(steps=steps), []
    end = run(script, events)
    assert end["status"] == "EXHAUSTED" and end["steps_recorded"] == steps == sum(e["event"] == "step" for e in events)
    assert script.saved[-1][1] == steps


@pytest.mark.parametrize(("script", "gate", "steps"), [
    (Script(losses={3: math.nan}), "INV-TRAIN-007", 3), (Script(vals={0: math.nan}), "INV-TRAIN-007", 5),
    (Script(losses={2: 0.0}), "INV-TRAIN-008", 2), (Script(vals={0: 8.5}), "INV-TRAIN-005", 5),
    (Script(vals={0: 2.0, 1: 4.1}), "INV-TRAIN-005", 10)])
def test_a_tripped_guard_ends_the_run_and_saves_nothing_after_it(script, gate, steps):
    events = []
    with pytest.raises(GateError, match=gate):
        run(script, events)
    assert [e["event"] for e in events[-2:]] == ["guard", "end"]
    assert events[-1]["status"] == "ABORTED" and events[-2]["gate"] == gate
    assert script.saved[-1][1] < max(steps, 1)


def test_fresh_weights_must_start_at_ln_v():
    with pytest.raises(GateError, match="EVAL-METHODOLOGY-001"):
        run(Script(vals={-1: 5.0}), [], fresh=True)
    assert run(Script(vals={-1: 6.9}), [], fresh=True)["status"] == "OK"


LIMIT = 0.7 * math.log(VOCAB)


@pytest.mark.parametrize("val_loss", [LIMIT + 1e-6, 20.0, math.inf, math.nan])
def test_given_weights_must_be_better_than_scrambled_ones(val_loss):
    script, events = Script(vals={-1: val_loss}), []
    gate = "INIT-FINETUNE-003" if math.isfinite(val_loss) else "EVAL-METHODOLOGY-001"
    with pytest.raises(GateError, match=gate):
        run(script, events, from_init=True)
    assert script.rates == [] and script.saved == [] and [e["event"] for e in events] == ["eval", "guard", "end"]


def test_given_weights_that_are_good_or_forced_pass():
    events = []
    assert run(Script(vals={-1: LIMIT}), events, from_init=True)["status"] == "OK"
    assert all(e["event"] != "note" for e in events)
    assert run(Script(vals={-1: LIMIT + 1e-6}), events, from_init=True, force_init_loss=True)["status"] == "OK"
    assert ["FALSIFY-APR-PRETRAIN-INIT-FINETUNE-003" in e["text"] for e in events if e["event"] == "note"] == [True]
    with pytest.raises(GateError, match="EVAL-METHODOLOGY-001"):
        run(Script(vals={-1: math.nan}), [], from_init=True, force_init_loss=True)


def test_given_weights_are_judged_once():
    state = LoopState(step=2, initial_val_loss=LIMIT + 1, losses=[5.0, 5.0], epoch_loss_sum=640.0, epoch_tokens=128)
    assert run(Script(), [], state=state, from_init=True)["status"] == "OK"


@pytest.mark.parametrize("at", [1, 4, 5, 7, 12])
def test_stop_and_go_on_equals_going_through(at):
    whole, through = [], Script()
    run(through, whole)
    calls, first, state = [], [], LoopState()

    def stop():
        calls.append(state.step)
        return "SIGTERM" if state.step >= at else None

    script = Script()
    if at == 12:
        run(script, first, stop, state)  # the request came with the last step: there is nothing left to stop
        assert first[-1]["status"] == "OK"
        return
    with pytest.raises(Stopped):
        run(script, first, stop, state)
    assert first[-1]["status"] == "STOPPED" and script.saved[-1][1] == at
    rest = []
    run(script, rest, state=state)
    kept = [e for e in first[:-1] if not (e["event"] == "checkpoint" and "epoch" not in e and e["step"] == at)]

    def clean(events):
        return [{k: v for k, v in e.items() if k not in ("tokens_per_sec", "wall_ms", "wall_seconds")} for e in events]
    assert clean(kept + rest) == clean(whole)


def test_a_finished_run_that_is_resumed_is_finished():
    state, events = LoopState(), []
    run(Script(), [], state=state)
    assert run(Script(), events, state=state)["steps_recorded"] == 12 and [e["event"] for e in events] == ["end"]


def test_synthetic_runs_are_equal_and_reach_the_target():
    def once():
        events, work = [], SyntheticRun(3.0, 3, 64)
        PretrainLoop(LoopConfig(steps_per_epoch=5), train_config(max_steps=15), 50257, False, work, work, work,
                     events.append, lambda: None).run()
        return [{k: v for k, v in e.items() if k not in ("tokens_per_sec", "wall_ms", "wall_seconds", "train_seconds")}
                for e in events]
    first = once()
    assert first == once() and first[-1]["final_val_loss"] == 3.0 and first[-1]["status"] == "OK"


def test_an_epoch_of_which_nothing_was_applied_ends_the_run():
    """And is not tried again and again: there is no number that it could be judged by."""
    asked = []

    def stop():
        asked.append(1)
        assert len(asked) < 100, "no end"

    with pytest.raises(GateError, match="INV-TRAIN-007 at step 10: expected a step of the epoch that was applied"):
        run(Script(losses=dict.fromkeys(range(5, 10), math.nan)), [], stop, max_skips=9)


def test_batches_are_moved_on_by_the_ranges_that_are_passed_over():
    assert [batch_of(s, []) for s in range(3)] == [0, 1, 2]
    assert [batch_of(s, [(2, 4)]) for s in range(4)] == [0, 1, 5, 6]
    assert [batch_of(s, [(2, 4), (5, 5), (8, 9)]) for s in range(6)] == [0, 1, 6, 7, 10, 11]
