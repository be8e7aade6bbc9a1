"""The choice of a token: known random words, exact weights, who is kept, and draws that follow the probabilities."""

from dataclasses import replace

import numpy as np
import pytest

from apr.config import Sampling
from apr.errors import ConfigError, InferenceError, ShapeError
from apr.reference.sampling import choose, philox

# SOURCE  kat_vectors of Random123, philox4x32 10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1))]
DRAW = Sampling(vocab=6, temperature=1.0, seed=3)
LN = np.log(np.array([1, 2, 3, 4, 6, 8])).astype(np.float32)  # odds of 24


def draws(scores, sampling, count=4000):
    """How often each id is chosen, over positions."""
    scores = np.asarray(scores, np.float32)
    return np.bincount([choose(scores, sampling, 0, p) for p in range(count)], minlength=scores.size)


def chi_square(counts, odds):
    expected = np.asarray(odds, float) / sum(odds) * counts.sum()
    assert not counts[expected == 0].any()
    some = expected > 0
    return float(((counts - expected)[some] ** 2 / expected[some]).sum())


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_known_words(counter, key, words):
    assert philox(key, counter) == words


def test_temperature_0_takes_the_first_of_the_largest():
    scores = np.array([1, 5, 2, 5, 4, 9, 9], np.float32)
    greedy = Sampling(vocab=7)
    assert choose(scores, greedy, 0, 0) == 5
    assert choose(scores, replace(greedy, vocab=5), 0, 0) == 1  # ids 5 and 6 are padding
    assert choose(-scores, replace(greedy, seed=9), 7, 8) == 0


@pytest.mark.parametrize(("temperature", "power"), [(1.0, 1.0), (2.0, 0.5), (0.5, 2.0)])
def test_draws_follow_the_probabilities(temperature, power):
    counts = draws(LN, replace(DRAW, temperature=temperature))
    assert chi_square(counts, np.array([1, 2, 3, 4, 6, 8]) ** power) < 20.5  # 5 degrees of freedom, p = 0.001


def test_a_draw_is_a_function_of_seed_sequence_and_position():
    flat = np.zeros(1000, np.float32)
    wide = Sampling(vocab=1000, temperature=1.0, seed=3)

    def row(sampling, sequence):
        return [choose(flat, sampling, sequence, p) for p in range(40)]
    rows = [row(wide, 0), row(wide, 1), row(replace(wide, seed=4), 0), row(replace(wide, seed=3 + 2**32), 0)]
    assert rows[0] == row(wide, 0)
    assert len({tuple(r) for r in rows}) == 4 and all(len(set(r)) > 30 for r in rows)


def test_a_draw_by_hand():
    """Weights 2^30 each: u scaled to the sum of 1000 of them, in integers."""
    high, low, _, _ = philox((5, 1), (17, 2, 0, 0))
    expected = ((high * 2**32 + low) * 1000) >> 64
    sampling = Sampling(vocab=1000, temperature=1.0, seed=5 + 2**32)
    assert choose(np.zeros(1000, np.float32), sampling, 2, 17) == expected


@pytest.mark.parametrize(("top_k", "kept"), [(1, {5}), (2, {4, 5}), (5, {1, 2, 3, 4, 5}), (6, set(range(6))),
                                             (0, set(range(6))), (99, set(range(6)))])
def test_top_k_keeps_the_largest(top_k, kept):
    counts = draws(LN, replace(DRAW, top_k=top_k), 1500)
    assert set(np.flatnonzero(counts)) == kept


def test_top_k_keeps_all_that_equal_the_last_one():
    assert set(np.flatnonzero(draws([1, 0, 1, 2, 1, 0], replace(DRAW, top_k=2), 500))) == {0, 2, 3, 4}
    assert set(np.flatnonzero(draws([1, 2, 1, 2, 1, 0], replace(DRAW, top_k=2), 500))) == {1, 3}


