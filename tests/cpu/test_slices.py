"""Slices of a batch: nothing lost, the same bits for any number of cores, the same gradient as in one piece."""

import os

import numpy as np
import pytest
from compare import assert_close
from models import SMALL, random_batch, train_config

from apr.reference.model import loss_and_gradients
from apr.train import slices
from apr.train.slices import SLICES, cut, ranges
from apr.train.trainer import TransformerTrainer


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """The test batches are small: let one row be a slice."""
    monkeypatch.setattr(slices, "SLICE_TOKENS", 16)


def test_a_small_batch_stays_whole(monkeypatch):
    monkeypatch.setattr(slices, "SLICE_TOKENS", 512)
    assert [len(cut(random_batch(0, rows=8, length=t))) for t in (16, 64, 128, 256, 1024)] == [1, 1, 2, 4, 4]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 17])
def test_a_cut_batch_is_the_batch(rows):
    batch = random_batch(0, rows=rows)
    parts = cut(batch)
    assert len(parts) == min(rows, SLICES) and all(p.batch_size for p in parts)
    assert np.array_equal(np.concatenate([p.inputs for p in parts]), batch.inputs)
    assert np.array_equal(np.concatenate([p.targets for p in parts]), batch.targets)


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (7, 8), (5, 5), (3, 6)])
def test_ranges_cover_once(start, stop):
    assert [i for r in ranges(start, stop) for i in range(r.start, r.stop)] == list(range(start, stop))


def test_the_bits_do_not_depend_on_the_number_of_cores(monkeypatch):
    def trained(cores):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        trainer = TransformerTrainer.new(SMALL, train_config())
        losses = [trainer.train_batch(random_batch(i, rows=6)) for i in range(4)]
        return (losses, trainer.parameters_sha256(), trainer.optimizer_state_sha256(),
                trainer.eval_batch(random_batch(9, rows=5)))
    assert trained(1) == trained(2) == trained(16)


def test_the_gradient_is_that_of_the_whole_batch():
    trainer, batch = TransformerTrainer.new(SMALL, train_config()), random_batch(3, rows=7)
    whole = np.zeros_like(trainer.grads_buf)
    total = loss_and_gradients(trainer.params, trainer.layout.views(whole), SMALL, batch.inputs, batch.targets,
                               1 / batch.num_tokens)
    loss = trainer.train_batch(batch, lr=0.0)
    assert abs(loss - total / batch.num_tokens) < 1e-6
    assert_close(trainer.grads_buf, whole, 2e-6, "gradient in slices")
