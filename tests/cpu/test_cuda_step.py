"""The GPU trainer's step without a GPU: what is sent when, what is set and what is added to, what is under way."""

import math
from dataclasses import replace

import numpy as np
import pytest
from lazy_gpu import LazyGemm, LazyGpu
from models import FAMILIES, random_batch, train_config

from apr.data.batch import LMBatch
from apr.errors import ShapeError
from apr.train.cuda_trainer import CudaTransformerTrainer
from apr.train.trainer import TransformerTrainer

SMALL = replace(FAMILIES["qwen2"], head_dim=32)
UNTIED = replace(SMALL, tie_word_embeddings=False)


@pytest.fixture
def made(monkeypatch):
    """Makes trainers on a GPU that does everything late."""
    monkeypatch.setattr("apr.train.cuda_trainer.Gemm", LazyGemm)

    def make(model=SMALL, graphs=True, eager=False, **settings):
        dev = LazyGpu(eager)
        trainer = CudaTransformerTrainer.new(model, train_config(**settings), dev, graphs=graphs)
        dev.arena = trainer.arena
        return trainer
    return make


def total(*batches):
    """What the GPU that is not there makes of batches: the sum of their ids and targets."""
    return float(sum(b.inputs.sum() + b.targets.sum() for b in batches))


@pytest.mark.parametrize("eager", [False, True])
def test_every_step_sees_its_own_batch_and_gives_its_own_numbers(made, eager):
    """Started one ahead, run, recorded and replayed; each copy is made when the next step is already prepared, or all
    is done, the copy of the numbers too, when the host has not yet asked for those before.
    """
    trainer, micro, started = made(eager=eager, accumulation_steps=2), [], []
    for step in range(7):
        micro.append([random_batch(10 * step), random_batch(10 * step + 1)])
        started.append(trainer.start_batch(micro[-1], 0.5 + step))
        if step:
            stats = started[-2].result()
            assert stats.loss * stats.tokens == pytest.approx(total(*micro[step - 1]))
            assert (stats.grad_norm, stats.lr, stats.applied) == (step - 0.5, step - 0.5, True)
            assert trainer.step == step and trainer.last_stats is stats
    assert started[-1].result().lr == 6.5 and trainer.step == 7
    for batch, (ids, targets, _) in zip((b for pair in micro for b in pair), trainer.dev.seen, strict=True):
        assert np.array_equal(ids, batch.inputs.reshape(-1)) and np.array_equal(targets, batch.targets.reshape(-1))
    assert [n[1] for *_, n in trainer.dev.seen] == [0.5 + s for s in range(7) for _ in "ab"]
    assert {n[0] for *_, n in trainer.dev.seen} == {1 / 128}


def test_to_start_a_step_waits_for_nothing(made):
    """With all the parts that the configuration has: the host prepares a whole step while the GPU makes another."""
    trainer = made(accumulation_steps=3)
    handles = [trainer.start_batch([random_batch(s + i) for i in range(3)], 1e-3) for s in range(2)]
    assert trainer.dev.waits == 0 and trainer.dev.seen == []
    handles[0].result()
    assert trainer.dev.waits == 1 and handles[1].stats is None and len(trainer.dev.seen) == 3
    trainer.start_batch([random_batch(9) for _ in range(3)], 1e-3)
    assert trainer.dev.waits == 1 and len(trainer.dev.seen) == 3


def test_more_parts_than_there_is_memory_for_wait_their_turn(made):
    trainer, whole = made(batch_size=1), random_batch(3, rows=9)
    stats = trainer.start_batch(whole, 1e-3).result()
    assert stats.loss * stats.tokens == pytest.approx(total(whole)) and trainer.dev.waits > 1
    assert [ids.tolist() for ids, *_ in trainer.dev.seen] == whole.inputs.tolist()


def test_steps_are_finished_in_order_and_no_more_than_two_are_under_way(made):
    trainer = made()
    a, b = (trainer.start_batch(random_batch(s), 1e-3) for s in range(2))
    c = trainer.start_batch(random_batch(2), 1e-3)
    assert a.stats is not None and b.stats is None
    last = c.result()
    assert b.stats is not None and b.stats.loss != last.loss and trainer.last_stats is last and trainer.step == 3
    assert c.result() is last


def test_what_needs_the_count_of_updates_waits_for_them(made):
    trainer = made()
    for use in (lambda: trainer.snapshot().step, lambda: trainer.optimizer_state_sha256() and trainer.step,
                lambda: trainer.last_grad_norm and trainer.step):
        before = trainer.step
        trainer.start_batch(random_batch(0), 1e-3)
        assert trainer.step == before and use() == before + 1
    trainer.start_batch(random_batch(1), 1e-3)
    trainer.start_batch(random_batch(2))  # by the schedule, which goes by the count
    assert trainer.step == 4
    trainer.start_batch(random_batch(1), 1e-3)
    trainer.load_optimizer(trainer.optimizer_state(), 11)
    assert trainer.step == 11 and trainer.train_batch(random_batch(3), 1e-3) and trainer.step == 12


def test_a_step_that_is_not_finite_is_told_by_its_own_numbers(made):
    trainer = made()
    bad, good = trainer.start_batch(random_batch(0), math.nan), trainer.start_batch(random_batch(1), 0.25)
    assert not bad.result().applied and math.isnan(bad.result().grad_norm)
    assert good.result().applied and good.result().grad_norm == 0.25 and trainer.step == 1


