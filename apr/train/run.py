"""A pretraining run from configuration to end: data, trainer, loop, run directory.

    RUN_DIR/run.json        the configuration, whole, and the versions that ran it
    RUN_DIR/train.jsonl     the log                     RUN_DIR/tokenizer.json
    RUN_DIR/ckpt/           step-N/ to resume from; epoch-NNN.apr and epoch-NNN.metadata.json of each epoch
    RUN_DIR/lock            held while a process writes here
"""

import fcntl
import json
import os
import platform
import socket
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

import apr
from apr.config import decode
from apr.data.tokenizer import Tokenizer
from apr.errors import ConfigError, FormatError, NotFoundError
from apr.files import os_errors, write_atomic
from apr.strict import read_json
from apr.train import checkpoint
from apr.train.base import StepStats, Trainer
from apr.train.build import device_versions, make_trainer
from apr.train.corpus import Corpus, open_corpus
from apr.train.log import RunLog, Sink
from apr.train.pretrain import EpochArtifact, LoopState, PretrainLoop, checkpoint_event
from apr.train.run_config import RunConfig
from apr.train.signals import StopRequest
from apr.train.synthetic import SyntheticRun


class DirectoryLock:
    """Exclusive use of a run directory, by flock: it is freed by the kernel however the process ends.

    Raises ConfigError naming the process that holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / "lock"
        with os_errors(str(path)):
            self.file = open(path, "a+")  # noqa: SIM115 - held for the life of the run
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.file.seek(0)
                holder = self.file.read(200).strip()
                self.file.close()
                raise ConfigError(str(run_dir), "a run directory that nobody is using", f"a run in it ({holder})",
                                  "wait for it, or choose another --run-dir") from None
            self.file.truncate(0)
            self.file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            self.file.flush()

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


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


class RealRun:
    """StepFn, ValFn and CheckpointFn over a trainer and a corpus."""

    def __init__(self, config: RunConfig, trainer: Trainer, corpus: Corpus, run_dir: Path, log: RunLog,
                 passes: int) -> None:
        self.config, self.trainer, self.corpus, self.log, self.passes = config, trainer, corpus, log, passes
        self.ckpt_dir = run_dir / "ckpt"

    def step(self, step: int, lr: float) -> StepStats | None:
        """Train on the rows of this step: a pure function of seed and step."""
        t, stream = self.config.train, self.corpus.stream
        rows = t.batch_size * t.accumulation_steps
        last = (step + 1) * rows
        if last > stream.rows_per_epoch and not self.config.allow_shard_cycle:
            return None
        if (passes := -(-last // stream.rows_per_epoch)) > self.passes:
            self.passes = passes
            self.log({"event": "note", "step": step, "text": f"pass {passes} over the data begins, in a new order"})
        micro = [stream.batch(step * rows + a * t.batch_size, t.batch_size) for a in range(t.accumulation_steps)]
        self.trainer.train_batch(micro, lr)
        return self.trainer.last_stats

    def validate(self, epoch: int) -> float:
        """Token-weighted mean over all held-out batches."""
        return self.trainer.eval_batches(self.corpus.heldout)

    def optimizer_state_sha256(self) -> str:
        """The trainer's."""
        return self.trainer.optimizer_state_sha256()

    def save(self, artifact: EpochArtifact | None, state: LoopState) -> None:
        """The checkpoint to resume from, and with an artifact the epoch's .apr and metadata."""
        tokenizer = self.corpus.tokenizer
        if artifact is not None:
            stem = self.ckpt_dir / f"epoch-{artifact.epoch:03d}"
            with os_errors(str(self.ckpt_dir)):
                self.ckpt_dir.mkdir(exist_ok=True)
            if tokenizer is None:
                self.trainer.save_apr(stem.with_suffix(".apr"))
            else:
                self.trainer.save_apr_with_tokenizer(stem.with_suffix(".apr"), tokenizer)
            write_atomic(stem.with_suffix(".metadata.json"), json.dumps(asdict(artifact), indent=1).encode())
        saved = SavedState(state.step, self.trainer.step, state, self.log.sync(),
                           asdict(artifact) if artifact else None, DataCursor(self.corpus.fingerprint, self.passes),
                           self.trainer.parameters_sha256(), self.trainer.optimizer_state_sha256(),
                           self.trainer.record())
        checkpoint.write_checkpoint(self.ckpt_dir, state.step, self.trainer.model, self.trainer.params,
                                    self.trainer.optimizer_state(), asdict(saved),
                                    tokenizer.json if tokenizer else None)


def read_run(run_dir: Path) -> RunConfig:
    """The configuration of a run. Raises NotFoundError, FormatError, ConfigError."""
    path = run_dir / "run.json"
    if not path.is_file():
        raise NotFoundError(str(run_dir), "a run to resume (run.json)", "none", "check --run-dir, or drop --resume")
    values = read_json(path)
    if not isinstance(values, dict) or "config" not in values:
        raise FormatError(str(path), "a 'config'", "none", "start a new run")
    return decode(RunConfig, values["config"], str(path))


