"""The live gate on a GPU: sound steps pass and are not disturbed, planted faults are caught, a run ends with 5."""

import dataclasses
import json
import time

import numpy as np
import pytest
from models import FAMILIES, random_batch, random_params, train_config

from apr.cli.main import main
from apr.dtypes import BY_NAME
from apr.errors import GateError
from apr.params import NORM
from apr.presets import qwen2_0_5b
from apr.tools.live_gate import LiveGate
from apr.train import checkpoint
from apr.train.cuda_trainer import CudaTransformerTrainer

BOTH = pytest.mark.parametrize("precision", ["fp32", "bf16"])
T, LR = 300, 1e-3
MODELS = {name: dataclasses.replace(c, head_dim=64, num_hidden_layers=3, hidden_size=128, intermediate_size=320,
                                    vocab_size=307, max_position_embeddings=512) for name, c in FAMILIES.items()}
O_PROJ = "model.layers.{}.self_attn.o_proj.weight"


def trainer_of(dev, precision, family="qwen2", **settings):
    """A trainer with weights at which every constant shows."""
    dev.cache.frozen = False
    config = MODELS[family]
    return CudaTransformerTrainer.with_model(config, random_params(config, 5), train_config(
        precision=precision, **{"max_seq_len": T, **settings}), dev)


def batches(step, count=1, rows=4, length=T):
    return [random_batch(100 * step + i, rows, length, 307) for i in range(count)]


def checked(trainer, gate, step, micro, between=lambda: None):
    """A step under the gate; `between` happens after it has read what the step changes."""
    gate.before(trainer, step, micro)
    between()
    trainer.train_batch(micro, LR)
    return gate.after(trainer, step, LR)


@BOTH
@pytest.mark.parametrize("family", MODELS)
def test_sound_steps_pass(dev, family, precision):
    """Kernel by kernel, as it is recorded, and as graphs; lengths and rows that divide by nothing."""
    trainer, gate = trainer_of(dev, precision, family), LiveGate(1, 3)
    events = [checked(trainer, gate, step, batches(step)) for step in range(8)]
    events += [checked(trainer, gate, 8 + i, batches(8 + i, 1, 3, 77)) for i in range(4)]
    assert {e["layer"] for e in events} == {0, 1, 2} and all(e["gradient"] for e in events)
    print(family, precision, max((e["worst"] for e in events), key=lambda w: w["relative_l2"] / w["limit"]))
    assert all(0 < e["worst"]["relative_l2"] <= 0.8 * e["worst"]["limit"] for e in events), events


@BOTH
def test_several_micro_batches_and_parts_pass(dev, precision):
    trainer, gate = trainer_of(dev, precision), LiveGate(1, 3)
    for step in range(4):
        assert checked(trainer, gate, step, batches(step, 3))["gradient"] is False
        assert checked(trainer, gate, step, batches(step, 2, 6))["gradient"] is False  # 4 and 2 sequences each


@BOTH
@pytest.mark.alone
def test_looking_changes_no_bit_and_takes_no_memory(dev, precision):
    plain, watched, gate = trainer_of(dev, precision), trainer_of(dev, precision), LiveGate(1, 3)
    free = None
    for step in range(6):
        assert plain.train_batch(batches(step), LR) == (checked(watched, gate, step, batches(step))
                                                        and watched.last_stats.loss)
        if step == 3:
            free = dev.free_bytes()[0], dev.cupy.get_default_memory_pool().total_bytes()
    assert (dev.free_bytes()[0], dev.cupy.get_default_memory_pool().total_bytes()) == free
    assert plain.parameters_sha256() == watched.parameters_sha256()
    assert plain.optimizer_state_sha256() == watched.optimizer_state_sha256()
    assert watched._seen.keys() == plain._seen.keys() and all(watched._seen.values())


def spoiled(trainer, buffer, name, change):
    """A parameter, or its m or v, changed on the device."""
    def between():
        spec = next(s for s in trainer.layout.specs if s.name == name)
        part = trainer.arena.part(buffer, trainer.layout.offset(name), (spec.size,))
        host = trainer.dev.download(part)
        values = host.view(BY_NAME["BF16"].numpy) if host.dtype == np.uint16 else host
        trainer.dev.upload(part, change(values.astype(np.float32)).astype(values.dtype))
    return between


@BOTH
@pytest.mark.parametrize(("name", "stage"), [
    (O_PROJ, r"L0\d.attn_out"), ("model.layers.{}.self_attn.k_proj.bias", r"L0\d.k_rope"),
    ("model.layers.{}.mlp.up_proj.weight", r"L0\d.ffn_out"), (NORM, "final_norm")])
def test_a_weight_that_changes_under_the_step_is_caught(dev, precision, name, stage):
    trainer, gate = trainer_of(dev, precision), LiveGate(1, 3)
    for step in range(3):
        checked(trainer, gate, step, batches(step))
    def between():
        for layer in range(3):
            spoiled(trainer, "params", name.format(layer), lambda w: w * 1.05)()
    with pytest.raises(GateError, match=rf"INV-TRAIN-PARITY {stage} at step 3"):
        checked(trainer, gate, 3, batches(3), between)


