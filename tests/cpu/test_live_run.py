"""Runs under the live gate: a step that fails it ends the run, exit 5, and what was saved before stays; the flag."""

import json

import numpy as np
import pytest
from step_stand_in import Fault, StandIn
from test_run import arguments

import apr.train.run
from apr.cli import pretrain as command
from apr.cli.main import main
from apr.cli.pretrain import build_config, watch_of
from apr.errors import ConfigError, GateError
from apr.tools.live_gate import LiveGate
from apr.train import checkpoint
from apr.train.run import pretrain, read_run, resume


def events(run_dir, *kinds):
    found = [json.loads(line) for line in (run_dir / "train.jsonl").read_text().splitlines()]
    return [e for e in found if e["event"] in kinds]


def spoil(step):
    """From this step on attention is lost to the stream."""
    def left(trainer):
        if trainer.step >= step:
            trainer.left["residual"][1::2] = 0
    return left


@pytest.fixture
def stand_ins(monkeypatch):
    """Runs get a stand-in for a GPU's trainer; returns a function that plants a fault from a step on."""
    planted = []

    def make(model, config, device, params=None, record=None, warn=None):
        trainer = StandIn.new(model, config) if params is None else StandIn.with_model(model, params, config)
        trainer.fault = Fault(after=planted[-1]) if planted else Fault()
        return trainer

    monkeypatch.setattr(apr.train.run, "make_trainer", make)
    return lambda step: planted.append(spoil(step)) if step is not None else planted.clear()


def test_gate_on_or_off_the_run_is_the_same(folder, tmp_path, stand_ins):
    states = []
    for every in (0, 5):
        watch = LiveGate(every, 11) if every else None
        pretrain(build_config(arguments(folder)), tmp_path / str(every), "cpu", [], watch=watch)
        state = checkpoint.latest(tmp_path / str(every) / "ckpt", print).state
        losses = [(e["step"], e["train_loss"], e["grad_norm"]) for e in events(tmp_path / str(every), "step")]
        states.append((state["parameters_sha256"], state["optimizer_sha256"], losses))
    assert states[0] == states[1]
    assert [e["step"] for e in events(tmp_path / "5", "parity")] == [0, 5, 10, 15, 20]
    assert events(tmp_path / "0", "parity") == []
    assert all(e["ms"] > 0 and e["worst"]["stage"] for e in events(tmp_path / "5", "parity"))


def test_a_step_that_fails_ends_the_run_and_the_checkpoint_before_it_goes_on(folder, tmp_path, stand_ins):
    """Faulty from step 11 on, found at 12; the run is resumed from the epoch that ended with step 8."""
    run_dir = tmp_path / "run"
    stand_ins(11)
    with pytest.raises(GateError, match=r"INV-TRAIN-PARITY L0\d.attn_out at step 12") as caught:
        pretrain(build_config(arguments(folder)), run_dir, "cpu", [], watch=LiveGate(4, 11))
    assert caught.value.exit_code == 5
    (guard,), (end,) = events(run_dir, "guard"), events(run_dir, "end")
    assert (guard["gate"], guard["step"]) == ("INV-TRAIN-PARITY", 12)
    assert guard["where"].startswith("INV-TRAIN-PARITY L0") and guard["expected"] and guard["found"]
    assert end["status"] == "ABORTED" and "INV-TRAIN-PARITY" in end["detail"] and end["steps_recorded"] == 12
    assert sorted(p.name for p in (run_dir / "ckpt").iterdir()) == [
        "epoch-000.apr", "epoch-000.metadata.json", "step-00000000", "step-00000008"]
    found = checkpoint.latest(run_dir / "ckpt", print)
    assert found.state["step"] == 8

    stand_ins(None)
    resume(read_run(run_dir), run_dir, "cpu", [], print, watch=LiveGate(4, 11))
    whole = tmp_path / "whole"
    pretrain(build_config(arguments(folder)), whole, "cpu", [])
    resumed, undisturbed = (checkpoint.latest(d / "ckpt", print).state for d in (run_dir, whole))
    for of in ("parameters_sha256", "optimizer_sha256"):
        assert resumed[of] == undisturbed[of]
    assert [e["step"] for e in events(run_dir, "parity")] == [0, 4, 8, 12, 16, 20]


