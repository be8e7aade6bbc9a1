"""Checkpoints of a model so small that a thousand are read in seconds; each step's numbers are its own."""

import dataclasses
from pathlib import Path

import numpy as np
from models import SMALL, random_params

from apr.errors import NotFoundError
from apr.train import checkpoint

TINY = dataclasses.replace(SMALL, vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=8)


def state_of(step: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameters and moments after so many steps."""
    params = random_params(TINY, step)
    return params, {f"{kind}.{name}": array + at for at, kind in enumerate("mv", 1) for name, array in params.items()}


def save(ckpt_dir: Path, step: int) -> Path:
    """Write the checkpoint of a step."""
    return checkpoint.write_checkpoint(ckpt_dir, step, TINY, *state_of(step), {"step": step}, "{}")


def newest(ckpt_dir: Path) -> int:
    """The step of the checkpoint that resuming would take, -1 for none; its numbers must be those of that step."""
    try:
        found = checkpoint.latest(ckpt_dir, lambda _text: None)
    except NotFoundError:
        return -1
    step = found.state["step"]
    for read, written in zip((found.params, found.optimizer), state_of(step), strict=True):
        assert read.keys() == written.keys() and all(np.array_equal(read[k], written[k]) for k in written)
    return step


def temporaries(folder: Path) -> list[str]:
    """What an unfinished writer has left, at any depth."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if ".tmp-" in p.name)
