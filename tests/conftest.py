"""Fixtures shared by every test, and the closing line that counts skips with their reasons."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests import `compare`, `models` and `hostile` by name


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every run."""
    return np.random.default_rng(20261120)