def test_a_loss_that_is_no_number_is_the_guards_own(folder, tmp_path, stand_ins, monkeypatch):
    """Nothing was applied, so there is nothing to compare: the reason given is the guard's."""
    monkeypatch.setattr(StandIn, "_part", lambda *_: np.nan)
    with pytest.raises(GateError, match="INV-TRAIN-007"):
        pretrain(build_config(arguments(folder)), tmp_path / "run", "cpu", [], watch=LiveGate(1, 11))


def test_the_command_ends_with_5(folder, tmp_path, stand_ins, monkeypatch, capsys):
    monkeypatch.setattr(command, "watch_of", lambda config, device, args: (LiveGate(config.parity_every, 0), []))
    stand_ins(0)
    flags = ["pretrain", "--config", str(folder / "run.yaml"), "--dataset", str(folder / "texts"), "--device", "cpu",
             "--run-dir", str(tmp_path / "run"), "--parity-every", "2", "--json"]
    assert main(flags) == 5
    out, err = capsys.readouterr()
    printed = [json.loads(line) for line in out.splitlines()]
    assert [e["event"] for e in printed if e["event"] in ("guard", "end")] == ["guard", "end"]
    assert "INV-TRAIN-PARITY" in err.splitlines()[-1] and "Traceback" not in err
    assert read_run(tmp_path / "run").parity_every == 2


def test_where_the_number_comes_from(folder, tmp_path):
    assert build_config(arguments(folder)).parity_every == 500
    assert build_config(arguments(folder, "--parity-every", "0")).parity_every == 0
    (tmp_path / "more.yaml").write_text((folder / "run.yaml").read_text() + "parity_every: 7\n")
    args = arguments(folder)
    args.config = tmp_path / "more.yaml"
    assert build_config(args).parity_every == 7
    with pytest.raises(ConfigError, match="parity_every: expected 0 or more, found -1"):
        build_config(arguments(folder, "--parity-every", "-1"))
    (tmp_path / "more.yaml").write_text("parity_every: -2\n")
    with pytest.raises(ConfigError, match="parity_every: expected 0 or more, found -2"):
        build_config(args)


def test_a_gate_for_a_gpu_and_a_note_on_the_cpu_for_who_asked(folder, tmp_path):
    config, args = build_config(arguments(folder)), arguments(folder)
    gate, remarks = watch_of(config, "cuda:0", args)
    assert isinstance(gate, LiveGate) and gate.every == 500 and gate.seed == 11 and remarks == []
    assert watch_of(config, "cpu", args) == (None, [])
    off = arguments(folder, "--parity-every", "0")
    assert watch_of(build_config(off), "cuda:0", off) == (None, [])
    asked = arguments(folder, "--parity-every", "9")
    none, remarks = watch_of(build_config(asked), "cpu", asked)
    assert none is None and len(remarks) == 1
    pretrain(build_config(asked), tmp_path / "run", "cpu", [], remarks=remarks)
    assert next(e["text"] for e in events(tmp_path / "run", "note")) == remarks[0]
    assert events(tmp_path / "run", "parity") == []


def test_resuming_keeps_the_number_and_may_change_it(folder, tmp_path, capsys):
    run_dir, tail = str(tmp_path / "run"), ["--device", "cpu", "--run-dir", str(tmp_path / "run")]
    flags = ["--config", str(folder / "run.yaml"), "--dataset", str(folder / "texts"), "--parity-every", "3"]
    assert main(["pretrain", *flags, *tail]) == 0
    assert read_run(tmp_path / "run").parity_every == 3
    assert main(["pretrain", "--resume", "--parity-every", "0", *tail]) == 0
    assert main(["pretrain", "--resume", *tail]) == 0
    assert main(["pretrain", "--resume", "--lr", "1", *tail]) == 2
    assert main(["pretrain", "--resume", "--parity-every", "-1", "--device", "cpu", "--run-dir", run_dir]) == 2
    capsys.readouterr()