def refuse_used(run_dir: Path) -> None:
    """Raise ConfigError when a new run would write into a folder that holds something."""
    with os_errors(str(run_dir)):
        if run_dir.exists() and (not run_dir.is_dir() or any(p.name != "lock" for p in run_dir.iterdir())):
            what = "another run" if (run_dir / "run.json").exists() else "other files"
            raise ConfigError(str(run_dir), "an empty or new folder", what,
                              "choose another --run-dir, or add --resume to go on with a run")


def pretrain(config: RunConfig, run_dir: Path, device: str, sinks: list[Sink]) -> dict[str, Any]:
    """A new run; returns its `end` event. Nothing is created before data and configuration were found good.

    Raises every AprError of what it uses; GateError and Stopped come after the `end` event.
    """
    refuse_used(run_dir)
    notes: list[str] = []
    if config.synthetic:
        corpus, trainer = None, None
    else:
        corpus = open_corpus(config, None, notes.append)
        trainer = make_trainer(config.model, config.train, device, config.init)
    with os_errors(str(run_dir)):
        run_dir.mkdir(parents=True, exist_ok=True)
    with DirectoryLock(run_dir):
        refuse_used(run_dir)
        if corpus is not None and corpus.tokenizer is not None:
            write_atomic(run_dir / "tokenizer.json", corpus.tokenizer.json.encode())
        write_atomic(run_dir / "run.json",
                     json.dumps({"config": asdict(config), "versions": versions(device)}, indent=1).encode())
        with RunLog(run_dir, sinks) as log:
            log({"event": "start", "device": device, "synthetic": config.synthetic, "mode": config.mode,
                 "dataset": config.dataset, "vocab_size": config.model.V, "max_steps": config.train.max_steps,
                 "tokens_per_step": config.train.tokens_per_step, "entropy_bits": corpus and corpus.entropy,
                 "train_tokens": corpus and corpus.train_tokens, **versions(device)})
            for text in notes:
                log({"event": "note", "step": 0, "text": text})
            return _loop(config, run_dir, log, trainer, corpus, None)


def resume(config: RunConfig, run_dir: Path, device: str, sinks: list[Sink], warn: Any) -> dict[str, Any]:
    """Go on with a run from its newest whole checkpoint; bit for bit what it would have been. Arguments as pretrain.

    Raises ConfigError when the data are not those that the run began with.
    """
    if config.synthetic:
        raise ConfigError(str(run_dir), "a run with checkpoints", "a synthetic one", "run it again from the start")
    with DirectoryLock(run_dir):
        checkpoint.sweep(run_dir / "ckpt")
        found = checkpoint.latest(run_dir / "ckpt", warn)
        saved = _decode_state(found)
        tokenizer = Tokenizer.load(run_dir / "tokenizer.json") if (run_dir / "tokenizer.json").is_file() else None
        corpus = open_corpus(config, tokenizer, lambda _text: None)
        if saved.data.fingerprint != corpus.fingerprint:
            raise ConfigError(str(config.dataset), "the tokens that the run began with", "others",
                              "restore the data, or start a new run")
        trainer = make_trainer(config.model, config.train, device, None, found.params, saved.trainer)
        trainer.load_optimizer(found.optimizer, saved.optimizer_step)
        with RunLog(run_dir, sinks, saved.log_bytes) as log:
            log(checkpoint_event(saved.step, saved.artifact))
            log({"event": "resume", "step": saved.step, "checkpoint": found.path.name})
            if _machine(saved.trainer) != _machine(trainer.record()):
                log({"event": "note", "step": saved.step, "text": "resumed on another kind of device: the last bits of "
                     "what follows differ from a run that stayed"})
            return _loop(config, run_dir, log, trainer, corpus, saved)


def _machine(record: dict[str, Any]) -> tuple[Any, ...]:
    gemm = record.get("gemm", {})
    return gemm.get("gpu"), gemm.get("cublaslt")


def _decode_state(found: checkpoint.Checkpoint) -> SavedState:
    try:
        return msgspec.convert(found.state, SavedState, strict=True)
    except msgspec.ValidationError as e:
        raise FormatError(str(found.path / "state.json"), "the state of a run", str(e),
                          "use another checkpoint") from None


def _loop(config: RunConfig, run_dir: Path, log: RunLog, trainer: Trainer | None, corpus: Corpus | None,
          saved: SavedState | None) -> dict[str, Any]:
    if trainer is None or corpus is None:
        epochs = -(-config.train.max_steps // config.loop.steps_per_epoch)
        work: Any = SyntheticRun(config.loop.target_val_loss, epochs, config.train.tokens_per_step)
    else:
        work = RealRun(config, trainer, corpus, run_dir, log, saved.data.passes if saved else 1)
    fresh = config.init is None and not config.synthetic
    with StopRequest() as stop:
        return PretrainLoop(config.loop, config.train, config.model.V, fresh, work, work, work, log, lambda: stop.name,
                            saved.loop if saved else None).run()


def versions(device: str) -> dict[str, str]:
    """What ran: apr, Python, NumPy, tokenizers; with a GPU its name, its driver's and CuPy's versions."""
    return {"apr": apr.__version__, "python": platform.python_version(), "numpy": version("numpy"),
            "tokenizers": version("tokenizers"), **device_versions(device)}
