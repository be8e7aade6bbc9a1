"""TransformerTrainer: steps, accumulation, evaluation, hashes, and what it refuses."""

import math

import numpy as np
import pytest
from compare import assert_close
from golden_file import NAMES, load
from models import FAMILIES, SMALL, random_batch, train_config

import apr.train.trainer
from apr.config import IGNORE
from apr.data.batch import LMBatch
from apr.errors import ConfigError, FormatError, ShapeError, UnavailableError
from apr.formats.model_file import load_model
from apr.reference.model import model_forward
from apr.train.schedule import lr_at
from apr.train.trainer import TransformerTrainer


def test_every_parameter_moves_in_one_step():
    for name, model in FAMILIES.items():
        trainer = TransformerTrainer.new(model, train_config())
        before = {k: v.copy() for k, v in trainer.params.items()}
        trainer.train_batch(random_batch(0))
        still = [k for k, v in trainer.params.items() if np.array_equal(v, before[k])]
        assert still == [], f"{name}: a dropped parameter has no gradient"


def test_loss_starts_at_ln_v_and_falls_on_one_batch():
    trainer, batch = TransformerTrainer.new(SMALL, train_config(max_steps=60)), random_batch(1)
    losses = [trainer.train_batch(batch) for _ in range(60)]
    assert abs(losses[0] - math.log(SMALL.V)) < 0.2
    assert losses[-1] < 0.3 * losses[0]


def test_accumulation_is_the_whole_batch():
    """Ragged micro-batches: a mean of means would weigh their tokens differently."""
    sequences = [list(range(1 + i, 4 + 3 * i)) for i in range(4)]
    whole = LMBatch.from_sequences(sequences, 0, 5)
    parts = [LMBatch(whole.inputs[i:i + 1], whole.targets[i:i + 1]) for i in range(4)]
    a, b = (TransformerTrainer.new(SMALL, train_config()) for _ in range(2))
    loss_a, loss_b = a.train_batch(whole), b.train_batch(parts)
    assert abs(loss_a - loss_b) < 1e-6
    assert_close(b.grads_buf, a.grads_buf, 1e-6, "accumulated gradient")
    assert abs(a.last_grad_norm - b.last_grad_norm) < 1e-6 * a.last_grad_norm


def test_the_lr_that_is_given_is_the_lr_that_is_applied():
    a, b, c = (TransformerTrainer.new(SMALL, train_config(lr_min=1e-4, warmup_steps=2)) for _ in range(3))
    start = a.params_buf.copy()
    a.train_batch(random_batch(2), lr=0.0)
    assert np.array_equal(a.params_buf, start) and a.last_stats.lr == 0.0
    b.train_batch(random_batch(2), lr=1e-3)
    c.train_batch(random_batch(2))
    assert b.last_stats.lr == 1e-3 and c.last_stats.lr == lr_at(c.config, 0)
    assert not np.array_equal(b.params_buf, c.params_buf)


def test_grad_norm_is_of_the_whole_gradient_before_clipping():
    trainer = TransformerTrainer.new(SMALL, train_config(max_grad_norm=1e-3))
    trainer.train_batch(random_batch(3))
    whole = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in trainer.grads.values()))
    assert abs(trainer.last_grad_norm - whole) < 1e-6 * whole and whole > 1e-3


def test_eval_changes_nothing_and_reads_nothing_that_training_left():
    trainer = TransformerTrainer.new(SMALL, train_config())
    batch, other = random_batch(4), random_batch(5, rows=6)
    first = trainer.eval_batch(batch)
    state = trainer.parameters_sha256(), trainer.optimizer_state_sha256()
    assert trainer.eval_batch(batch) == first
    assert (trainer.parameters_sha256(), trainer.optimizer_state_sha256()) == state
    trainer.train_batch(other, lr=0.0)
    state = trainer.parameters_sha256(), trainer.optimizer_state_sha256()
    assert trainer.eval_batch(batch) == first
    assert (trainer.parameters_sha256(), trainer.optimizer_state_sha256()) == state
    assert abs(trainer.train_batch(batch, lr=0.0) - first) < 1e-6


def test_eval_weighs_tokens_and_not_batches():
    trainer = TransformerTrainer.new(SMALL, train_config())
    large, small = random_batch(6, rows=5), LMBatch.from_sequences([[1, 2, 3]], 0, 4)
    expected = (trainer.eval_batch(large) * large.num_tokens + trainer.eval_batch(small) * small.num_tokens) / (
        large.num_tokens + small.num_tokens)
    assert abs(trainer.eval_batches([large, small]) - expected) < 1e-9


def test_a_batch_without_targets_applies_nothing():
    trainer, batch = TransformerTrainer.new(SMALL, train_config()), random_batch(7)
    masked = LMBatch(batch.inputs, np.full_like(batch.targets, IGNORE))
    before = trainer.parameters_sha256(), trainer.optimizer_state_sha256()
    assert math.isnan(trainer.train_batch(masked)) and not trainer.last_stats.applied
    assert (trainer.parameters_sha256(), trainer.optimizer_state_sha256()) == before
    with pytest.raises(ShapeError):
        trainer.eval_batch(masked)


