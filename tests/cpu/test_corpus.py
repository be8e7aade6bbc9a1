"""A run's data put together: what is held out is never trained on, and every step has rows of its own."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from test_run import arguments

from apr.cli.pretrain import build_config
from apr.errors import ConfigError, GateError
from apr.train.corpus import check_vocabulary, open_corpus
from apr.train.real_run import RealRun

TOKENS, T, ROWS = 2050, 16, 4  # with two batches held out: 120 rows an epoch, 15 steps of two micro-batches


@pytest.fixture
def config(folder, tmp_path):
    """A run on a headerless shard in which every token's id is its place."""
    (tmp_path / "own.bin").write_bytes(np.arange(TOKENS, dtype="<u4").tobytes())
    (tmp_path / "other.bin").write_bytes(np.arange(TOKENS, TOKENS + 500, dtype="<u4").tobytes())
    made = build_config(arguments(folder))
    return dataclasses.replace(made, dataset=str(tmp_path / "own.bin"), allow_shard_cycle=False,
                               model=dataclasses.replace(made.model, vocab_size=3000))


def opened(config, **changes):
    """The corpus of a configuration with changes."""
    return open_corpus(dataclasses.replace(config, **changes), None, lambda text: None)


def ids(batches):
    """Every token of some batches, as input or as target."""
    return {int(i) for b in batches for array in (b.inputs, b.targets) for i in array.reshape(-1)}


def trained(corpus, epochs=3):
    """Every token that training sees."""
    rows = corpus.stream.rows_per_epoch
    return ids(corpus.stream.batch(epoch * rows, rows) for epoch in range(epochs))


def test_what_is_held_out_is_never_trained_on(config):
    corpus = opened(config)
    held = ids(corpus.heldout)
    assert held == set(range(2 * ROWS * T + 1)) and corpus.train_tokens == TOKENS - len(held)
    assert trained(corpus) == set(range(len(held), TOKENS))


def test_shards_of_their_own_leave_the_dataset_whole(config, tmp_path):
    corpus = opened(config, val_shard=str(tmp_path / "other.bin"))
    assert ids(corpus.heldout) == set(range(TOKENS, TOKENS + 2 * ROWS * T + 1))
    assert trained(corpus) == set(range(TOKENS))
    with pytest.raises(ConfigError, match="--val-shard"):
        opened(config, val_shard=config.dataset)


def test_the_fingerprint_is_of_tokens_and_split(config, tmp_path):
    """Resuming asks for the same: with another split it would train on what was held out."""
    shorter, other = tmp_path / "shorter.bin", str(tmp_path / "other.bin")
    shorter.write_bytes(np.arange(TOKENS - 1, dtype="<u4").tobytes())
    prints = [opened(config, **changes).fingerprint for changes in (
        {}, {"val_batches": 1}, {"dataset": str(shorter)}, {"val_shard": other}, {"val_shard": str(shorter)})]
    assert len(set(prints)) == len(prints) and opened(config).fingerprint == prints[0]


class Witness:
    """A trainer that keeps what it is given."""

    def __init__(self):
        self.seen, self.ahead = [], 0

    def start_batch(self, micro, lr):
        self.seen.append((micro, lr))
        return "the step"


@pytest.mark.parametrize("cycle", [False, True])
def test_every_step_has_the_next_rows(config, tmp_path, cycle):
    config, notes, witness = dataclasses.replace(config, allow_shard_cycle=cycle), [], Witness()
    corpus = opened(config)
    assert corpus.stream.rows_per_epoch == 120
    work = RealRun(config, witness, corpus, tmp_path, notes.append)
    for step in range(15):
        assert work.start(step, 0.5) == "the step" and work.ahead(step) == 0
    given = [b for micro, lr in witness.seen for b in micro if lr == 0.5]
    expected = [corpus.stream.batch(first, ROWS) for first in range(0, 120, ROWS)]
    assert all(np.array_equal(a.inputs, b.inputs) for a, b in zip(given, expected, strict=True))
    assert notes == [] and (work.start(15, 0.5) is None) == (not cycle)
    assert [(n["step"], "pass 2" in n["text"]) for n in notes] == ([(15, True)] if cycle else [])


def test_steps_overlap_where_the_trainer_lets_them_and_nobody_checks_them(config, tmp_path):
    witness, corpus = Witness(), opened(config)
    watch = SimpleNamespace(due=lambda step: step % 4 == 0)
    for ahead, given, expected in ((0, None, []), (1, None, [0, 1, 2, 3, 4]), (1, watch, [1, 2, 3])):
        witness.ahead = ahead
        work = RealRun(config, witness, corpus, tmp_path, [].append, watch=given)
        assert [step for step in range(5) if work.ahead(step) == 1] == expected


@pytest.mark.parametrize(("ids_of_tokenizer", "rows", "init", "gate"), [
    (320, 320, None, ""), (300, 320, None, ""), (321, 320, None, "GATE-ARCH-370M-011"), (321, 320, "x", "ARCH-010"),
    (50257, 50257, None, ""), (50256, 50257, None, "GATE-ARCH-370M-011"), (151_665, 151_936, "x", ""),
    (50256, 50257, "x", "")])
def test_every_id_of_a_tokenizer_has_a_row(config, ids_of_tokenizer, rows, init, gate):
    config = dataclasses.replace(config, init=init, model=dataclasses.replace(config.model, vocab_size=rows))
    try:
        check_vocabulary(SimpleNamespace(vocab_size=ids_of_tokenizer), config)
        said = ""
    except GateError as e:
        said = e.where
    assert said.endswith(gate) and bool(said) == bool(gate)
