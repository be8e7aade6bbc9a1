"""The order of training data: a pure function of seed and step, every token once per epoch, held-out tokens never."""

import os
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from apr.data.shards import DTYPES, FileShard, TokenSource, memory_source, open_shards
from apr.data.stream import TrainStream, heldout_batches, sequential_batches
from apr.errors import ConfigError, StorageError


def numbered(lengths: list[int], gap: int = 0) -> TokenSource:
    """A corpus in which every token's id is its place, so that a row shows where it came from."""
    n = sum(lengths)
    ids = np.arange(gap, gap + n, dtype=np.int32)
    shard = SimpleNamespace(tokens=n, read=lambda a, b: ids[a:b])
    source = TokenSource([shard], ["numbered"], gap + n, None)
    source.starts = np.cumsum([0, *lengths[:-1]])
    return source


LENGTHS = [13, 1, 40, 7, 200, 3, 3, 60, 21, 9, 2, 88]  # 447 tokens
CASES = [(LENGTHS, 16, 0), (LENGTHS, 16, 33), (LENGTHS, 1, 0), (LENGTHS, 7, 100), (LENGTHS, 446, 0), ([500], 16, 0),
         ([500], 16, 51), ([1] * 300, 8, 0), ([100, 400], 32, 60), (LENGTHS, 80, 359)]


def epoch_rows(stream: TrainStream, epoch: int) -> np.ndarray:
    """Every row of an epoch, (rows, T+1)."""
    n = stream.rows_per_epoch
    return np.stack([stream.row(epoch * n + i) for i in range(n)])


@pytest.mark.parametrize(("lengths", "t", "first"), CASES)
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_training_token_is_used_once_per_epoch(lengths, t, first, epoch):
    source = numbered(lengths)
    stream = TrainStream(source, t, seed=3, first_token=first)
    rows = epoch_rows(stream, epoch)
    assert rows.shape == ((source.tokens - first - 1) // t, t + 1) and rows.dtype == np.int32
    for used in (rows[:, :-1], rows[:, 1:]):  # as input, and as target
        assert len(np.unique(used)) == used.size, "a token twice"
        assert used.min() >= first and used.max() < source.tokens
    unused = source.tokens - first - rows[:, :-1].size
    assert 1 <= unused <= t, "the tail is at most one row"


@pytest.mark.parametrize(("lengths", "t", "first"), CASES)
def test_a_row_is_text_in_order(lengths, t, first):
    """Each token is followed by its successor, or by the start of a document (of a piece, where none are known)."""
    source = numbered(lengths)
    starts = {first, *source.starts[source.starts > first].tolist()}
    if len(starts) == 1:
        starts = set(range(first, source.tokens, t + 1))
    rows = epoch_rows(TrainStream(source, t, 3, first), 0)
    for row in rows:
        for left, right in pairwise(row.tolist()):
            assert right == left + 1 or (right in starts and left + 1 in {*starts, source.tokens})


def test_a_batch_is_a_function_of_seed_and_step():
    source = numbered(LENGTHS)
    expected = [TrainStream(source, 16, 3).batch(first, 4) for first in range(0, 120, 4)]
    stream = TrainStream(source, 16, 3)
    for index in [29, 0, 7, 28, 7, 1, *range(29, -1, -1)]:  # epochs of 27 rows: some batches lie in two
        batch = stream.batch(4 * index, 4)
        assert np.array_equal(batch.inputs, expected[index].inputs)
        assert np.array_equal(batch.targets, expected[index].targets)
    assert np.array_equal(stream.batch(2, 6).inputs[2:], stream.batch(4, 4).inputs)  # rows, however they are grouped


def test_targets_are_the_inputs_one_later():
    batch = TrainStream(numbered(LENGTHS), 16, 3).batch(5, 3)
    assert batch.inputs.shape == batch.targets.shape == (3, 16) and batch.num_tokens == 48
    assert np.array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])


@pytest.mark.parametrize(("lengths", "t"), [(LENGTHS, 16), ([500], 16), ([1] * 300, 8), ([900, 7], 16)])
def test_epochs_and_seeds_differ(lengths, t):
    source = numbered(lengths)
    stream = TrainStream(source, t, 3)
    first, second, other = epoch_rows(stream, 0), epoch_rows(stream, 1), epoch_rows(TrainStream(source, t, 4), 0)
    in_order = np.arange(first.size - len(first)).reshape(len(first), t)
    for a, b in ((first, second), (first, other), (second, other)):
        assert np.count_nonzero((a == b).all(axis=1)) <= len(first) // 4
    assert np.count_nonzero((first[:, :-1] == in_order).all(axis=1)) <= len(first) // 4, "not shuffled"


def test_neighbouring_rows_come_from_different_places():
    """One long document would otherwise fill whole batches."""
    rows = epoch_rows(TrainStream(numbered([4000, 10, 10]), 16, 3), 0)
    follows = np.count_nonzero(rows[1:, 0] == rows[:-1, -1])
    assert follows < len(rows) // 20


def test_the_tail_waits_for_another_epoch():
    source = numbered(LENGTHS)
    stream = TrainStream(source, 64, 3)
    seen = [set(epoch_rows(stream, e)[:, :-1].reshape(-1).tolist()) for e in range(12)]
    assert all(len(s) == 6 * 64 for s in seen) and len({frozenset(s) for s in seen}) > 1
    assert set.union(*seen) == set(range(source.tokens))


