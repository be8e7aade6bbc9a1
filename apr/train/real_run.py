"""A run's work: steps on its corpus, validation, and what it keeps: checkpoints to resume from, a model an epoch."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from apr.config import decode
from apr.data.batch import LMBatch
from apr.errors import ConfigError, FormatError, GateError
from apr.files import make_folder, os_errors, require_room, write_atomic
from apr.paths import override_record
from apr.train import checkpoint
from apr.train.base import StartedStep, StepStats, Trainer
from apr.train.corpus import Corpus
from apr.train.init import InitRecord, save_epoch
from apr.train.log import Event, RunLog
from apr.train.pretrain import EpochArtifact, LoopState, batch_of
from apr.train.run_config import RunConfig
from apr.train.saver import Saver
from apr.train.snapshot import Snapshot

LATER = {"skipped", "passed_over"}  # fields of LoopState that older checkpoints do not have


@dataclass(frozen=True)
class DataCursor:
    """Which tokens, and which pass over them. The place within a pass follows from the step."""

    fingerprint: str
    passes: int


@dataclass(frozen=True)
class SavedState:
    """state.json: where a run stood at a checkpoint."""

    step: int
    optimizer_step: int
    loop: LoopState
    log_bytes: int
    artifact: dict[str, Any] | None
    data: DataCursor
    parameters_sha256: str
    optimizer_sha256: str
    trainer: dict[str, Any] = field(default_factory=dict)


def saved_state(found: checkpoint.Checkpoint) -> SavedState:
    """The state of the run in a checkpoint. Raises FormatError."""
    where, values = str(found.path / "state.json"), {k: v for k, v in found.state.items() if k != "overrides"}
    try:
        saved = decode(SavedState, values, where)
    except ConfigError as e:
        raise FormatError(e.where, e.expected, e.found, "use another checkpoint") from None
    missing = {f.name for f in fields(LoopState)} - values["loop"].keys() - LATER
    counts = [saved.step, saved.optimizer_step, saved.log_bytes, saved.data.passes - 1,
              *(v for v in asdict(saved.loop).values() if type(v) is int)]
    ranges = all(0 <= first <= last for first, last in saved.loop.passed_over)
    if missing or saved.loop.step != saved.step or min(counts) < 0 or not ranges:
        raise FormatError(where, "a whole state of the loop, at the checkpoint's step, and numbers in range",
                          f"without {', '.join(sorted(missing))}" if missing else "others", "use another checkpoint")
    return saved


class Watch(Protocol):
    """Checks a step now and then by what it leaves in the trainer's buffers, and changes nothing."""

    def due(self, step: int) -> bool:
        """Whether this step is to be checked."""

    def before(self, trainer: Trainer, step: int, micro: Sequence[LMBatch]) -> None:
        """Read what the step is going to change."""

    def after(self, trainer: Trainer, step: int, lr: float) -> Event | None:
        """Check the step that was made: an event for the log, None for a step that could change nothing.

        Raises GateError; its `where` begins with the id of the invariant that the step broke.
        """