def test_a_non_finite_gradient_applies_nothing():
    trainer = TransformerTrainer.new(SMALL, train_config())
    trainer.params["model.layers.0.mlp.up_proj.weight"][0, 0] = np.inf
    before = trainer.parameters_sha256(), trainer.optimizer_state_sha256()
    with np.errstate(all="ignore"):
        trainer.train_batch(random_batch(8))
    assert not trainer.last_stats.applied
    assert (trainer.parameters_sha256(), trainer.optimizer_state_sha256()) == before


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1e-3), (math.inf, 1e-3), (3.0, math.nan), (3.0, math.inf)])
def test_neither_loss_nor_norm_alone_gives_permission(monkeypatch, loss, gradient):
    trainer = TransformerTrainer.new(SMALL, train_config())
    before = trainer.parameters_sha256(), trainer.optimizer_state_sha256()

    def broken(params, grads, *_):
        grads["model.norm.weight"][3] = gradient
        return loss

    monkeypatch.setattr(apr.train.trainer, "loss_and_gradients", broken)
    trainer.train_batch(random_batch(8))
    assert not trainer.last_stats.applied and trainer.step == 0
    assert (trainer.parameters_sha256(), trainer.optimizer_state_sha256()) == before


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_of_the_trainer_are_hugging_faces(name):
    """The golden files' losses, norms and final weights, with the trainer's own clipping, decay and step count."""
    golden = load(name)
    a, arrays = golden.adamw, golden.arrays
    config = train_config(lr=a["lr"], beta1=a["betas"][0], beta2=a["betas"][1], adam_eps=a["eps"],
                          weight_decay=a["weight_decay"], max_grad_norm=a["max_grad_norm"])
    trainer = TransformerTrainer.with_model(golden.config, {k: v.copy() for k, v in golden.group("param").items()},
                                            config)
    for step, (loss, norm) in enumerate(zip(arrays["losses"], arrays["norms"], strict=True)):
        ours = trainer.train_batch(LMBatch(arrays["inputs"][step], arrays["targets"][step]), lr=a["lr"])
        assert abs(ours - loss) <= 1e-5, f"loss of step {step}"
        assert abs(trainer.last_grad_norm - norm) <= 5e-5 * norm, f"gradient norm of step {step}"
    for key, value in golden.group("final").items():
        assert_close(trainer.params[key], value, 5e-5, f"{key} after ten steps")


def test_going_on_from_a_state_is_the_same_training():
    through = TransformerTrainer.new(SMALL, train_config())
    for seed in range(3):
        through.train_batch(random_batch(seed))
    again = TransformerTrainer.with_model(SMALL, {k: v.copy() for k, v in through.params.items()}, train_config())
    again.load_optimizer({k: v.copy() for k, v in through.optimizer_state().items()}, through.step)
    for trainer in (through, again):
        trainer.train_batch(random_batch(3))
    assert again.parameters_sha256() == through.parameters_sha256()
    assert again.optimizer_state_sha256() == through.optimizer_state_sha256() and again.last_stats == through.last_stats


def test_hashes_see_every_bit_and_the_step():
    trainer = TransformerTrainer.new(SMALL, train_config())
    trainer.train_batch(random_batch(9))
    state = trainer.optimizer_state_sha256()
    trainer.v_buf[3] = np.nextafter(trainer.v_buf[3], np.float32(1))
    assert trainer.optimizer_state_sha256() != state
    weights = trainer.parameters_sha256()
    trainer.params["model.norm.weight"][5] = np.nextafter(trainer.params["model.norm.weight"][5], np.float32(2))
    assert trainer.parameters_sha256() != weights


def test_same_seed_same_bits_other_seed_other_losses():
    def losses(seed):
        trainer = TransformerTrainer.new(SMALL, train_config(seed=seed))
        return [trainer.train_batch(random_batch(i)) for i in range(10)], trainer.parameters_sha256()
    assert losses(1) == losses(1)
    pairs = zip(losses(1)[0], losses(2)[0], strict=True)
    assert max(abs(a - b) for a, b in pairs) > 1e-4  # INV-TRAIN-006's counter-test


def test_saved_model_computes_the_same(tmp_path):
    trainer = TransformerTrainer.new(SMALL, train_config())
    trainer.train_batch(random_batch(10))
    trainer.save_apr(tmp_path / "m.apr")
    config, arrays, _ = load_model(tmp_path / "m.apr")
    ids = random_batch(11).inputs
    assert config == SMALL and np.array_equal(model_forward(arrays, config, ids), trainer.forward_logits(ids))
    again = TransformerTrainer.with_model(config, arrays, train_config())
    assert again.parameters_sha256() == trainer.parameters_sha256() and again.step == 0 and not again.m_buf.any()


def test_refusals():
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        TransformerTrainer.new(SMALL, train_config(max_seq_len=65))
    with pytest.raises(UnavailableError):
        TransformerTrainer.new(SMALL, train_config(precision="bf16"))
    with pytest.raises(FormatError, match=r"q_proj\.bias"):
        arrays = dict(TransformerTrainer.new(SMALL, train_config()).params)
        del arrays["model.layers.1.self_attn.q_proj.bias"]
        TransformerTrainer.with_model(SMALL, arrays, train_config())
    with pytest.raises(ShapeError):
        _ = TransformerTrainer.new(SMALL, train_config()).last_grad_norm
    with pytest.raises(ShapeError, match="T = 65"):
        TransformerTrainer.new(SMALL, train_config()).forward_logits(np.zeros((1, 65), int))


@pytest.mark.parametrize(("change", "says"), [
    ({"extra": np.zeros(1, np.float32)}, "extra"),
    ({"model.norm.weight": np.full(SMALL.C, np.nan, np.float32)}, "finite"),
    ({"model.norm.weight": np.ones(1, np.float32)}, "shape")])
def test_weights_from_outside_are_exactly_the_models(change, says):
    whole = TransformerTrainer.new(SMALL, train_config()).params
    with pytest.raises(FormatError, match=says):
        TransformerTrainer.with_model(SMALL, {**whole, **change}, train_config())
