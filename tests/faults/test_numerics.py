"""Numbers that go wrong in a run (table D): nothing of them is applied or saved, and who is at fault is found out.

A fault is put into NumPy steps: of some batches always (bad data, a run that diverges), or once (a device).
"""

import json
import math
import re

import numpy as np
import pytest
from models import SMALL, YAML, random_batch, train_config

import apr.reference.model
import apr.train.pretrain
import apr.train.trainer
from apr.cli.main import build
from apr.cli.pretrain import build_config
from apr.config import IGNORE
from apr.data.batch import LMBatch
from apr.data.stream import TrainStream
from apr.errors import AprError, DeviceFault, GateError, Stopped
from apr.train import checkpoint
from apr.train.recovery import first_not_finite
from apr.train.run import pretrain, read_run, resume
from apr.train.trainer import TransformerTrainer

STEPS = 24


def config_of(folder, tmp_path, *more, text=YAML):
    (tmp_path / "run.yaml").write_text(text)
    return build_config(build("pretrain").parse_args(
        ["--config", str(tmp_path / "run.yaml"), "--dataset", str(folder / "texts"), "--run-dir", "unused", *more]))


def events_of(run_dir, kind=None):
    events = [json.loads(line) for line in (run_dir / "train.jsonl").read_text().splitlines()]
    return [e for e in events if kind in (None, e["event"])]


def failure(run):
    """The error that ends a run, None for none."""
    try:
        run()
    except AprError as e:
        return e
    return None


def is_error(error, kind, pattern) -> bool:
    """Whether it is an error of this kind and text."""
    return isinstance(error, kind) and re.search(pattern, str(error)) is not None


class Injector:
    """Changes what a step of some batches computes. `spoil(loss, grads)` gives the loss; `once`: only the first time.

    Batches go by the order in which they are first trained on, from 0; `trained` has all of them, again and again.
    """

    def __init__(self, monkeypatch, batches, spoil, once=False):
        self.batches, self.spoil, self.once, self.done = set(batches), spoil, once, False
        self.numbers, self.trained = {}, []
        real_step, real_gradients = TransformerTrainer._step, TransformerTrainer._gradients

        def step(trainer, micro, dloss, lr):
            number = self.numbers.setdefault(micro[0].inputs.tobytes(), len(self.numbers))
            self.trained.append(number)
            self.hit = number in self.batches and not (self.once and self.done)
            self.done |= self.hit
            return real_step(trainer, micro, dloss, lr)

        def gradients(trainer, batch, dloss):
            loss = real_gradients(trainer, batch, dloss)
            return self.spoil(loss, trainer.grads_buf) if self.hit else loss

        monkeypatch.setattr(TransformerTrainer, "_step", step)
        monkeypatch.setattr(TransformerTrainer, "_gradients", gradients)


def nan_in_one_gradient(loss, grads):
    grads[1234] = np.nan
    return loss


def spike(loss, grads):
    return 100 * loss


def infinite(loss, grads):
    return math.inf


@pytest.mark.parametrize("spoil", [nan_in_one_gradient, infinite])
def test_D1_what_is_not_finite_ends_the_run_and_changes_nothing(folder, tmp_path, monkeypatch, spoil):
    Injector(monkeypatch, [10], spoil)
    error = failure(lambda: pretrain(config_of(folder, tmp_path), tmp_path / "run", "cpu", []))
    assert is_error(error, GateError, r"^INV-TRAIN-007 at step 10 \(batch 10\): expected a finite .*again when made "
                     r"again from step 8; every point of the model is finite: ")
    assert error.exit_code == 5 and "\n" not in str(error)
    assert checkpoint.latest(tmp_path / "run" / "ckpt", print).state["step"] == 8
    end = events_of(tmp_path / "run")[-1]
    assert (end["event"], end["status"], end["steps_recorded"]) == ("end", "ABORTED", 10)
    assert "batch 10" in end["detail"]


@pytest.mark.parametrize(("weight", "says"), [
    ("model.layers.1.mlp.up_proj.weight", "layer 1, ffn_up (up projection), "),
    ("model.layers.0.self_attn.v_proj.bias", "layer 0, v_bias (value after bias; "),
    ("model.norm.weight", "final_norm (final RMSNorm, scaled by its weight), ")])
