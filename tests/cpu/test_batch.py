"""LMBatch: next-token targets of sequences of any lengths, padding that does not count."""

import dataclasses

import numpy as np
import pytest

from apr.config import IGNORE
from apr.data.batch import LMBatch
from apr.errors import ShapeError

PAD, EOS, X = 90, 91, IGNORE


@pytest.mark.parametrize(("sequences", "inputs", "targets"), [
    ([[1, 2, 3, 4]], [[1, 2, 3]], [[2, 3, 4]]),
    ([[1, 2, 3], [4, 5, 6]], [[1, 2], [4, 5]], [[2, 3], [5, 6]]),  # equal lengths: no pad, no end
    ([[1, 2, 3, 4], [5, 6]], [[1, 2, 3], [5, 6, PAD]], [[2, 3, 4], [6, EOS, X]]),
    ([[1, 2, 3, 4], [5, 6, 7]], [[1, 2, 3], [5, 6, 7]], [[2, 3, 4], [6, 7, EOS]]),  # one shorter: the end still fits
    ([[1], [2, 3, 4]], [[1, PAD], [2, 3]], [[EOS, X], [3, 4]]),
    ([[1, 2], [3]], [[1], [3]], [[2], [EOS]]),
    ([[1], [2]], [[1], [2]], [[EOS], [EOS]]),  # uniform length 1: upstream read out of range
    ([[7]], [[7]], [[EOS]]),
    ([[PAD, PAD], [EOS, 1, PAD]], [[PAD, PAD], [EOS, 1]],
     [[PAD, EOS], [1, PAD]]),  # these ids are tokens like any other
])
def test_from_sequences(sequences, inputs, targets):
    batch = LMBatch.from_sequences(sequences, PAD, EOS)
    assert batch.inputs.tolist() == inputs and batch.targets.tolist() == targets
    assert (batch.batch_size, batch.seq_len) == (len(inputs), len(inputs[0]))
    assert batch.num_tokens == sum(t != IGNORE for row in targets for t in row)
    for array in (batch.inputs, batch.targets):
        assert array.dtype == np.int32 and array.flags.c_contiguous and array.shape == (len(inputs), len(inputs[0]))
    for row in range(len(inputs)):
        assert batch.get_input(row).tolist() == inputs[row] and batch.get_target(row).tolist() == targets[row]
    assert batch.get_input(-1) is batch.get_target(-1) is batch.get_input(len(inputs)) is batch.get_target(99) is None


@pytest.mark.parametrize("sequences", [[], [[]], [[1, 2], []], ()])
def test_nothing_is_refused(sequences):
    with pytest.raises(ShapeError, match="one or more sequences of one or more tokens"):
        LMBatch.from_sequences(sequences, PAD, EOS)
    with pytest.raises(ShapeError):
        LMBatch.single([], PAD, EOS)


def test_every_token_of_a_ragged_batch_is_predicted_once(rng):
    sequences = [rng.integers(0, 80, n).tolist() for n in (1, 2, 7, 30, 31, 31)]
    batch = LMBatch.from_sequences(sequences, PAD, EOS)
    assert batch.seq_len == 30
    for row, sequence in enumerate(sequences):
        counted = batch.targets[row] != IGNORE
        assert batch.inputs[row][~counted].tolist() == [PAD] * (~counted).sum()
        assert [sequence[0],
                *batch.targets[row][counted].tolist()] == (sequence + ([EOS] if len(sequence) <= 30 else []))
        assert batch.inputs[row][counted].tolist() == sequence[:30]


def test_arrays_and_tuples_are_sequences():
    expected = LMBatch.from_sequences([[1, 2, 3], [4]], PAD, EOS)
    for sequences in (((1, 2, 3), (4,)), [np.array([1, 2, 3], np.uint16), np.array([4], np.int64)]):
        batch = LMBatch.from_sequences(sequences, PAD, EOS)
        assert np.array_equal(batch.inputs, expected.inputs) and np.array_equal(batch.targets, expected.targets)


def test_single_is_one_sequence():
    assert LMBatch.single([1, 2, 3], PAD, EOS).inputs.tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, np.uint32])
def test_from_rows(dtype):
    rows = np.arange(12, dtype=dtype).reshape(3, 4)
    batch = LMBatch.from_rows(rows)
    assert batch.inputs.tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert batch.targets.tolist() == [[1, 2, 3], [5, 6, 7], [9, 10, 11]]
    assert batch.num_tokens == 9 and batch.inputs.dtype == batch.targets.dtype == np.int32
    assert batch.inputs.flags.c_contiguous and not np.shares_memory(batch.inputs, batch.targets)


def test_a_batch_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LMBatch.single([1, 2], PAD, EOS).inputs = np.zeros((1, 1), np.int32)