@BOTH
@pytest.mark.parametrize(("buffer", "stage"), [("m", "AdamW's m of"), ("v", "AdamW's v of")])
def test_a_moment_that_changes_under_the_step_is_caught(dev, precision, buffer, stage):
    trainer, gate = trainer_of(dev, precision), LiveGate(1, 3)
    for step in range(3):
        checked(trainer, gate, step, batches(step))
    def between():
        for spec in trainer.layout.specs:
            spoiled(trainer, buffer, spec.name, lambda a: a * 1.001)()
    with pytest.raises(GateError, match=f"INV-TRAIN-PARITY {stage}"):
        checked(trainer, gate, 3, batches(3), between)


@BOTH
@pytest.mark.parametrize(("change", "stage"), [
    ({"rms_norm_eps": 1e-3}, r"L0\d.v_bias"), ({"rope_theta": 1e4}, r"L0\d.q_rope")])
def test_kernels_with_another_constant_are_caught(dev, precision, change, stage):
    """What the kernels have baked in is the model's; what the gate reads of the trainer is another one's."""
    trainer, gate = trainer_of(dev, precision), LiveGate(1, 3)
    trainer.model = dataclasses.replace(trainer.model, **change)
    with pytest.raises(GateError, match=f"INV-TRAIN-PARITY {stage}"):
        checked(trainer, gate, 0, batches(0))


@BOTH
def test_gradients_that_are_added_to_those_of_the_step_before_are_caught(dev, precision, monkeypatch):
    trainer, gate = trainer_of(dev, precision), LiveGate(1, 3)
    checked(trainer, gate, 0, batches(0))
    product = trainer.gemm.linear_dweight
    monkeypatch.setattr(trainer.gemm, "linear_dweight", lambda *arrays, add: product(*arrays, add=True))
    with pytest.raises(GateError, match=r"INV-TRAIN-PARITY L0\d.gate_up weight gradient"):
        checked(trainer, gate, 1, batches(1))


def command(folder, run_dir, *more):
    (folder / "live.yaml").write_text((folder / "run.yaml").read_text().replace("head_dim: 8", "head_dim: 32"))
    return ["pretrain", "--config", str(folder / "live.yaml"), "--dataset", str(folder / "texts"), "--device", "cuda",
            "--run-dir", str(run_dir), "--steps-per-epoch", "4", "--num-steps", "12", *more]


def test_a_run_with_a_fault_ends_with_5_and_goes_on_from_the_checkpoint_before(dev, folder, tmp_path, monkeypatch):
    """The fault begins with step 5, the gate looks at step 6, the last checkpoint is of step 4."""
    right = CudaTransformerTrainer._step

    def faulty(self, micro, dloss, lr):
        if self.step >= 5:
            for layer in range(self.model.L):
                spoiled(self, "params", O_PROJ.format(layer), np.zeros_like)()
        return right(self, micro, dloss, lr)

    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert main(command(folder, whole, "--parity-every", "0")) == 0
    monkeypatch.setattr(CudaTransformerTrainer, "_step", faulty)
    assert main(command(folder, run_dir, "--parity-every", "2")) == 5
    monkeypatch.setattr(CudaTransformerTrainer, "_step", right)
    events = [json.loads(line) for line in (run_dir / "train.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "parity"] == [0, 2, 4]
    guard, end = events[-2:]
    assert (guard["event"], guard["gate"], guard["step"]) == ("guard", "INV-TRAIN-PARITY", 6)
    assert (end["event"], end["status"]) == ("end", "ABORTED")
    assert checkpoint.latest(run_dir / "ckpt", print).state["step"] == 4
    assert main(["pretrain", "--resume", "--device", "cuda", "--run-dir", str(run_dir)]) == 0
    ended = [checkpoint.latest(d / "ckpt", print).state for d in (whole, run_dir)]
    assert [s["step"] for s in ended] == [12, 12]
    for of in ("parameters_sha256", "optimizer_sha256"):
        assert ended[0][of] == ended[1][of]


@pytest.mark.alone
def test_the_cost_is_under_one_percent_of_500_steps(dev, capsys):
    """Qwen2-0.5B in bf16, 8 sequences of 2048 tokens: the real shape, which must pass too."""
    dev.cache.frozen = False
    trainer = CudaTransformerTrainer.new(qwen2_0_5b, train_config(precision="bf16", batch_size=8, max_seq_len=2048,
                                                                  lr=1e-4), dev)
    micro = [random_batch(0, 8, 2048, qwen2_0_5b.V)]
    gate, events = LiveGate(1, 3), []
    for step in range(5):
        events.append(checked(trainer, gate, step, micro))
    begin = time.perf_counter()
    for _ in range(5):
        trainer.train_batch(micro, LR)
    step_ms, cost = (time.perf_counter() - begin) * 200, min(e["ms"] for e in events[1:])
    with capsys.disabled():
        print(f"\nlive gate: {[e['ms'] for e in events]} ms a check, {step_ms:.1f} ms a step, "
              f"{cost / (500 * step_ms):.2%} at K = 500; worst {[e['worst'] for e in events]}")
    assert all(e["worst"]["relative_l2"] <= 0.8 * e["worst"]["limit"] for e in events), events
    assert cost < 0.01 * 500 * step_ms
