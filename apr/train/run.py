"""A pretraining run from configuration to end: data, trainer, loop, run directory.

    RUN_DIR/run.json        the configuration, whole, and the versions that ran it
    RUN_DIR/train.jsonl     the log                     RUN_DIR/tokenizer.json
    RUN_DIR/init.json       with --init: what is kept of the model that the run began from
    RUN_DIR/ckpt/           step-N/ to resume from; epoch-NNN.apr and epoch-NNN.metadata.json of each epoch
    RUN_DIR/lock            held while a process writes here
"""

import fcntl
import json
import os
import platform
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import apr
from apr.config import decode
from apr.data.tokenizer import Tokenizer
from apr.errors import ConfigError, FormatError, NotFoundError
from apr.files import make_folder, open_appending, os_errors, require_room, write_atomic
from apr.formats.source import ARCH_MATCH
from apr.paths import override_record
from apr.strict import read_json
from apr.train import checkpoint
from apr.train.base import Trainer
from apr.train.build import device_versions, make_trainer
from apr.train.corpus import Corpus, open_corpus
from apr.train.init import InitModel, InitRecord, open_init, read_record, record_of, write_record
from apr.train.log import Notes, RunLog, Sink
from apr.train.pretrain import PretrainLoop, checkpoint_event
from apr.train.real_run import RealRun, SavedState, Watch, saved_state
from apr.train.recovery import Recovery
from apr.train.run_config import RunConfig
from apr.train.signals import StopRequest
from apr.train.snapshot import sha256_of
from apr.train.synthetic import SyntheticRun
from apr.train.watchdog import Watchdog