def test_a_batch_without_targets_comes_after_what_is_under_way(made):
    trainer, batch = made(), random_batch(0)
    first = trainer.start_batch(batch, 1e-3)
    none = trainer.start_batch(LMBatch(batch.inputs, np.full_like(batch.targets, -100)), 1e-3)
    assert first.stats is not None and none.result().tokens == 0 and trainer.last_stats is none.stats


def test_a_bad_batch_is_refused_before_anything_is_sent(made):
    trainer, batch = made(), random_batch(0)
    queued = len(trainer.dev.queue)
    with pytest.raises(ShapeError, match="token ids"):
        trainer.start_batch([batch, LMBatch(batch.inputs + 97, batch.targets)], 1e-3)
    assert len(trainer.dev.queue) == queued and trainer.train_batch(batch, 1e-3) > 0


def gradients(trainer, first):
    """Of the last step's log from entry `first` on: what was filled and how matrices were written, in flat memory."""
    flat, out = trainer.arena["grads"], []
    for kind, what in trainer.dev.log[first:]:
        array = what if kind == "fill" else what[0]
        if kind in ("fill", "dweight") and np.shares_memory(array, flat):
            begin = (array.ctypes.data - flat.ctypes.data) // 4
            out.append((kind if kind == "fill" else "add" if what[1] else "set", begin, begin + array.size))
    return out


@pytest.mark.parametrize("model", [SMALL, UNTIED], ids=["tied", "untied"])
def test_a_step_first_sets_every_gradient_and_then_adds(made, model):
    """Every element of every parameter is set or cleared by the first part, once, before anything is added to it."""
    trainer = made(model)
    for _ in range(4):
        first = len(trainer.dev.log)
        trainer.train_batch([random_batch(0), random_batch(1), random_batch(2)], 1e-3)
        log = gradients(trainer, first)
        written = np.zeros(trainer.layout.size, np.int8)
        for kind, begin, end in log:
            assert kind != "add" or (written[begin:end] == 1).all()
            written[begin:end] += kind != "add"
        for spec, offset in zip(trainer.layout.specs, trainer.layout.offsets, strict=True):
            assert (written[offset:offset + spec.room] == 1).all(), spec.name
        matrices = 1 + 4 * model.L
        assert [k for k, *_ in log if k != "fill"] == ["set"] * matrices + ["add"] * 2 * matrices


@pytest.mark.parametrize("model", [SMALL, UNTIED], ids=["tied", "untied"])
def test_gradients_for_comparisons_do_the_same(made, model):
    trainer = made(model, batch_size=2)
    found = []
    for _ in range(2):
        first = len(trainer.dev.log)
        trainer.gradients(random_batch(0, rows=4), 0.5)
        found.append([kind for kind, *_ in gradients(trainer, first)])
    matrices = 1 + 4 * model.L
    assert found[0] == found[1] and found[0].count("set") == found[0].count("add") == matrices
    assert [n[0] for *_, n in trainer.dev.seen] == [0.5] * 4


def test_the_head_in_parts_sets_its_gradient_once(made, monkeypatch):
    monkeypatch.setattr("apr.buffers.LOGITS_BYTES", 128 * SMALL.Vp * 4)
    trainer = made(max_seq_len=50)
    assert trainer.arena.plan.rows == 128
    first = len(trainer.dev.log)
    trainer.train_batch([random_batch(0, 4, 50), random_batch(1, 4, 50)], 1e-3)
    head = [kind for kind, begin, _ in gradients(trainer, first) if begin == 0]
    assert head == ["set", "add", "add", "add"]


def test_a_graph_is_of_its_kind_its_shape_and_whether_it_sets(made):
    trainer = made()
    for _ in range(3):
        trainer.train_batch([random_batch(0), random_batch(1)], 1e-3)
        trainer.train_batch(random_batch(0, length=9), 1e-3)
        trainer.eval_batch(random_batch(2))
    assert set(trainer._seen) == {("train", 4, 16, False), ("train", 4, 16, True), ("train", 4, 9, False),
                                  ("eval", 4, 16, True), ("update",)}
    trainer.dev.log.clear()
    first = trainer.train_batch([random_batch(5), random_batch(6)], 1e-3)
    assert [what for kind, what in trainer.dev.log if kind == "replay"] == [
        "graph of train 4 16 False", "graph of train 4 16 True", "graph of update"]
    assert first * 128 == pytest.approx(total(random_batch(5), random_batch(6)))


def test_the_bias_is_in_the_product_and_a_tap_sees_one_without(made):
    """Each layer's own bias either way."""
    trainer = made()
    own = [w.qkv_bias.ctypes.data for w in trainer.net.weights]

    def biases(work):
        first = len(trainer.dev.log)
        work()
        log = trainer.dev.log[first:]
        return [what[1].ctypes.data for kind, what in log if kind == "linear" and what[1] is not None]
    assert biases(lambda: trainer.train_batch(random_batch(0), 1e-3)) == own
    assert biases(lambda: trainer.eval_batch(random_batch(0))) == own
    assert biases(lambda: trainer.gradients(random_batch(0), 1.0)) == own
    names = []
    assert biases(lambda: trainer.gradients(random_batch(0), 1.0, lambda name, array: names.append(name))) == own
    assert names.index("L00.q_linear") < names.index("L00.q_bias")


def test_random_weights_are_the_cpu_trainers(made):
    for model in (SMALL, UNTIED):
        expected = TransformerTrainer.new(model, train_config()).params
        found = made(model).params
        assert found.keys() == expected.keys() and all(np.array_equal(found[k], v) for k, v in expected.items())
