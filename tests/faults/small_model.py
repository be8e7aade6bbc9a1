"""A model that commands can compute with: small, with a tokenizer."""

import dataclasses
from pathlib import Path

from models import SMALL, random_params

from apr.data.tokenizer import Tokenizer
from apr.formats.model_file import save_model


def write_model(path: Path) -> Path:
    """Write it; returns its path."""
    tokenizer = Tokenizer.train(["a small text of words, to train on"] * 4, 280)
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)
    save_model(path, config, random_params(config, 5), "m", tokenizer.json)
    return path