def test_D1_the_first_bad_layer_and_stage_are_named(folder, tmp_path, monkeypatch, weight, says):
    """The batch of step 10 meets an infinite weight, which is gone when the pass is over."""
    injector = Injector(monkeypatch, [], spike)
    real = apr.train.trainer.loss_and_gradients

    def spoilt(params, grads, config, inputs, *rest):
        ten = next((raw for raw, n in injector.numbers.items() if n == 10), b"")
        if inputs.tobytes() in ten:
            bad = params[weight].copy()
            bad.reshape(-1)[5] = np.inf
            params = {**params, weight: bad}
        return real(params, grads, config, inputs, *rest)

    monkeypatch.setattr(apr.train.trainer, "loss_and_gradients", spoilt)
    error = failure(lambda: pretrain(config_of(folder, tmp_path), tmp_path / "run", "cpu", []))
    assert is_error(error, GateError, "INV-TRAIN-007 at step 10")
    assert f"first not finite: {says}" in str(error) and "micro-batch 0" in str(error)


def test_D1_a_weight_that_is_not_finite_is_named_before_any_stage():
    trainer = TransformerTrainer.new(SMALL, train_config())
    assert first_not_finite(trainer, [random_batch(0)]) == "every point of the model is finite: their sums are not"
    trainer.params["model.norm.weight"][3] = np.inf
    assert first_not_finite(trainer, [random_batch(0)]).startswith("first not finite: parameter model.norm.weight")


def test_D1_a_gradient_is_called_one(monkeypatch):
    trainer, real = TransformerTrainer.new(SMALL, train_config()), apr.reference.model.linear_backward
    monkeypatch.setattr(apr.reference.model, "linear_backward", lambda *given: real(*given) * np.float32(np.nan))
    assert first_not_finite(trainer, [random_batch(0)]).startswith("first not finite: gradient at final_norm (final")


@pytest.mark.parametrize("spoil", [nan_in_one_gradient, infinite])
def test_D2_so_many_are_passed_over_and_counted(folder, tmp_path, monkeypatch, spoil):
    Injector(monkeypatch, [0, 10, 11], spoil)
    end = pretrain(config_of(folder, tmp_path, "--max-skips", "3"), tmp_path / "run", "cpu", [])
    skips = events_of(tmp_path / "run", "skip")
    assert end["status"] == "OK" and [(e["step"], e["skipped"]) for e in skips] == [(0, 1), (10, 2), (11, 3)]
    saved = checkpoint.latest(tmp_path / "run" / "ckpt", print).state
    assert (saved["optimizer_step"], saved["step"], saved["loop"]["skipped"]) == (STEPS - 3, STEPS, 3)
    assert [e["step"] for e in events_of(tmp_path / "run", "step")] == [
        s for s in range(STEPS) if s not in (0, 10, 11)]


def test_D2_one_more_ends_the_run_and_a_resumed_run_counts_on(folder, tmp_path, monkeypatch):
    Injector(monkeypatch, [2, 12], infinite)
    error = failure(lambda: pretrain(config_of(folder, tmp_path, "--max-skips", "1"), tmp_path / "run", "cpu", []))
    assert is_error(error, GateError, "INV-TRAIN-007 at step 12")
    error = failure(lambda: resume(read_run(tmp_path / "run"), tmp_path / "run", "cpu", [], print))
    assert is_error(error, GateError, "INV-TRAIN-007 at step 12")


def test_D2_an_epoch_of_which_nothing_was_applied_is_no_epoch(folder, tmp_path, monkeypatch):
    Injector(monkeypatch, range(8, 16), infinite)
    error = failure(lambda: pretrain(config_of(folder, tmp_path, "--max-skips", "20"), tmp_path / "run", "cpu", []))
    assert is_error(error, GateError, r"INV-TRAIN-007 at step 16.*expected a step of the epoch that was applied")


