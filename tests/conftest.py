"""Fixtures shared by the tests."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests import compare, models, hostile … by name


def pytest_addoption(parser):
    """The option of `make test-faults`."""
    parser.addoption("--fault-receipt", type=Path, help="run only the tests of a fault's row, and record the outcomes")


def pytest_configure(config):
    """Record what comes of the rows."""
    if path := config.getoption("--fault-receipt", default=None):
        from fault_rows import RowRecorder
        config.pluginmanager.register(RowRecorder(path), "fault rows")


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every run."""
    return np.random.default_rng(20261120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with small texts in texts/ and the configuration of a small run in run.yaml."""
    from models import YAML, write_texts

    path = tmp_path_factory.mktemp("corpus")
    write_texts(path / "texts")
    (path / "run.yaml").write_text(YAML)
    return path
