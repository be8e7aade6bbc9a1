"""A model to begin from (`--init`): an .apr or GGUF file, a Hugging Face folder, a checkpoint or a run.

Every refusal carries the id of its gate and keeps its own class and exit code. The numbers after INIT- are those of
upstream's messages; upstream's list of falsifiers numbers some of the same gates otherwise.

    FALSIFY-APR-PRETRAIN-INIT-003        nothing there, or a part of the model missing
    FALSIFY-APR-PRETRAIN-INIT-004        not a model's file: bad magic, another container
    FALSIFY-APR-PRETRAIN-INIT-005        metadata or architecture not whole, or contradicting themselves
    FALSIFY-APR-PRETRAIN-INIT-006        a tensor that cannot be read, or holds no finite numbers
    FALSIFY-APR-PRETRAIN-INIT-007        POPULATE-COVERAGE: a parameter without a tensor, or a tensor left over
    FALSIFY-APR-PRETRAIN-INIT-CUDA-003   an encoder (ARCH-007); no device has been touched by then
    INIT-ARCH-MATCH-001                  the tensors are another family's than the configuration says
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import TransformerConfig, decode, require
from apr.data.tokenizer import Tokenizer
from apr.errors import AprError, ConfigError, FormatError, IntegrityError, NotFoundError
from apr.files import write_atomic
from apr.formats.model_file import TOKENIZER, fitting, save_model
from apr.formats.open_model import find_reader
from apr.formats.source import ARCH_MATCH, ASSETS, COVERAGE, ModelSource
from apr.hf_config import from_hf
from apr.params import param_specs
from apr.strict import read_json
from apr.train.snapshot import Snapshot

GATE = "FALSIFY-APR-PRETRAIN-INIT-"
RECORD = "init.json"
VOCABULARY = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")  # repeat tokenizer.json


@dataclass(frozen=True)
class InitModel:
    """An open model to begin from; also a context manager. Its tensors are read by `params`.

    `dtype` is BF16 when every matrix is stored as that, else F32: in F16 a trained weight may not fit, and a quantised
    one would lose what was trained.
    """

    path: Path
    config: TransformerConfig
    dtype: str
    hf_config: dict[str, Any]
    assets: dict[str, str]
    facts: tuple[str, ...]
    source: ModelSource

    def params(self) -> dict[str, np.ndarray]:
        """Every parameter by name, float32, in the layout's order. Raises as open_init (INIT-006)."""
        with _gates(self.path):
            return {s.name: self.source.read(s.name).astype(np.float32, copy=False) for s in param_specs(self.config)}

    def __enter__(self) -> "InitModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()


def open_init(path: Path) -> InitModel:
    """Open a model to begin from, all but the values of its tensors checked; no device is touched.

    Raises NotFoundError, FormatError, IntegrityError, ConfigError with the gate's id first (above), StorageError.
    """
    with _gates(path):
        reader, place = find_reader(path)
        source = reader(place)
    matrices = {source.dtypes[s.name] for s in param_specs(source.config) if len(s.shape) == 2}
    return InitModel(path, source.config, "BF16" if matrices == {"BF16"} else "F32", source.hf_config, source.assets,
                     source.facts, source)


@contextmanager
def _gates(path: Path) -> Iterator[None]:
    """Put the gate's id before the place of an error."""
    try:
        yield
    except (NotFoundError, FormatError, IntegrityError, ConfigError) as e:
        gate = _gate(e, path)
        raise type(e)(f"{gate} {e.where}".strip(), e.expected, e.found, e.fix) from None


def _gate(error: AprError, path: Path) -> str:
    if error.where.startswith(ARCH_MATCH):
        return ""
    if error.where.startswith(COVERAGE):
        return GATE + "007"
    if isinstance(error, NotFoundError):
        return GATE + "003"
    if isinstance(error, IntegrityError) or ": tensor " in error.where:
        return GATE + "006"
    if "ARCH-007" in error.expected:
        return GATE + "CUDA-003"
    return GATE + ("004" if isinstance(error, FormatError) and error.where == str(path) else "005")


@dataclass(frozen=True, kw_only=True)
class InitRecord:
    """What a run keeps of the model that it began from, in its init.json: the model itself may be gone on resuming.

    `hf_config` and `assets` are the maker's configuration and text files, which every saved model carries on;
    `parameters_sha256` is as Trainer.parameters_sha256 of the weights at the start; `stored` their type, `facts` what
    was understood.
    """

    path: str
    parameters_sha256: str
    stored: str
    hf_config: dict[str, Any]
    assets: dict[str, str]
    facts: list[str]

    def __post_init__(self) -> None:
        odd = sorted(self.assets.keys() - {*ASSETS})
        require("assets", odd, "texts by name: " + ", ".join(ASSETS), not odd, "init")


def record_of(init: InitModel, parameters_sha256: str, tokenizer: Tokenizer | None) -> InitRecord:
    """The record of a run with this tokenizer. Raises FormatError when the texts do not fit into an .apr file."""
    assets = dict(init.assets)
    if tokenizer is not None and tokenizer.sha256 != own_sha256(init):
        assets = {name: text for name, text in assets.items() if name not in VOCABULARY}
        assets[TOKENIZER] = tokenizer.json
    return InitRecord(path=str(init.path), parameters_sha256=parameters_sha256, stored=init.dtype,
                      hf_config=init.hf_config, assets=fitting(assets), facts=list(init.facts))


def own_tokenizer(init: InitModel) -> Tokenizer | None:
    """The tokenizer that the model brings; None if it brings none. Raises FormatError for one that apr cannot use."""
    text = init.assets.get(TOKENIZER)
    return None if text is None else Tokenizer.from_json(text.encode(), f"{init.path}: {TOKENIZER}")


def own_sha256(init: InitModel) -> str:
    """Tokenizer.sha256 of the model's own tokenizer; of its bytes where apr cannot use it, "" where there is none."""
    try:
        own = own_tokenizer(init)
    except FormatError:
        return hashlib.sha256(init.assets[TOKENIZER].encode()).hexdigest()
    return "" if own is None else own.sha256


def write_record(run_dir: Path, record: InitRecord) -> None:
    """Write init.json. Raises StorageError."""
    write_atomic(run_dir / RECORD, json.dumps(asdict(record), ensure_ascii=False, indent=1).encode())


def read_record(run_dir: Path, config: TransformerConfig) -> InitRecord:
    """Read init.json. Raises NotFoundError, FormatError, ConfigError unless it is of this model."""
    where = str(run_dir / RECORD)
    record = decode(InitRecord, read_json(run_dir / RECORD), where)
    if from_hf(record.hf_config, f"{where}: hf_config") != config:
        raise ConfigError(f"{where}: hf_config", "the model of run.json", "another", "restore the file")
    return record


def save_epoch(path: Path, config: TransformerConfig, snapshot: Snapshot, weights: str, tokenizer: Tokenizer | None,
               record: InitRecord | None) -> None:
    """A model at the end of an epoch as an .apr file, its weights (float32) rounded to `weights` (f32, bf16).

    Raises StorageError, FormatError for a weight that bf16 cannot hold.
    """
    kept: Mapping[str, Any] = {} if record is None else {"hf_config": record.hf_config, "assets": record.assets}
    brings = record is None or TOKENIZER not in record.assets
    save_model(path, config, snapshot.params, f"{config.hf_model_type}-pretrain",
               tokenizer.json if tokenizer is not None and brings else None,
               tokenizer.eos_id if tokenizer is not None else None, dtype=weights.upper(), **kept)