@pytest.mark.parametrize("spoil", [nan_in_one_gradient, infinite, spike])
def test_D3_numbers_that_do_not_come_again_are_a_fault_of_the_device(folder, tmp_path, monkeypatch, spoil):
    text = YAML.replace("max_steps: 24", "max_steps: 48").replace("steps_per_epoch: 8", "steps_per_epoch: 24")
    Injector(monkeypatch, [30], spoil, once=True)
    error = failure(lambda: pretrain(config_of(folder, tmp_path, text=text), tmp_path / "run", "cpu", []))
    assert is_error(error, DeviceFault, "step 30, made again from step 24: expected the numbers of the first")
    assert error.exit_code == 10 and checkpoint.latest(tmp_path / "run" / "ckpt", print).state["step"] == 24
    assert events_of(tmp_path / "run")[-1]["status"] == "ABORTED"


def test_D3_an_earlier_step_that_does_not_come_again_is_the_one_that_is_named(folder, tmp_path, monkeypatch):
    """A wrong update that no guard could see, some steps before what trips."""
    Injector(monkeypatch, [9], lambda loss, grads: (grads.__imul__(-3), loss)[1], once=True)
    real = apr.train.pretrain.judge_step
    monkeypatch.setattr(apr.train.pretrain, "judge_step", lambda loss, norm, *rest: real(
        math.nan if len(rest[-1]) == 13 else loss, norm, *rest))
    error = failure(lambda: pretrain(config_of(folder, tmp_path), tmp_path / "run", "cpu", []))
    assert is_error(error, DeviceFault, "step 9, made again from step 8")


def rolled_back(folder, tmp_path, monkeypatch, batches, name="run", sinks=(), **injected):
    text = YAML.replace("max_steps: 24", "max_steps: 48").replace("steps_per_epoch: 8", "steps_per_epoch: 12")
    injector = Injector(monkeypatch, batches, spike, **injected)
    config = config_of(folder, tmp_path, "--on-divergence", "rollback", text=text)
    return injector, config, tmp_path / name


def test_D3_rollback_goes_on_past_the_data_that_led_to_the_spike(folder, tmp_path, monkeypatch):
    injector, config, run_dir = rolled_back(folder, tmp_path, monkeypatch, [30])
    assert failure(lambda: pretrain(config, run_dir, "cpu", [])) is None
    events = events_of(run_dir)
    end = events[-1]
    back, = [e for e in events if e["event"] == "rollback"]
    assert end["status"] == "OK" and end["steps_recorded"] == 48
    assert (back["step"], back["from_step"], back["passed_over"]) == (24, 30, [[24, 30]])
    assert "INV-TRAIN-005" in back["where"] and "again when made again from step 24" in back["found"]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(48))  # each once
    assert injector.trained == [*range(31), *range(24, 31), *range(31, 55)]  # made again, then never more
    assert checkpoint.latest(run_dir / "ckpt", print).state["loop"]["passed_over"] == [[24, 30]]


def test_D3_a_run_that_was_rolled_back_resumes_to_the_same_bits(folder, tmp_path, monkeypatch):
    _, config, run_dir = rolled_back(folder, tmp_path, monkeypatch, [30])
    pretrain(config, run_dir, "cpu", [])
    whole = checkpoint.latest(run_dir / "ckpt", print).state

    def stop(event):
        if event["event"] == "step" and event["step"] in (26, 40) and event["step"] not in stopped:
            stopped.append(event["step"])
            apr.train.run.os.kill(apr.train.run.os.getpid(), 15)

    stopped = []
    with pytest.raises(Stopped):
        pretrain(config, tmp_path / "cut", "cpu", [stop])
    with pytest.raises(Stopped):
        resume(read_run(tmp_path / "cut"), tmp_path / "cut", "cpu", [stop], print)
    resume(read_run(tmp_path / "cut"), tmp_path / "cut", "cpu", [], print)
    cut = checkpoint.latest(tmp_path / "cut" / "ckpt", print).state
    assert stopped == [26, 40]
    batches = cut["loop"]["passed_over"]
    assert batches == [[27, 30]] and whole["loop"]["passed_over"] == [[24, 30]]  # from the newest checkpoint on


