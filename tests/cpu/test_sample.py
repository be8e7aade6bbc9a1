"""Sampling: greedy, top-k, padding never drawn, equal seeds equal texts; generation follows the model."""

import numpy as np
import pytest
from models import SMALL, train_config

from apr.infer.sample import generate, sample
from apr.train.trainer import TransformerTrainer


def test_greedy_and_top_k(rng):
    logits = rng.normal(size=50)
    best = np.argsort(logits)[::-1]
    assert sample(logits, 0, 0, rng) == best[0]
    drawn = {sample(logits, 5.0, 3, rng) for _ in range(300)}
    assert drawn == set(best[:3])


def test_draws_follow_the_softmax(rng):
    logits = np.log(np.array([0.1, 0.2, 0.7])) * 2  # at temperature 2 the odds are 1 : 2 : 7
    counts = np.bincount([sample(logits, 2.0, 0, rng) for _ in range(4000)], minlength=3) / 4000
    assert np.abs(counts - [0.1, 0.2, 0.7]).max() < 0.03


@pytest.fixture(scope="module")
def trainer():
    return TransformerTrainer.new(SMALL, train_config())


def test_generation_is_greedy_step_by_step_and_ends_where_it_must(trainer):
    options = {"temperature": 0.0, "top_k": 0, "seed": 1}
    ids = [3, 5, 8]
    for token in generate(trainer.params, SMALL, [3, 5, 8], 10, SMALL.V, **options, stop_id=None):
        assert token == int(trainer.forward_logits(np.array([ids]))[0, -1].argmax())
        ids.append(token)
    assert len(ids) == 13
    assert list(generate(trainer.params, SMALL, [3, 5, 8], 10, SMALL.V, **options, stop_id=ids[3])) == []
    to_the_end = list(generate(trainer.params, SMALL, [1] * 60, 10, SMALL.V, **options, stop_id=None))
    assert len(to_the_end) == 4  # 64 positions


def test_padding_is_never_drawn_and_seeds_decide(trainer):
    def text(seed):
        return list(generate(trainer.params, SMALL, [1], 20, 40, temperature=3.0, top_k=0, seed=seed, stop_id=None))
    assert max(text(1) + text(2)) < 40 and text(1) == text(1) != text(2)
