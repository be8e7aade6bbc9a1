"""CudaTransformerTrainer: the CPU trainer's losses, evaluation that nothing disturbs, and what it refuses."""

import dataclasses
import math

import numpy as np
import pytest
from compare import assert_close
from hf_models import BF16, write_folder
from models import FAMILIES, random_batch, train_config

from apr.config import IGNORE
from apr.data.batch import LMBatch
from apr.errors import FormatError, OutOfMemoryError, ShapeError, UnavailableError
from apr.formats.model_file import load_model
from apr.presets import preset
from apr.train.build import build_cuda_trainer_with_init
from apr.train.cuda_trainer import CudaTransformerTrainer
from apr.train.trainer import TransformerTrainer

WIDE = {name: dataclasses.replace(c, head_dim=32) for name, c in FAMILIES.items()}  # a head size that bf16 covers
SMALL = WIDE["qwen2"]
BOTH = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def trainer(dev, model=SMALL, **settings) -> CudaTransformerTrainer:
    """A small trainer; options of the GPU trainer and fields of the configuration together."""
    options = {k: settings.pop(k) for k in ("graphs", "poison", "chosen") if k in settings}
    return CudaTransformerTrainer.new(model, train_config(**settings), dev, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_ten_losses_norms_and_every_parameter_are_the_cpu_trainers(dev, name):
    """With the golden files' eps of 1e-6: at 1e-8 AdamW makes full steps of gradients that are rounding alone."""
    settings = {"lr": 1e-3, "adam_eps": 1e-6}
    for family in (FAMILIES, WIDE):
        gpu = trainer(dev, family[name], **settings)
        cpu = TransformerTrainer.new(family[name], train_config(**settings))
        for key, value in cpu.params.items():
            assert np.array_equal(gpu.params[key], value), f"{key} starts differently"
        for step in range(10):
            batch = random_batch(step)
            assert abs(gpu.train_batch(batch) - cpu.train_batch(batch)) <= 1e-5, f"loss of step {step}"
            assert abs(gpu.last_grad_norm - cpu.last_grad_norm) <= 5e-5 * cpu.last_grad_norm
            assert gpu.last_stats.lr == cpu.last_stats.lr and gpu.step == cpu.step
        after = gpu.params
        for key, value in cpu.params.items():
            assert_close(after[key], value, 5e-5, f"{key} after ten steps")


@BOTH
def test_every_gradient_is_there_and_every_parameter_moves(dev, precision):
    for name, model in WIDE.items():
        t = trainer(dev, model, precision=precision)
        before = t.params
        t.train_batch(random_batch(0))
        after, grads = t.params, t.grads
        assert [k for k in after if not np.any(grads[k])] == [], f"{name}: a dropped gradient"
        assert [k for k in after if np.array_equal(after[k], before[k])] == [], f"{name}: a parameter that stands still"


@BOTH
def test_graphs_and_poison_change_no_bit(dev, precision):
    """The same three steps kernel by kernel, as graphs, and with every buffer full of NaN before each pass."""
    hashes, losses = set(), set()
    for options in ({"graphs": False}, {"graphs": True}, {"graphs": True, "poison": True}):
        t = trainer(dev, precision=precision, **options)
        losses.add(tuple(t.train_batch([random_batch(s), random_batch(s + 9)]) for s in range(4)))
        hashes.add((t.parameters_sha256(), t.optimizer_state_sha256()))
    assert len(hashes) == 1 and len(losses) == 1 and all(map(math.isfinite, losses.pop()))


@BOTH
def test_a_graph_is_of_its_kind_and_its_shape(dev, precision):
    """Evaluated and trained in turns on batches that differ in length alone, thrice each: run, recorded, replayed."""
    long, short = random_batch(0), random_batch(1, length=9)
    runs = []
    for graphs in (False, True):
        t = trainer(dev, precision=precision, graphs=graphs)
        losses = [[t.eval_batch(long), t.train_batch(long), t.train_batch(short), t.eval_batch(short)]
                  for _ in range(3)]
        runs.append((losses, t.parameters_sha256(), t.optimizer_state_sha256()))
    assert runs[0] == runs[1]


@BOTH
def test_evaluation_is_independent_of_training(dev, precision):
    """Upstream's evaluation was 1500 times too small: it read what training had left."""
    t, held, other = trainer(dev, precision=precision, poison=True), random_batch(50), random_batch(51)
    first = t.eval_batch(held)
    assert abs(first - math.log(SMALL.V)) < 0.5
    assert t.eval_batch(held) == first
    t.train_batch(other, lr=0.0)
    assert t.eval_batch(held) == first
    smaller = LMBatch(held.inputs[:1, :5], held.targets[:1, :5])
    alone = t.eval_batch(smaller)
    t.eval_batch(other)
    assert t.eval_batch(smaller) == alone  # a larger batch leaves no tail
    assert abs(t.gradients(held, 1.0) / held.num_tokens - first) <= 1e-6  # train's forward is eval's
    tokens = held.num_tokens + smaller.num_tokens
    mean = (first * held.num_tokens + alone * smaller.num_tokens) / tokens
    assert abs(t.eval_batches([held, smaller]) - mean) <= 1e-6  # over tokens, no mean of means


@BOTH
def test_a_later_token_changes_nothing_before_it(dev, precision):
    t, ids = trainer(dev, precision=precision), random_batch(3).inputs
    before = t.forward_logits(ids)
    changed = ids.copy()
    changed[:, 9] = (changed[:, 9] + 1) % SMALL.V
    after = t.forward_logits(changed)
    assert np.array_equal(before[:, :9], after[:, :9]) and not np.array_equal(before[:, 9:], after[:, 9:])


@BOTH
def test_sequences_do_not_see_each_other(dev, precision):
    t, ids = trainer(dev, precision=precision), random_batch(4).inputs
    assert np.array_equal(t.forward_logits(ids)[::-1], t.forward_logits(ids[::-1]))


def test_weights_of_zero_give_ln_v(dev):
    t = trainer(dev)
    t.load_params({k: np.zeros_like(v) for k, v in t.params.items()})
    assert abs(t.eval_batch(random_batch(5)) - math.log(SMALL.V)) <= 1e-6


@BOTH
def test_accumulation_is_the_whole_batch(dev, precision):
    """Ragged micro-batches, one of them larger than planned."""
    sequences = [list(range(1 + i, 6 + 2 * i)) for i in range(6)]
    whole = LMBatch.from_sequences(sequences, 0, 5)
    parts = [LMBatch(whole.inputs[i:i + 1], whole.targets[i:i + 1]) for i in range(6)]
    a, b, c = (trainer(dev, precision=precision, batch_size=n) for n in (6, 1, 4))
    losses = [a.train_batch(whole), b.train_batch(parts), c.train_batch(whole)]
    assert max(losses) - min(losses) <= (1e-6 if precision == "fp32" else 1e-3)
    for other in (b, c):
        for key, value in a.grads.items():
            assert_close(other.grads[key], value, 1e-5 if precision == "fp32" else 2e-2, key)


@BOTH
def test_what_is_not_finite_is_not_applied(dev, precision):
    t = trainer(dev, precision=precision)
    t.train_batch(random_batch(0))
    params = t.params
    params["model.norm.weight"][3] = np.nan
    t.load_params(params)
    state, parameters = t.optimizer_state_sha256(), t.parameters_sha256()
    for _ in range(3):  # kernel by kernel, recorded, replayed
        assert math.isnan(t.train_batch(random_batch(1)))
        assert not t.last_stats.applied and t.step == 1
    assert (t.optimizer_state_sha256(), t.parameters_sha256()) == (state, parameters)
    params["model.norm.weight"][3] = 1.0
    t.load_params(params)
    t.train_batch(random_batch(1))
    assert t.last_stats.applied and t.step == 2


def test_no_counted_target_applies_nothing(dev):
    t, before = trainer(dev), random_batch(0)
    start = t.parameters_sha256()
    assert math.isnan(t.train_batch(LMBatch(before.inputs, np.full_like(before.targets, IGNORE))))
    assert t.step == 0 and not t.last_stats.applied and t.parameters_sha256() == start
    with pytest.raises(ShapeError):
        t.eval_batch(LMBatch(before.inputs, np.full_like(before.targets, IGNORE)))


@BOTH
def test_overfits_one_batch_and_not_another(dev, precision):
    t, batch, held = trainer(dev, precision=precision, max_steps=80), random_batch(1), random_batch(2)
    for _ in range(80):
        loss = t.train_batch(batch)
    assert loss < 0.2 and t.eval_batch(held) > math.log(SMALL.V)  # random tokens cannot be known beforehand


def test_tied_weights_are_one_buffer(dev):
    t = trainer(dev)
    table = t.net.matrix("params", "model.embed_tokens.weight")
    assert SMALL.tie_word_embeddings and t.net.head == "model.embed_tokens.weight"
    assert t.net.matrix("params", t.net.head).data.ptr == table.data.ptr
    untied = trainer(dev, dataclasses.replace(SMALL, tie_word_embeddings=False))
    assert untied.net.matrix("params", untied.net.head).data.ptr != untied.net.matrix(
        "params", "model.embed_tokens.weight").data.ptr


def test_a_saved_model_is_the_trainers_and_builds_another(dev, tmp_path):
    t = trainer(dev, precision="bf16")
    t.train_batch(random_batch(0))
    t.save_apr(tmp_path / "model.apr")
    config, arrays, _ = load_model(tmp_path / "model.apr")
    assert config == SMALL and all(np.array_equal(arrays[k], v) for k, v in t.params.items())
    built = build_cuda_trainer_with_init(1e-3, 16, 7, SMALL, tmp_path / "model.apr", batch_size=4)
    assert built.config.precision == "bf16" and built.step == 0
    assert built.parameters_sha256() == t.parameters_sha256()
    assert not any(state.any() for state in built.optimizer_state().values())
    held = random_batch(1)
    assert built.eval_batch(held) == t.eval_batch(held)


def test_a_trainer_from_a_folder_in_bf16(dev, tmp_path):
    """The folder of a maker gives the same master weights and the same losses as the arrays themselves."""
    arrays = {k: v.astype(BF16) for k, v in trainer(dev).params.items()}
    built = build_cuda_trainer_with_init(1e-3, 16, 7, SMALL, write_folder(tmp_path / "m", SMALL, arrays, 3),
                                         batch_size=4)
    direct = CudaTransformerTrainer.with_model(SMALL, arrays, built.config, dev)
    assert built.config.precision == "bf16" and built.step == 0
    assert all(np.array_equal(built.params[k], v.astype(np.float32)) for k, v in arrays.items())
    assert not any(state.any() for state in built.optimizer_state().values())  # INIT-009
    for step in range(3):
        assert built.train_batch(random_batch(step)) == direct.train_batch(random_batch(step))
    snapshot = built.snapshot()
    assert (snapshot.parameters_sha256, snapshot.optimizer_state_sha256) == (
        direct.parameters_sha256(), direct.optimizer_state_sha256())


def test_bad_batches_are_refused(dev):
    t, batch = trainer(dev), random_batch(0)
    for inputs, targets in ((batch.inputs + SMALL.V, batch.targets), (batch.inputs - SMALL.V, batch.targets),
                            (batch.inputs, batch.targets + SMALL.V), (batch.inputs, batch.targets - 99)):
        with pytest.raises(ShapeError, match="token ids"):
            t.train_batch(LMBatch(inputs, targets))
    with pytest.raises(ShapeError, match="sequences of 1 to 16"):
        t.forward_logits(np.zeros((1, 17), np.int32))
    with pytest.raises(FormatError):
        CudaTransformerTrainer.with_model(SMALL, {}, train_config(), dev)


def test_what_the_kernels_do_not_cover_is_refused(dev):
    with pytest.raises(UnavailableError, match="head_dim"):
        trainer(dev, FAMILIES["llama"], precision="bf16")
    with pytest.raises(UnavailableError, match="head_dim"):
        trainer(dev, dataclasses.replace(SMALL, head_dim=130))


@pytest.mark.alone
def test_what_does_not_fit_is_refused_before_anything_is_allocated(dev):
    free, _ = dev.free_bytes()
    with pytest.raises(OutOfMemoryError, match="GiB free") as caught:
        trainer(dev, preset("qwen2_7b"), precision="bf16", batch_size=64, max_seq_len=4096)
    assert "lower --batch-size" in str(caught.value) and dev.free_bytes()[0] == free


@pytest.mark.alone
def test_a_step_allocates_nothing_on_the_device(dev):
    t = trainer(dev, precision="bf16")
    for s in range(3):
        t.train_batch(random_batch(s))
        t.eval_batch(random_batch(s))
    free = dev.free_bytes()
    for s in range(20):
        t.train_batch(random_batch(s))
        t.eval_batch(random_batch(s))
    assert dev.free_bytes() == free
    assert dev.cache.frozen