@pytest.mark.parametrize("lengths", [[30, 50, 20, 700, 100, 3, 97], [1000], [5] * 200, [999, 1]])
@pytest.mark.parametrize(("t", "batch", "batches"), [(8, 4, 2), (8, 4, 100), (16, 1, 1), (5, 7, 3), (98, 1, 1)])
def test_held_out_tokens_are_never_trained_on(lengths, t, batch, batches):
    source = numbered(lengths)
    held, first = heldout_batches(source, t, batch, batches)
    ids = np.concatenate([np.concatenate([b.inputs.reshape(-1), b.targets.reshape(-1)]) for b in held])
    assert set(ids.tolist()) == set(range(first)) and first <= source.tokens // 10
    assert sum(b.batch_size for b in held) <= batch * batches and all(b.batch_size == batch for b in held[:-1])
    stream = TrainStream(source, t, 3, first)
    trained = np.concatenate([epoch_rows(stream, e).reshape(-1) for e in range(4)])
    assert trained.min() == first and not np.isin(trained, ids).any()
    if len(lengths) != 2:  # two documents have two orders: a tail need not change places
        assert set(trained.tolist()) == set(range(first, source.tokens))


def test_held_out_rows_are_the_head_in_its_own_order():
    held, first = heldout_batches(numbered([1000]), 8, 4, 2)
    assert first == 65 and np.concatenate([b.inputs for b in held]).reshape(-1).tolist() == list(range(64))


@pytest.mark.parametrize(("tokens", "t", "good"), [(180, 16, True), (179, 16, True), (170, 16, True), (169, 16, False),
                                                   (10, 1, False), (20, 1, True)])
def test_holding_out_needs_a_tenth(tokens, t, good):
    source = numbered([tokens])
    if good:
        assert heldout_batches(source, t, 1, 1)[1] == t + 1
    else:
        with pytest.raises(ConfigError, match="a tenth can be held out"):
            heldout_batches(source, t, 1, 1)


@pytest.mark.parametrize(("tokens", "t", "rows", "sizes"), [(33, 8, None, [3, 1]), (33, 8, 2, [2]), (33, 8, 99, [3, 1]),
                                                            (32, 8, None, [3]), (9, 8, None, [1])])
def test_sequential_batches(tokens, t, rows, sizes):
    batches = sequential_batches(numbered([tokens]), t, 3, rows)
    assert [b.batch_size for b in batches] == sizes
    assert np.concatenate([b.inputs for b in batches]).reshape(-1).tolist() == list(range(sum(sizes) * t))


def test_too_little_to_train_or_to_validate_on_is_refused():
    assert TrainStream(numbered([17]), 16, 3).rows_per_epoch == 1
    for tokens, first in ((16, 0), (17, 1), (1, 0), (100, 100)):
        with pytest.raises(ConfigError, match=f"at least 17 tokens to train on, found {tokens - first}"):
            TrainStream(numbered([tokens]), 16, 3, first)
    with pytest.raises(ConfigError, match="at least 9 tokens"):
        sequential_batches(numbered([8]), 8, 3)


def test_a_real_corpus_of_documents_streams_whole():
    documents = [list(range(i * 10 + 1, i * 10 + 1 + i % 9)) for i in range(1, 60)]
    source = memory_source(documents, 1000, 0)
    rows = epoch_rows(TrainStream(source, 4, 3), 0)
    counts = np.bincount(rows[:, :-1].reshape(-1), minlength=1000)
    assert (counts[1:] <= source.histogram[1:]).all() and source.tokens - counts.sum() <= 4


@pytest.fixture
def shard_file(tmp_path):
    """A headerless shard of 2000 tokens."""
    path = tmp_path / "a.bin"
    path.write_bytes(np.arange(2000, dtype="<u4").tobytes())
    return path


def test_a_headerless_corpus_is_shuffled_in_pieces(shard_file):
    source = open_shards(shard_file, None, 2000)
    assert source.starts.tolist() == [0]
    rows = epoch_rows(TrainStream(source, 16, 3), 0)
    assert len(np.unique(rows[:, :-1])) == rows[:, :-1].size == 124 * 16
    assert np.count_nonzero(rows[1:, 0] == rows[:-1, -1]) < 6


def test_a_file_cut_while_in_use_is_an_error_and_not_a_signal(shard_file):
    stream = TrainStream(open_shards(shard_file, None, 2000), 16, 3)
    before = epoch_rows(stream, 0)
    os.truncate(shard_file, 4 * 1000)
    whole = [i for i, row in enumerate(before) if row.max() < 1000]
    with pytest.raises(StorageError, match=r"a\.bin: expected a file that stays as it is, found changed while in use"):
        stream.row(whole[0])  # what is still there may be something else by now
    gone = [i for i, row in enumerate(before) if row.min() > 1000]
    with pytest.raises(StorageError, match=r"a\.bin: expected .* bytes at offset .*cut while in use") as caught:
        stream.row(gone[0])
    assert caught.value.exit_code == 7


def test_a_file_replaced_while_in_use_is_still_the_one_that_was_checked(shard_file):
    shard = FileShard(shard_file, DTYPES["u32"])
    other = shard_file.with_name("b.bin")
    other.write_bytes(np.zeros(2000, "<u4").tobytes())
    os.replace(other, shard_file)
    assert shard.read(5, 8).tolist() == [5, 6, 7]