class RealRun:
    """StepFn, ValFn and CheckpointFn over a trainer and a corpus, from `saved` on or from the start.

    `record` is of the model that the run began from; `watch` checks steps as they are made: one that fails ends the run
    before anything of it is saved.
    """

    def __init__(self, config: RunConfig, trainer: Trainer, corpus: Corpus, run_dir: Path, log: RunLog,
                 saved: SavedState | None = None, record: InitRecord | None = None, watch: Watch | None = None) -> None:
        self.config, self.trainer, self.corpus, self.log = config, trainer, corpus, log
        self.ckpt_dir, self.record, self.watch = run_dir / "ckpt", record, watch
        self.passes, self.passed_over = (saved.data.passes, saved.loop.passed_over) if saved else (1, [])
        self.saver = Saver(lambda text: log({"event": "note", "step": self.step, "text": text}))
        self.step = 0  # that was started last
        self._fetched: Snapshot | None = None  # between the hash of an epoch and its saving

    def ahead(self, step: int) -> int:
        """As many as the trainer takes; none before a step that is checked by the state before it and what it leaves.
        """
        return 0 if self.watch is not None and self.watch.due(step) else self.trainer.ahead

    def start(self, step: int, lr: float) -> StartedStep | None:
        """Train on the rows of this step: a pure function of seed, step and what rollbacks passed over."""
        self.step = step
        self.saver.tell()
        t, stream = self.config.train, self.corpus.stream
        last = (batch_of(step, self.passed_over) + 1) * t.batch_size * t.accumulation_steps
        if last > stream.rows_per_epoch and not self.config.allow_shard_cycle:
            return None
        if (passes := -(-last // stream.rows_per_epoch)) > self.passes:
            self.passes = passes
            self.log({"event": "note", "step": step, "text": f"pass {passes} over the data begins, in a new order"})
        micro = self.micro(step)
        watch = self.watch if self.watch is not None and self.watch.due(step) else None
        if watch is not None:
            watch.before(self.trainer, step, micro)
        started = self.trainer.start_batch(micro, lr)
        if watch is not None:
            started.result()
            self._check(watch, step, lr)
        return started

    def micro(self, step: int) -> list[LMBatch]:
        """The micro-batches of this step."""
        t = self.config.train
        first = batch_of(step, self.passed_over) * t.accumulation_steps
        return [self.corpus.stream.batch((first + a) * t.batch_size, t.batch_size) for a in range(t.accumulation_steps)]

    def again(self, step: int, lr: float) -> StepStats:
        """Make a step that was made before; nobody watches, and nothing is logged."""
        return self.trainer.start_batch(self.micro(step), lr).result()

    def restore(self, found: checkpoint.Checkpoint, saved: SavedState) -> None:
        """Put the trainer where it was at a checkpoint of this run."""
        self.trainer.load_params(found.params)
        self.trainer.load_optimizer(found.optimizer, saved.optimizer_step)
        self.passes = saved.data.passes

    def _check(self, watch: Watch, step: int, lr: float) -> None:
        try:
            event = watch.after(self.trainer, step, lr)
        except GateError as e:
            self.log({"event": "guard", "step": step, "gate": e.where.partition(" ")[0], "where": e.where,
                      "expected": e.expected, "found": e.found})
            raise
        if event is not None:
            self.log(event)

    def validate(self, epoch: int) -> float:
        """Token-weighted mean over all held-out batches."""
        return self.trainer.eval_batches(self.corpus.heldout)

    def optimizer_state_sha256(self) -> str:
        """The trainer's. What was fetched for it is kept until it is saved."""
        self._fetched = self.trainer.snapshot()
        return self._fetched.optimizer_state_sha256

    def save(self, artifact: EpochArtifact | None, state: LoopState) -> None:
        """The checkpoint to resume from, and with an artifact the epoch's .apr and metadata; one copy on the host.

        Written beside the steps that follow where the trainer's arrays are copies. The first is not, nor tried again:
        it shows whether anything can be saved at all. Raises StorageError, of the save before too.
        """
        self.saver.finish()
        fetched, self._fetched = self._fetched, None
        snapshot = fetched if fetched is not None and artifact is not None else self.trainer.snapshot()
        record, cursor, size = self.trainer.record(), DataCursor(self.corpus.fingerprint, self.passes), self.log.sync()
        self.saver.save(partial(self._save, snapshot, artifact, deepcopy(state), record, cursor, size),
                        beside=self.trainer.copies and state.step > 0, again=state.step > 0)

    def finish(self) -> None:
        """Wait until what was saved is on the disk. Raises StorageError."""
        self.saver.finish()

    def _save(self, snapshot: Snapshot, artifact: EpochArtifact | None, state: LoopState, kept: dict[str, Any],
              cursor: DataCursor, log_bytes: int) -> None:
        model, tokenizer, record = self.trainer.model, self.corpus.tokenizer, self.record
        size = self.trainer.layout.size
        require_room(self.ckpt_dir, checkpoint.bytes_needed(size) + (4 * size if artifact else 0), "a checkpoint")
        if artifact is not None:
            stem = self.ckpt_dir / f"epoch-{artifact.epoch:03d}"
            with os_errors(str(self.ckpt_dir)):
                make_folder(self.ckpt_dir)
            save_epoch(stem.with_suffix(".apr"), model, snapshot, self.config.weights, tokenizer, record)
            write_atomic(stem.with_suffix(".metadata.json"), json.dumps(asdict(artifact), indent=1).encode())
        saved = SavedState(state.step, snapshot.step, state, log_bytes, asdict(artifact) if artifact else None, cursor,
                           snapshot.parameters_sha256, snapshot.optimizer_state_sha256, kept)
        checkpoint.write_checkpoint(self.ckpt_dir, state.step, model, snapshot.params, snapshot.optimizer,
                                    {**asdict(saved), **override_record()}, tokenizer.json if tokenizer else None,
                                    None if record is None else record.hf_config,
                                    None if record is None else record.assets,
                                    keep=self.config.keep, milestone_every=self.config.milestone_every)
