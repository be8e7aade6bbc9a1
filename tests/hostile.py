"""Malformed files, one Case each, with the exit code that each must end in; and the two ways of handing them to apr."""

import itertools
import os
import shutil
import signal
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from apr.cli.main import build
from apr.cli.pretrain import build_config
from apr.data.text import documents
from apr.data.tokenizer import Tokenizer
from apr.errors import AprError, one_line
from apr.formats.gguf_file import open_gguf
from apr.formats.gguf_model import open_gguf_model
from apr.formats.model_file import load_model
from apr.formats.open_model import open_model
from apr.formats.safetensors import open_safetensors
from apr.hf_config import from_hf
from apr.paths import environment
from apr.strict import read_json
from apr.tools.inspect_file import inspect
from apr.train.corpus import open_corpus

FORMAT, CONFIG, NOT_FOUND, GATE, INTEGRITY = 4, 2, 3, 5, 6
SLOW = 10.0  # seconds: U2 of the fault list


class Case(NamedTuple):
    """A malformed file: row of the fault list, kind of input, what is wrong, and `write(folder)`, which gives its path.

    `says` must be in the message, beside the file's name. `cli`: also tried through the real command.
    """

    row: str
    kind: str
    what: str
    write: Callable[[Path], Path]
    exit: int
    says: str = ""
    cli: bool = False


def run_config(path):
    """The configuration that `apr pretrain --config PATH` makes."""
    return build_config(build("pretrain").parse_args(["--config", str(path), "--run-dir", str(path.parent / "run")]))


def read_safetensors(path):
    with open_safetensors(path) as opened:
        return opened.metadata, opened.read_all()


def read_model(path):
    """Every tensor of a model."""
    with open_model(path) as source:
        return {name: source.read(name) for name in source.shapes}


def read_gguf(path):
    """Metadata and tensors of a GGUF file."""
    with open_gguf(path) as opened:
        return opened.metadata, {name: opened.read(name) for name in opened.entries}


def read_gguf_model(path):
    """Configuration, tensors and text files of a model in a GGUF file."""
    with open_gguf_model(path) as source:
        return source.config, {name: source.read(name) for name in source.shapes}, source.assets


def with_environment(path):
    """The variables of a file of NAME=value lines, as the process's own."""
    before = dict(os.environ)
    try:
        os.environ.update(line.split("=") for line in path.read_text().splitlines())
        return environment()
    finally:
        os.environ.clear()
        os.environ.update(before)


READ = {
    "apr": inspect, "checkpoint": inspect, "shards": inspect, "log": inspect, "model": load_model,
    "safetensors": read_safetensors, "hf": read_model, "gguf": read_gguf, "gguf model": read_gguf_model,
    "config": lambda path: from_hf(read_json(path), str(path)), "yaml": run_config,
    "corpus": lambda path: open_corpus(run_config(path), None, lambda _text: None),
    "tokenizer": lambda path: Tokenizer.load(path).require_eos(),
    "text": lambda path: list(documents([path], "content", Counter())), "env": with_environment,
}


def put(name: str, data: bytes | Callable[[], bytes]) -> Callable[[Path], Path]:
    """A `write` that makes the file `name` of these bytes."""
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data())
        return folder / name
    return write


def all_cases() -> list[Case]:
    """Every case."""
    import hostile_data
    import hostile_folders
    import hostile_gguf
    import hostile_models
    import hostile_settings
    import hostile_tensors
    import hostile_tokenizers
    parts = (hostile_tensors, hostile_gguf, hostile_models, hostile_folders, hostile_settings, hostile_data,
             hostile_tokenizers)
    return [case for part in parts for case in part.cases()]


def good() -> dict[str, Callable[[Path], Path]]:
    """For each kind a `write` of a file with nothing wrong: a reader that refuses everything proves nothing."""
    import gguf_files
    import hostile_data as data
    import hostile_folders as folders
    import hostile_gguf as gguf
    import hostile_models as models
    import hostile_settings as settings
    import hostile_tensors as tensors
    import hostile_tokenizers as tokenizers
    return {"apr": put("x.apr", tensors.apr_bytes()), "safetensors": put("x.safetensors", tensors.st_bytes(tensors.ST)),
            "gguf": put("x.gguf", gguf_files.gguf_bytes()), "gguf model": gguf.written_model,
            "model": models.model(), "hf": folders.folder(shards=3),
            "checkpoint": models.checkpoint(), "log": models.run_folder(b'{"event": "end"}\n'),
            "config": put("config.json", settings.HF_TEXT), "yaml": put("run.yaml", settings.yaml_text()),
            "env": put("environment", b"APR_DEVICE=cpu"), "shards": data.shards(), "tokenizer": tokenizers.json_file(),
            "text": put("x.txt", tokenizers.WORDS.encode()), "corpus": data.corpus()}


def complaint(case: Case, error: BaseException | None) -> str:
    """What is wrong with how a case ended in process; nothing when it was refused as it should be."""
    if error is None:
        return "accepted"
    if not isinstance(error, AprError):
        return f"crashed: {type(error).__name__}: {str(error)[:200]}"
    text = str(error)
    if error.exit_code != case.exit:
        return f"exit {error.exit_code}, not {case.exit}: {text}"
    if case.says not in text:
        return f"does not say '{case.says}': {text}"
    return f"more than one plain line: {text!r}" if text != one_line(text, len(text)) else ""


def anonymous(case: Case) -> bool:
    """Whether the message need not name the file: there is none, or it is about the data that the file names."""
    return case.kind in ("env", "corpus")


class Late(Exception):
    """A reader took longer than SLOW."""


def in_time(read: Callable, path: Path):
    """read(path), interrupted after SLOW seconds: a hang is a failure of one case, not of the whole session."""
    def late(*_):
        raise Late(f"over {SLOW:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SLOW)
    try:
        return read(path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(case: Case) -> str:
    """Hand a case to the public function that reads its kind, in a folder of its own; returns the complaint."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        path, error = case.write(folder), None
        try:
            in_time(READ[case.kind], path)
        except BaseException as e:  # a panic of Rust is no Exception; an interrupt is to end the tests
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            error = e
        said = complaint(case, error)
        if not said and not anonymous(case) and one_line(path.name) not in str(error):
            return f"does not name the file: {error}"
        return "ran code from the file" if (folder / "pwned").exists() else said
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tally(cases: Iterable[Case]) -> dict[tuple[str, str], Counter]:
    """By row and kind: tried, refused (as expected), crashed (another exception), wrong (accepted, or misreported)."""
    table: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for case in cases:
        said = attempt(case)
        verdict = "refused" if not said else "crashed" if said.startswith("crashed") else "wrong"
        table[case.row, case.kind].update(["tried", verdict])
    return dict(table)


def grouped(cases: Iterable[Case]) -> dict[tuple[str, str], list[Case]]:
    """The cases by row and kind, in their order."""
    ordered = sorted(cases, key=lambda c: (c.row, c.kind))
    return {key: list(group) for key, group in itertools.groupby(ordered, key=lambda c: (c.row, c.kind))}
