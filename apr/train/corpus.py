"""From what the user named to a tokenizer, a training stream and held-out batches."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from apr.data.batch import LMBatch
from apr.data.shards import TokenSource, is_shards, memory_source, open_shards
from apr.data.stream import TrainStream, heldout_batches, sequential_batches
from apr.data.text import documents, standard_library
from apr.data.tokenizer import Tokenizer
from apr.errors import ConfigError, GateError
from apr.formats.model_file import TOKENIZER
from apr.train.init import InitModel, own_sha256, own_tokenizer
from apr.train.run_config import RunConfig

DEMO = "standard-library"  # the dataset name that stands for this Python's own source


@dataclass(frozen=True)
class Corpus:
    """What a run trains on: `fingerprint` identifies tokens and their split, `entropy` is in bits per token."""

    tokenizer: Tokenizer | None
    stream: TrainStream
    heldout: list[LMBatch]
    fingerprint: str
    entropy: float
    train_tokens: int


def open_corpus(config: RunConfig, tokenizer: Tokenizer | None, note: Callable[[str], None],
                init: InitModel | None = None) -> Corpus:
    """Read, tokenize and check everything before the first step.

    `tokenizer` is the run's own when resuming, `init` the model that a new run begins from. Raises NotFoundError,
    FormatError, GateError (GATE-CORPUS-ENTROPY, GATE-ARCH-370M-011, ARCH-010), ConfigError when there is too little
    text, or a model without tokenizer for text.
    """
    assert config.dataset is not None
    train, vocab, path = config.train, config.model.V, Path(config.dataset)
    is_text = config.dataset == DEMO or not is_shards(path)
    if tokenizer is None:
        tokenizer = _find_tokenizer(config, is_text, note, init)
    texts: list[str] | None = None
    if is_text:
        texts = list(_texts(config.dataset, note))
        if tokenizer is None:
            note(f"training a byte-level BPE of {vocab} entries on {sum(map(len, texts)) / 1e6:.1f} M characters")
            tokenizer = Tokenizer.train(texts, vocab)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config)
    if texts is not None:
        assert tokenizer is not None
        source = memory_source(tokenizer.encode_stream(texts), vocab, tokenizer.require_eos())
    else:
        source = open_shards(path, tokenizer, vocab)
    entropy = source.check_entropy()
    if config.val_shard is not None:
        val = open_shards(Path(config.val_shard), tokenizer, vocab)
        if val.fingerprint == source.fingerprint:
            raise ConfigError("--val-shard", "data that is not trained on", "the dataset itself", "give other shards")
        heldout = sequential_batches(val, train.max_seq_len, train.batch_size, config.val_batches * train.batch_size)
        first, fingerprint = 0, f"{source.fingerprint}+{val.fingerprint}"
    else:
        heldout, first = heldout_batches(source, train.max_seq_len, train.batch_size, config.val_batches)
        fingerprint = f"{source.fingerprint}@{first}"
    stream = TrainStream(source, train.max_seq_len, train.seed, first)
    _say(config, source, stream, heldout, entropy, note)
    return Corpus(tokenizer, stream, heldout, fingerprint, entropy, stream.tokens)


def _find_tokenizer(config: RunConfig, is_text: bool, note: Callable[[str], None],
                    init: InitModel | None) -> Tokenizer | None:
    """The tokenizer asked for, or the shards', or the model's own; a note when it is another than the model's.

    Raises ConfigError for a model without tokenizer for text: one trained on the text would give its ids new meanings.
    """
    assert config.dataset is not None
    path, found = Path(config.dataset), None
    if config.tokenizer is not None:
        found = Tokenizer.load(Path(config.tokenizer))
    elif not is_text and (path / TOKENIZER).is_file():
        found = Tokenizer.load(path)
    if init is None:
        return found
    if found is None:
        own = own_tokenizer(init)
        if own is None and is_text:
            raise ConfigError("--tokenizer", f"the tokenizer of {init.path}, which brings none", "none given",
                              "add --tokenizer, or give shards that bring theirs")
        return own
    if (own_hash := own_sha256(init)) and own_hash != found.sha256:
        note(f"warning: the tokenizer of {found.where} ({found.sha256[:16]}…) is not the model's own "
             f"({own_hash[:16]}…)")
    return found


def _texts(dataset: str, note: Callable[[str], None]) -> Iterator[str]:
    skipped: Counter[str] = Counter()
    yield from standard_library(skipped) if dataset == DEMO else documents([Path(dataset)], "content", skipped)
    if skipped and dataset != DEMO:
        note("passed over: " + ", ".join(f"{n} {why}" for why, n in sorted(skipped.items())))


def check_vocabulary(tokenizer: Tokenizer, config: RunConfig) -> None:
    """Demand that every id has a row in the model; equal sizes for the 370M preset without --init.

    A model often has more rows than its tokenizer ids (ARCH-009). Raises GateError: ARCH-010 with --init, else
    GATE-ARCH-370M-011, upstream's id for both.
    """
    gate = "GATE-ARCH-370M-011" if config.init is None else "FALSIFY-APR-PRETRAIN-ARCH-010"
    exact = config.init is None and config.model.V == 50257
    if tokenizer.vocab_size > config.model.V or (exact and tokenizer.vocab_size != config.model.V):
        raise GateError(gate, f"a tokenizer of {'exactly' if exact else 'at most'} {config.model.V} ids, the model's",
                        f"{tokenizer.vocab_size}", "give the tokenizer of this model"
                        + (", or set --vocab-size" if config.init is None else ""))


def _say(config: RunConfig, source: TokenSource, stream: TrainStream, heldout: list[LMBatch], entropy: float,
         note: Callable[[str], None]) -> None:
    train = config.train
    passes = train.max_steps * train.batch_size * train.accumulation_steps / stream.rows_per_epoch
    note(f"data: {stream.tokens} training tokens in {len(stream.starts)} documents, "
         f"{sum(b.num_tokens for b in heldout)} held out, {entropy:.2f} bits per token; "
         f"{train.max_steps} steps are {passes:.2f} passes")
    if passes > 1 and not config.allow_shard_cycle:
        steps = stream.rows_per_epoch // (train.batch_size * train.accumulation_steps)
        note(f"the data ends after step {steps}; --allow-shard-cycle trains on it again")
