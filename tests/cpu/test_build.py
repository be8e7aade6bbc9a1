"""Trainers by name of device: paired arguments and architectures are checked before any device is touched."""

import dataclasses

import pytest
from models import SMALL, train_config

from apr.errors import ConfigError, FormatError, NotFoundError
from apr.train.build import build_cuda_trainer_with_init, build_trainer, make_trainer
from apr.train.trainer import TransformerTrainer

BUILDERS = pytest.mark.parametrize("build", [build_trainer, build_cuda_trainer_with_init])


@pytest.fixture
def saved(tmp_path):
    """A small model as a file, and its weights."""
    trainer = TransformerTrainer.new(SMALL, train_config())
    trainer.save_apr(tmp_path / "model.apr")
    return tmp_path / "model.apr", trainer


@BUILDERS
def test_architecture_and_file_come_together(build, saved):
    for arguments in ({"init_arch": SMALL}, {"init_path": saved[0]}):
        with pytest.raises(ConfigError, match="FALSIFY-APR-PRETRAIN-INIT-CUDA-002"):
            build(1e-3, 16, 1, **arguments)


@BUILDERS
def test_architecture_and_file_agree(build, saved):
    with pytest.raises(ConfigError, match="INIT-ARCH-MATCH-001"):
        build(1e-3, 16, 1, dataclasses.replace(SMALL, rms_norm_eps=1e-5), saved[0])


@BUILDERS
def test_a_file_that_is_no_model_is_refused(build, tmp_path):
    with pytest.raises(NotFoundError):
        build(1e-3, 16, 1, SMALL, tmp_path / "missing.apr")
    (tmp_path / "text.apr").write_text("no model")
    with pytest.raises(FormatError):
        build(1e-3, 16, 1, SMALL, tmp_path / "text.apr")


def test_encoders_are_refused():
    with pytest.raises(ConfigError, match="ARCH-007"):
        dataclasses.replace(SMALL, architecture="encoder")


def test_weights_of_a_file_and_a_fresh_optimizer(saved):
    path, trainer = saved
    built = build_trainer(1e-3, 16, 1, SMALL, path)
    assert built.parameters_sha256() == trainer.parameters_sha256() and built.step == 0
    assert built.config.lr == 1e-3 and built.config.max_seq_len == 16
    assert all(not state.any() for state in built.optimizer_state().values())


def test_random_weights_are_a_function_of_the_seed():
    a, b, c = (make_trainer(SMALL, train_config(seed=s), "cpu") for s in (1, 1, 2))
    assert a.parameters_sha256() == b.parameters_sha256() != c.parameters_sha256()