class DirectoryLock:
    """Exclusive use of a run directory, by flock: it is freed by the kernel however the process ends.

    Raises ConfigError naming the process that holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / "lock"
        with os_errors(str(path)):
            self.file = open_appending(path)  # held for the life of the run
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.file.seek(0)
                holder = self.file.read(200).decode(errors="replace").strip()
                self.file.close()
                raise ConfigError(str(run_dir), "a run directory that nobody is using", f"a run in it ({holder})",
                                  "wait for it, or choose another --run-dir") from None
            try:
                self.file.truncate(0)
                os.write(self.file.fileno(), f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
            except OSError:
                self.file.close()
                raise

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


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


def pretrain(config: RunConfig, run_dir: Path, device: str, sinks: list[Sink],
             init: InitModel | None = None, watch: Watch | None = None, remarks: Sequence[str] = ()) -> dict[str, Any]:
    """A new run; returns its `end` event. Nothing is created before data and configuration were found good.

    `init`: the model of config.init where the caller has opened it already; it is closed before training. `watch`
    checks steps as they are made; `remarks` become notes in the log. Raises every AprError of what it uses; GateError
    and Stopped come after the `end` event.
    """
    refuse_used(run_dir)
    notes = Notes()
    for remark in remarks:
        notes(remark)
    if init is None and config.init is not None and not config.synthetic:
        init = open_init(Path(config.init))
    with init or nullcontext():
        corpus, trainer, record = _begin(config, device, notes, init)
    if trainer is not None:
        size = trainer.layout.size  # while one checkpoint is written, the others and an epoch's model are there
        require_room(run_dir, (config.keep + 1) * checkpoint.bytes_needed(size) + 4 * size, "this run's checkpoints")
    ran = versions(device)
    if record is not None:
        ran.update(init=record.path, init_parameters_sha256=record.parameters_sha256)
    with os_errors(str(run_dir)):
        make_folder(run_dir)
    with DirectoryLock(run_dir):
        refuse_used(run_dir)
        if corpus is not None and corpus.tokenizer is not None:
            write_atomic(run_dir / "tokenizer.json", corpus.tokenizer.json.encode())
        if record is not None:
            write_record(run_dir, record)
        write_atomic(run_dir / "run.json",
                     json.dumps({"config": asdict(config), "versions": ran}, indent=1).encode())
        with RunLog(run_dir, sinks) as log:
            log({"event": "start", "device": device, "synthetic": config.synthetic, "mode": config.mode,
                 "dataset": config.dataset, "vocab_size": config.model.V, "max_steps": config.train.max_steps,
                 "tokens_per_step": config.train.tokens_per_step, "entropy_bits": corpus and corpus.entropy,
                 "train_tokens": corpus and corpus.train_tokens, "path": trainer.path if trainer else {}, **ran})
            notes.open(log, 0)
            return _loop(config, run_dir, log, trainer, corpus, record, None, watch)


def _begin(config: RunConfig, device: str, notes: Notes,
           init: InitModel | None) -> tuple[Corpus | None, Trainer | None, InitRecord | None]:
    """Corpus, trainer and what is to be kept of the model that the run begins from; None where there is none."""
    if config.synthetic:
        return None, None, None
    if init is None:
        corpus = open_corpus(config, None, notes)
        return corpus, make_trainer(config.model, config.train, device, warn=notes), None
    if init.config != config.model:
        raise ConfigError(f"{ARCH_MATCH} {init.path}", "the model of the configuration", "another",
                          "give the model's own shape")
    notes(f"init: {init.path}: " + "; ".join(init.facts))
    corpus, params = open_corpus(config, None, notes, init), init.params()
    record = record_of(init, sha256_of(params), corpus.tokenizer)
    return corpus, make_trainer(config.model, config.train, device, params, warn=notes), record


def resume(config: RunConfig, run_dir: Path, device: str, sinks: list[Sink], warn: Any, watch: Watch | None = None,
           remarks: Sequence[str] = ()) -> dict[str, Any]:
    """Go on with a run from its newest whole checkpoint; bit for bit what it would have been. Arguments as pretrain.

    The model that it began from is not needed. Raises ConfigError when the data are not those that the run began with.
    """
    if config.synthetic:
        raise ConfigError(str(run_dir), "a run with checkpoints", "a synthetic one", "run it again from the start")
    with DirectoryLock(run_dir):
        checkpoint.sweep(run_dir / "ckpt")
        record = read_record(run_dir, config.model) if config.init is not None else None
        found = checkpoint.latest(run_dir / "ckpt", warn)
        saved, notes = saved_state(found), Notes()
        tokenizer = Tokenizer.load(run_dir / "tokenizer.json") if (run_dir / "tokenizer.json").is_file() else None
        corpus = open_corpus(config, tokenizer, lambda _text: None)
        if saved.data.fingerprint != corpus.fingerprint:
            raise ConfigError(str(config.dataset), "the tokens that the run began with", "others",
                              "restore the data, or start a new run")
        trainer = make_trainer(config.model, config.train, device, found.params, saved.trainer, notes)
        trainer.load_optimizer(found.optimizer, saved.optimizer_step)
        name = found.path.name
        checkpoint.pass_over(run_dir / "ckpt", saved.step)
        del found  # its arrays are the trainer's now
        with RunLog(run_dir, sinks, saved.log_bytes) as log:
            log(checkpoint_event(saved.step, saved.artifact))
            log({"event": "resume", "step": saved.step, "checkpoint": name, "path": trainer.path,
                 **override_record()})
            notes.open(log, saved.step)
            for remark in remarks:
                notes(remark)
            if _machine(saved.trainer) != _machine(trainer.record()):
                notes("resumed on another kind of device: the last bits of what follows differ from a run that stayed")
            elif saved.trainer.get("path", trainer.path) != trainer.path:
                notes(f"resumed with other kernels ({trainer.path} after {saved.trainer['path']}): the last bits of "
                      f"what follows differ from a run that kept them")
            return _loop(config, run_dir, log, trainer, corpus, record, saved, watch)


def _machine(record: dict[str, Any]) -> tuple[Any, ...]:
    gemm = record.get("gemm", {})
    return gemm.get("gpu"), gemm.get("cublaslt")


def _loop(config: RunConfig, run_dir: Path, log: RunLog, trainer: Trainer | None, corpus: Corpus | None,
          record: InitRecord | None, saved: SavedState | None, watch: Watch | None) -> dict[str, Any]:
    recovery, seconds = None, 0.0
    doing: Callable[[], str] = str
    saver: AbstractContextManager[Any] = nullcontext()
    if trainer is None or corpus is None:
        epochs = -(-config.train.max_steps // config.loop.steps_per_epoch)
        work: Any = SyntheticRun(config.loop.target_val_loss, epochs, config.train.tokens_per_step)
    else:
        work = RealRun(config, trainer, corpus, run_dir, log, saved, record, watch)
        recovery, saver, doing, seconds = Recovery(work, log), work.saver, trainer.doing, trainer.step_seconds
    fresh = config.init is None and not config.synthetic
    limit = seconds if config.step_timeout is None else config.step_timeout
    with StopRequest() as stop, Watchdog(limit, doing) as watchdog, saver:
        return PretrainLoop(config.loop, config.train, config.model.V, fresh, work, work, work, log, lambda: stop.name,
                            saved.loop if saved else None, from_init=record is not None,
                            force_init_loss=config.force_init_loss, recover_fn=recovery, watchdog=watchdog).run()


def versions(device: str) -> dict[str, Any]:
    """What ran: apr, Python, NumPy, tokenizers; with a GPU its name, its driver's and CuPy's versions; overrides."""
    return {"apr": apr.__version__, "python": platform.python_version(), "numpy": version("numpy"),
            "tokenizers": version("tokenizers"), **device_versions(device), **override_record()}
