"""One copy on the host per checkpoint, and a GPU's warnings in the log: with stand-ins that count and complain."""

import json

import pytest
from models import SMALL, random_batch, train_config
from test_run import arguments

import apr.train.build
import apr.train.run
from apr.cli.pretrain import build_config
from apr.train import checkpoint
from apr.train.run import pretrain, read_run, resume
from apr.train.snapshot import sha256_of
from apr.train.trainer import TransformerTrainer

COMPLAINT = "kernel cache: /somewhere cannot be written"


class Fetching(TransformerTrainer):
    """A trainer whose arrays are copies, as a GPU's, each fetch counted by the updates made so far."""

    def __init__(self, model, config):
        self.fetched = {"params": [], "optimizer": []}
        super().__init__(model, config)
        self.counting = True

    @property
    def params(self):
        if not getattr(self, "counting", False):
            return self._params
        self.fetched["params"].append(self.step)
        return {k: v.copy() for k, v in self._params.items()}

    def optimizer_state(self):
        if getattr(self, "counting", False):
            self.fetched["optimizer"].append(self.step)
        return super().optimizer_state()

    @classmethod
    def new(cls, model, config):
        trainer, plain = cls(model, config), TransformerTrainer.new(model, config)
        trainer.load_params(plain.params)
        return trainer


def test_each_checkpoint_fetches_once(folder, tmp_path, monkeypatch):
    made = []

    def make(model, config, device, *_, **__):
        made.append(Fetching.new(model, config))
        return made[-1]

    monkeypatch.setattr(apr.train.run, "make_trainer", make)
    pretrain(build_config(arguments(folder)), tmp_path / "run", "cpu", [])
    assert made[0].fetched == {"params": [0, 8, 16, 24], "optimizer": [0, 8, 16, 24]}
    monkeypatch.undo()
    pretrain(build_config(arguments(folder)), tmp_path / "plain", "cpu", [])
    states = [checkpoint.latest(tmp_path / name / "ckpt", print).state for name in ("run", "plain")]
    assert states[0]["parameters_sha256"] == states[1]["parameters_sha256"]
    assert states[0]["optimizer_sha256"] == states[1]["optimizer_sha256"]
    name = "ckpt/epoch-002.apr"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_snapshots_hashes_are_the_trainers():
    trainer = TransformerTrainer.new(SMALL, train_config())
    trainer.train_batch(random_batch(0))
    snapshot = trainer.snapshot()
    assert snapshot.parameters_sha256 == trainer.parameters_sha256() == sha256_of(trainer.params)
    assert snapshot.optimizer_state_sha256 == trainer.optimizer_state_sha256() and snapshot.step == 1
    assert sha256_of(snapshot.optimizer, 2) != snapshot.optimizer_state_sha256
    renamed = {f"x{name}": array for name, array in snapshot.params.items()}
    assert sha256_of(renamed) != snapshot.parameters_sha256  # the same bytes under other names
    assert all(view.base is not None for view in snapshot.params.values())  # the CPU's own memory


@pytest.fixture
def complaining(monkeypatch):
    """A GPU that is a CPU, whose kernel cache complains while the trainer is made."""
    class Device:
        def __init__(self, ordinal, folder=None, warn=None):
            self.warn = warn

    class Trainer:
        @staticmethod
        def new(model, config, device, chosen=None):
            device.warn(COMPLAINT)
            return TransformerTrainer.new(model, config)

        @staticmethod
        def with_model(model, params, config, device, chosen=None):
            device.warn(COMPLAINT)
            return TransformerTrainer.with_model(model, params, config)

    monkeypatch.setattr(apr.train.build, "Device", Device)
    monkeypatch.setattr(apr.train.build, "CudaTransformerTrainer", Trainer)
    monkeypatch.setattr(apr.train.run, "device_versions", lambda device: {})


def test_warnings_of_the_kernel_cache_reach_the_log_and_the_display(folder, tmp_path, complaining):
    seen = []
    config = build_config(arguments(folder, "--num-steps", "8"))
    pretrain(config, tmp_path / "run", "cuda:0", [seen.append])
    resume(read_run(tmp_path / "run"), tmp_path / "run", "cuda:0", [seen.append], print)
    said = [(e["step"], e["text"]) for e in seen if e["event"] == "note" and "kernel cache" in e["text"]]
    assert said == [(0, COMPLAINT), (8, COMPLAINT)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert sum(e["event"] == "note" and "kernel cache" in e["text"] for e in lines) == 2
