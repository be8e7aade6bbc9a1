"""Everything that a run is defined by, in one record: it is saved beside the run, and resuming starts from it.

Where a value comes from: a flag, else the --config file, else the mode's row, else the default written here.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from apr.config import TransformerConfig, TransformerTrainConfig, require
from apr.errors import ConfigError
from apr.params import parameter_count
from apr.train.checkpoint import KEEP
from apr.train.pretrain import LoopConfig

# Upstream's two rows of hyper-parameters (INV-TRAIN-009): a row is taken whole, then flags override.
MODES = {
    "finetune": {"lr": 5e-5, "warmup_steps": 100, "target_val_loss": 2.2},
    "from-scratch": {"lr": 3e-4, "warmup_steps": 1000, "target_val_loss": 3.0},
}
TOKENS_PER_PARAMETER = 10  # below this a run is refused (CHINCHILLA-001) unless forced


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run: the model, its training, the loop's policy, and where data come from (paths as text, None for none)."""

    model: TransformerConfig
    train: TransformerTrainConfig
    loop: LoopConfig
    mode: str
    dataset: str | None
    tokenizer: str | None
    val_shard: str | None
    val_batches: int
    allow_shard_cycle: bool
    synthetic: bool
    init: str | None
    force_init_loss: bool = False
    weights: str = "f32"  # type of the weights in each epoch's .apr; checkpoints hold the float32 master
    parity_every: int = 500  # steps from one that is held against the reference to the next, on a GPU; 0 for none
    keep: int = KEEP  # newest checkpoints
    milestone_every: int = 0  # steps between checkpoints that are kept for good; 0 for none
    step_timeout: float | None = None  # seconds; None: GPU_SECONDS on a GPU, none on a CPU; 0: none

    def __post_init__(self) -> None:
        require("mode", self.mode, "one of " + ", ".join(MODES), self.mode in MODES)
        require("val_batches", self.val_batches, "at least 1", self.val_batches >= 1)
        require("weights", self.weights, "f32 or bf16", self.weights in ("f32", "bf16"))
        for name, least in (("parity_every", 0), ("milestone_every", 0), ("keep", 1)):
            require(name, getattr(self, name), f"{least} or more", getattr(self, name) >= least)
        require("step_timeout", self.step_timeout, "0 or more, and finite",
                self.step_timeout is None or 0 <= self.step_timeout < math.inf)
        if not self.synthetic and self.dataset is None:
            raise ConfigError("dataset", "--dataset, --demo or --synthetic (INV-TRAIN-010)", "none of them",
                              "say what to train on")


def check_resumed(saved: RunConfig, asked: RunConfig, where: str) -> None:
    """Demand that flags given with --resume change nothing. Raises ConfigError listing each difference."""
    before, after = _flat(asdict(saved)), _flat(asdict(asked))
    different = [f"{k} {before.get(k)!r} -> {after.get(k)!r}" for k in sorted(before.keys() | after.keys())
                 if before.get(k) != after.get(k)]
    if different:
        raise ConfigError(where, "the configuration that the run began with", "; ".join(different),
                          "drop these flags, or start a new run")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


def check_provisioned(model: TransformerConfig, train: TransformerTrainConfig, forced: bool) -> str | None:
    """Upstream's Chinchilla gate for a run with --init: tokens per parameter, N counted as upstream counts.

    Returns a warning between 10 and 20 tokens per parameter. Raises ConfigError (CHINCHILLA-001) below 10 unless
    forced.
    """
    n = model.V * model.C + model.L * (4 * model.C**2 + 3 * model.C * model.F) + model.C
    tokens = train.max_steps * train.tokens_per_step
    if tokens < TOKENS_PER_PARAMETER * n and not forced:
        raise ConfigError("CHINCHILLA-001",
                          f"at least {TOKENS_PER_PARAMETER} tokens per parameter ({TOKENS_PER_PARAMETER * n})",
                          f"{tokens}", "train longer, or add --force-under-provisioned")
    return f"{tokens / n:.1f} tokens per parameter; 20 are advised" if tokens < 2 * TOKENS_PER_PARAMETER * n else None


def check_370m(model: TransformerConfig) -> None:
    """INV-ARCH-370M-001: the preset's size, the head counted apart. Raises ConfigError when the preset was broken."""
    count = parameter_count(model, untied=True)
    require("INV-ARCH-370M-001 parameter count", count, "366 to 374 million", 366e6 <= count <= 374e6)