def test_D4_what_diverges_again_and_again_ends_the_run_at_its_last_good_checkpoint(folder, tmp_path, monkeypatch):
    injector, config, run_dir = rolled_back(folder, tmp_path, monkeypatch, range(30, 1000))
    error = failure(lambda: pretrain(config, run_dir, "cpu", []))
    assert is_error(error, GateError, r"INV-TRAIN-005 .*, after 3 rollbacks")
    assert error.exit_code == 5 and checkpoint.latest(run_dir / "ckpt", print).state["step"] == 24
    back, = events_of(run_dir, "rollback")  # the log is cut back to the checkpoint each time
    assert back["passed_over"] == [[24, 30], [31, 31], [32, 32]] and max(injector.trained) == 33


def test_D4_a_learning_rate_a_hundred_times_too_large_ends_the_run(folder, tmp_path):
    error = failure(lambda: pretrain(config_of(folder, tmp_path, "--lr", "3e4"), tmp_path / "run", "cpu", []))
    assert is_error(error, GateError, "INV-TRAIN-00")
    assert error.exit_code == 5 and "again when made again" in str(error)
    assert checkpoint.latest(tmp_path / "run" / "ckpt", print).state["step"] == 0


def test_D5_a_validation_that_is_no_number_is_never_the_best(folder, tmp_path, monkeypatch):
    real, calls = TransformerTrainer._loss_sum, []

    def loss_sum(trainer, batches):
        calls.append(trainer.step)
        return math.nan if trainer.step == 16 else real(trainer, batches)

    monkeypatch.setattr(TransformerTrainer, "_loss_sum", loss_sum)
    error = failure(lambda: pretrain(config_of(folder, tmp_path), tmp_path / "run", "cpu", []))
    assert is_error(error, GateError, r"INV-TRAIN-007 at step 16 \(batch 15\): expected a finite val_loss")
    assert checkpoint.latest(tmp_path / "run" / "ckpt", print).state["step"] == 8 and calls == [0, 8, 16, 16]
    assert not list((tmp_path / "run" / "ckpt").glob("epoch-001*"))


def test_D5_a_validation_that_does_not_come_again_is_a_fault_of_the_device(folder, tmp_path, monkeypatch):
    real, calls = TransformerTrainer._loss_sum, []

    def loss_sum(trainer, batches):
        calls.append(trainer.step)
        return math.nan if calls == [0, 8, 16] else real(trainer, batches)

    monkeypatch.setattr(TransformerTrainer, "_loss_sum", loss_sum)
    error = failure(lambda: pretrain(config_of(folder, tmp_path), tmp_path / "run", "cpu", []))
    assert is_error(error, DeviceFault, "the validation, made again from step 8")


def test_C7_a_step_without_a_target_is_passed_over_and_counted_apart(folder, tmp_path, monkeypatch):
    """Its loss is no number, and that is nobody's fault: it does not count against --max-skips."""
    real = TrainStream.batch

    def batch(stream, first, rows):
        found = real(stream, first, rows)
        return LMBatch(found.inputs, np.full_like(found.targets, IGNORE)) if first in (40, 44) else found  # of step 5

    monkeypatch.setattr(TrainStream, "batch", batch)
    assert pretrain(config_of(folder, tmp_path), tmp_path / "run", "cpu", [])["status"] == "OK"
    skip, = events_of(tmp_path / "run", "skip")
    assert (skip["step"], skip["tokens"], skip["skipped"], skip["train_loss"]) == (5, 0, 0, "nan")
    assert checkpoint.latest(tmp_path / "run" / "ckpt", print).state["optimizer_step"] == STEPS - 1


def test_D4_without_its_checkpoint_a_step_is_not_made_again_and_says_so(folder, tmp_path, monkeypatch):
    Injector(monkeypatch, [10], infinite)

    def damage(event):
        if event["event"] == "step" and event["step"] == 9:
            (tmp_path / "run" / "ckpt" / "step-00000008" / "state.json").write_text("{}")

    config = config_of(folder, tmp_path, "--on-divergence", "rollback")
    error = failure(lambda: pretrain(config, tmp_path / "run", "cpu", [damage]))
    assert is_error(error, GateError, r"INV-TRAIN-007 at step 10: .*not made again, for .*state\.json")