@pytest.mark.parametrize(("top_p", "kept"), [
    (1e-9, {5}), (8 / 24 - 1e-6, {5}), (8 / 24 + 1e-6, {4, 5}), (14 / 24 + 1e-6, {3, 4, 5}),
    (23 / 24 + 1e-6, set(range(6))), (1.0, set(range(6)))])
def test_top_p_keeps_the_fewest_that_hold_it(top_p, kept):
    counts = draws(LN, replace(DRAW, top_p=top_p), 1500)
    assert set(np.flatnonzero(counts)) == kept
    odds = [w if i in kept else 0 for i, w in enumerate([1, 2, 3, 4, 6, 8])]
    assert chi_square(counts, odds) < 20.5


def test_top_p_keeps_equals_together_and_counts_what_top_k_left():
    assert set(np.flatnonzero(draws([1, 1, 1, 0, 0, 0], replace(DRAW, top_p=0.1), 300))) == {0, 1, 2}
    # Of the two that top k leaves, 6 and 8 of 14, the larger alone holds 0.5.
    assert set(np.flatnonzero(draws(LN, replace(DRAW, top_k=2, top_p=0.5), 300))) == {5}
    assert set(np.flatnonzero(draws(LN, replace(DRAW, top_p=0.5), 300))) == {4, 5}


def test_padding_is_never_drawn_and_takes_no_probability():
    scores = np.append(LN, np.float32([50, 50]))
    with np.errstate(all="raise"):
        assert (draws(scores, DRAW) == np.append(draws(LN, DRAW), [0, 0])).all()
        assert (draws(scores, replace(DRAW, top_k=2, top_p=0.9), 200)[6:] == 0).all()


def test_extreme_temperatures_and_scores():
    close = np.array([0, 1, 1.0000001, -3e38, -np.inf, 0.5], np.float32)
    for cold in (1e-45, 5e-324, 1e-20):
        assert set(np.flatnonzero(draws(close, replace(DRAW, temperature=cold), 50))) == {2}
    hot = draws([0, 1, 2, 3, 4, 5], replace(DRAW, temperature=100.0))
    assert chi_square(hot, np.exp(np.arange(6) / 100)) < 20.5
    far = draws([3e38, -3e38, -np.inf, 0, 3e38, 1], DRAW, 200)
    assert set(np.flatnonzero(far)) == {0, 4}
    only = np.array([-np.inf] * 5 + [2], np.float32)
    assert choose(only, DRAW, 0, 0) == 5


def test_weights_are_exact_over_a_whole_vocabulary():
    """Equal scores of 150,000 ids: a float32 running sum would lose the last ones."""
    n = 150_000
    picks = [choose(np.zeros(n, np.float32), Sampling(vocab=n, temperature=0.7, seed=s), 0, 1) for s in range(400)]
    assert min(picks) < n // 50 and max(picks) > n - n // 50
    assert chi_square(np.bincount(np.array(picks) * 8 // n, minlength=8), [1] * 8) < 24.4  # 7 degrees of freedom


@pytest.mark.parametrize("scores", [
    np.array([0, np.nan, 1], np.float32), np.array([0, np.inf, 1], np.float32), np.full(3, -np.inf, np.float32),
    np.zeros(3), np.zeros((1, 3), np.float32), np.zeros(2, np.float32), np.zeros(0, np.float32)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_score_is_refused(scores, temperature):
    numbers = scores.shape == (3,) and scores.dtype == np.float32
    with pytest.raises(InferenceError if numbers else ShapeError):
        choose(scores, Sampling(vocab=3, temperature=temperature), 0, 5)


@pytest.mark.parametrize("bad", [
    {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 101.0}, {"top_k": -1}, {"top_k": 1.5},
    {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"seed": -1}, {"seed": 2**63}])
def test_sampling_out_of_range_is_refused(bad):
    with pytest.raises(ConfigError, match="sampling"):
        Sampling(vocab=3, **bad)
