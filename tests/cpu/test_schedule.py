"""The learning-rate schedule at its corners."""

import math

from models import train_config

from apr.train.schedule import lr_at


def test_warmup_cosine_floor():
    c = train_config(lr=1.0, lr_min=0.1, warmup_steps=4, max_steps=14)
    assert [lr_at(c, s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_at(c, 4) == 1.0
    assert math.isclose(lr_at(c, 9), 0.55)  # half-way down
    assert math.isclose(lr_at(c, 6), 0.1 + 0.45 * (1 + math.cos(math.pi / 5)))  # slower than a line at first
    assert lr_at(c, 14) == lr_at(c, 99) == 0.1


def test_without_warmup_and_never_rising_after_it():
    c = train_config(lr=3e-4, warmup_steps=0, max_steps=50)
    rates = [lr_at(c, s) for s in range(51)]
    assert rates[0] == 3e-4 and rates[-1] == 0.0 and rates == sorted(rates, reverse=True)


def test_warmup_longer_than_the_run():
    c = train_config(lr=1.0, warmup_steps=100, max_steps=10)
    assert lr_at(c, 9) == 0.1
