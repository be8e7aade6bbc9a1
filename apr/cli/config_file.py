"""The --config file of `apr pretrain`: checked whole when it is read, so that every complaint names file and key."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from apr.config import TransformerConfig, TransformerTrainConfig, decode, require
from apr.presets import preset
from apr.strict import read_yaml
from apr.train.pretrain import LoopConfig
from apr.train.run_config import MODES


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """What may stand in a --config file; each key is optional. See docs/pretrain.md."""

    preset: str | None = None
    model: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    loop: dict[str, Any] | None = None
    mode: str | None = None
    dataset: str | None = None
    tokenizer: str | None = None
    val_shard: str | None = None
    val_batches: int | None = None
    allow_shard_cycle: bool | None = None
    synthetic: bool | None = None
    init: str | None = None
    force_init_loss: bool | None = None
    weights: str | None = None
    parity_every: int | None = None
    keep: int | None = None
    milestone_every: int | None = None
    step_timeout: float | None = None

    def __post_init__(self) -> None:
        require("mode", self.mode, "one of " + ", ".join(MODES), self.mode is None or self.mode in MODES)
        require("weights", self.weights, "f32 or bf16", self.weights in (None, "f32", "bf16"))
        require("val_batches", self.val_batches, "at least 1", self.val_batches is None or self.val_batches >= 1)
        for name, least in (("parity_every", 0), ("milestone_every", 0), ("keep", 1)):
            value = getattr(self, name)
            require(name, value, f"{least} or more", value is None or value >= least)
        require("step_timeout", self.step_timeout, "0 or more, and finite",
                self.step_timeout is None or 0 <= self.step_timeout < math.inf)
        if self.preset is not None:
            preset(self.preset)


KEYS = tuple(f.name for f in fields(ConfigFile))


def read_config_file(path: Path) -> dict[str, Any]:
    """The keys that the file gives, valid each and as sections.

    Raises NotFoundError, StorageError, FormatError for what is no YAML, ConfigError naming file and key.
    """
    values = read_yaml(path)
    decoded = decode(ConfigFile, values, str(path))
    if decoded.model is not None:
        decode(TransformerConfig, decoded.model, f"{path}: model")
    for name, kind in (("train", TransformerTrainConfig), ("loop", LoopConfig)):
        section = getattr(decoded, name)
        if section is not None:
            decode(kind, {**asdict(kind()), **section}, f"{path}: {name}")
    return {key: value for key, value in values.items() if value is not None}
