"""A training step on the GPU: which gradients it sets and which it adds to, parts of the head, steps under way."""

import dataclasses

import numpy as np
import pytest
from compare import assert_close
from models import random_batch
from test_trainer import BOTH, SMALL, trainer

from apr.kernel import FAST_PATHS


@BOTH
@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_no_gradient_of_the_step_before(dev, precision, tied):
    """Every parameter's gradient is NaN before the step, padding rows of the vocabulary too, and what is between stays
    zero. Run, recorded and replayed; with one micro-batch and with three, of which the last two add.
    """
    model, runs = dataclasses.replace(SMALL, tie_word_embeddings=tied), []
    for spoil in (False, True):
        t = trainer(dev, model, precision=precision)
        nan = np.zeros(t.layout.size, np.float32)
        for spec, offset in zip(t.layout.specs, t.layout.offsets, strict=True):
            nan[offset:offset + spec.room] = np.nan
        losses = []
        for step in range(6):
            if spoil:
                dev.upload(t.arena["grads"], nan)
            losses.append(t.train_batch([random_batch(step + i) for i in range(1 + step % 2 * 2)]))
            losses.append(t.last_grad_norm)
            assert t.last_stats.applied
            flat = dev.download(t.arena["grads"])
            assert not flat[~np.isnan(nan)].any()
            for spec, offset in zip(t.layout.specs, t.layout.offsets, strict=True):
                assert not flat[offset + spec.size:offset + spec.room].any(), f"{spec.name}: padding"
        runs.append((losses, t.parameters_sha256(), t.optimizer_state_sha256()))
    assert runs[0] == runs[1]


@BOTH
def test_the_head_in_parts_is_the_head(dev, precision, monkeypatch):
    """The scores of 200 rows at once, or of 128 and then 72, which add to the gradient that the first have set."""
    batch, found = random_batch(0, 4, 50), []
    for rows in (200, 128):
        monkeypatch.setattr("apr.buffers.LOGITS_BYTES", rows * SMALL.Vp * (4 if precision == "fp32" else 2))
        t = trainer(dev, precision=precision, max_seq_len=50)
        assert t.arena.plan.rows == rows
        found.append((t.gradients(batch, 1 / batch.num_tokens), t.eval_batch(batch), t.grads))
    (whole, evaluated, grads), (parts, evaluated_parts, of_parts) = found
    assert abs(whole - parts) <= 1e-6 * whole and abs(evaluated - evaluated_parts) <= 1e-6 * evaluated
    for key, value in grads.items():
        assert_close(of_parts[key], value, 1e-5 if precision == "fp32" else 2e-2, key)


@pytest.mark.parametrize("off", FAST_PATHS)
def test_without_a_fast_path_the_gradients_are_the_same(dev, off, monkeypatch):
    """Each turned off alone, in bf16 with heads of 64 and sequences that fill no tile; the record says which ran."""
    model = dataclasses.replace(SMALL, head_dim=64, max_position_embeddings=128)
    batch, found = random_batch(0, 3, 77), {}
    for fast in (dev.fast, dev.fast - {off}):
        monkeypatch.setattr(dev, "fast", fast)
        t = trainer(dev, model, precision="bf16", max_seq_len=77)
        assert t.record()["path"][off] == ("sm_90a" if off in fast else "general")
        found[off in fast] = t.gradients(batch, 1 / batch.num_tokens), t.grads
    general, grads = found[False]
    loss, of_fast = found.get(True, found[False])
    assert abs(loss - general) <= 1e-3 * general
    for key, value in grads.items():
        assert_close(of_fast[key], value, 2e-2, key)


@BOTH
def test_steps_under_way_change_no_bit(dev, precision):
    """One behind the other, never waited for, with batches of one, two and five parts; and each waited for."""
    batches = [[random_batch(10 * s + i, rows=3 + s % 2 * 2) for i in range(1 + s % 3 * 2)] for s in range(12)]
    runs = []
    for ahead in (False, True):
        t = trainer(dev, precision=precision, batch_size=3, accumulation_steps=2)
        started = []
        for s, micro in enumerate(batches):
            started.append(t.start_batch(micro, 1e-3 * (s + 1)))
            if not ahead:
                started[-1].result()
        stats = [handle.result() for handle in started]
        assert [x.lr for x in stats] == [1e-3 * (s + 1) for s in range(12)] and t.step == 12
        runs.append((stats, t.parameters_sha256(), t.optimizer_state_sha256()))
    assert runs[0] == runs[1]


@BOTH
def test_what_is_not_finite_is_told_by_its_own_numbers_while_the_next_is_under_way(dev, precision):
    t = trainer(dev, precision=precision)
    for s in range(3):
        t.train_batch(random_batch(s), 1e-3)
    params = t.params
    params["model.norm.weight"][3] = np.nan
    t.load_params(params)
    state = t.parameters_sha256()
    bad, worse = t.start_batch(random_batch(4), 1e-3), t.start_batch(random_batch(5), 1e-3)
    assert np.isnan(bad.result().loss) and not bad.result().applied and not worse.result().applied
    assert t.step == 3 and t.parameters_sha256() == state


@BOTH
def test_a_tap_changes_no_bit(dev, precision):
    """With a tap the product before its bias is made aside, and shown."""
    t, batch = trainer(dev, precision=precision), random_batch(1)
    params = t.params
    for key, value in params.items():
        if key.endswith("bias"):
            value[...] = np.random.default_rng(len(key)).standard_normal(value.shape)
    t.load_params(params)
    plain = t.forward_logits(batch.inputs)
    assert (t.forward_logits(batch.inputs, lambda name, array: None) == plain).all()
    for key, value in params.items():
        if key.endswith("bias"):
            value[...] = 0
    t.load_params(params)
    assert not np.allclose(t.forward_logits(batch.inputs), plain, rtol=0, atol=1e-4), "the biases change nothing"
