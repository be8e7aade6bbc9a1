"""What a run is made of where the user says little: modes, defaults, and the gates of size before anything is read."""

import dataclasses
from types import SimpleNamespace

import pytest
from models import SMALL, train_config

from apr.cli.main import build
from apr.cli.pretrain import build_config
from apr.errors import ConfigError
from apr.presets import llama_370m, qwen2_0_5b, tiny
from apr.train.build import _model
from apr.train.run_config import MODES, check_370m, check_provisioned


def asked(*flags, init=None):
    """The configuration of a run on a dataset with these flags."""
    return build_config(build("pretrain").parse_args(["--run-dir", "x", "--dataset", "y", *flags]), init=init)


def row(config):
    """What a mode decides."""
    return config.train.lr, config.train.warmup_steps, config.loop.target_val_loss


def test_a_mode_is_taken_whole():
    """INV-TRAIN-009: a learning rate of one row beside a warm-up of the other is a mode that nobody asked for."""
    assert row(asked("--mode", "finetune")) == (5e-5, 100, 2.2)
    assert row(asked("--mode", "from-scratch")) == (3e-4, 1000, 3.0)
    assert {name: tuple(values.values()) for name, values in MODES.items()} == {
        name: row(asked("--mode", name)) for name in MODES}


def test_what_is_given_goes_before_the_mode():
    assert row(asked("--mode", "finetune", "--lr", "1e-3")) == (1e-3, 100, 2.2)
    assert row(asked("--mode", "finetune", "--warmup-steps", "7", "--target-val-loss", "1.5")) == (5e-5, 7, 1.5)


def test_without_a_model_to_begin_from_it_is_llama_370m_from_scratch():
    config = asked()
    assert config.model == llama_370m and config.mode == "from-scratch" and config.init is None
    assert (config.train.batch_size, config.train.max_seq_len, config.train.max_steps) == (16, 1024, 1000)
    assert _model(None, None) == (llama_370m, None)  # the builder's default too
    init = SimpleNamespace(config=SMALL, dtype="F32")
    given = asked("--init", "somewhere", "--seq-length", "16", init=init)
    assert given.model == SMALL and given.mode == "finetune" and given.init == "somewhere"


def test_what_to_train_on_is_said_and_never_assumed():
    """INV-TRAIN-010: made-up losses are asked for, real ones need data."""
    bare = build("pretrain").parse_args(["--run-dir", "x"])
    with pytest.raises(ConfigError, match="INV-TRAIN-010"):
        build_config(bare)
    assert not asked().synthetic and asked("--synthetic").synthetic


def test_the_least_learning_rate_follows_the_one_given():
    for flags, expected in (((), 3e-6), (("--lr", "1e-2"), 1e-4), (("--lr", "1e-6"), 1e-7), (("--lr", "1e-8"), 1e-8)):
        assert asked(*flags).train.lr_min == pytest.approx(expected, rel=1e-12)


N = 97 * 32 + 2 * (4 * 32**2 + 3 * 32 * 48) + 32  # parameters of SMALL, counted as upstream counts them


@pytest.mark.parametrize(("tokens", "forced", "says"), [
    (10 * N - 1, False, "refused"), (10 * N - 1, True, "advice"), (10 * N, False, "advice"),
    (20 * N - 1, False, "advice"), (20 * N, False, ""), (20 * N, True, "")])
def test_tokens_per_parameter(tokens, forced, says):
    """CHINCHILLA-001 to -003."""
    train = train_config(max_steps=tokens, batch_size=1, max_seq_len=1)
    assert train.max_steps * train.tokens_per_step == tokens
    try:
        said = check_provisioned(SMALL, train, forced)
        found = "advice" if said else ""
        assert not said or "20 are advised" in said
    except ConfigError as e:
        assert "CHINCHILLA-001" in str(e) and e.exit_code == 2
        found = "refused"
    assert found == says


def test_the_370m_preset_is_what_its_name_says():
    check_370m(llama_370m)
    for change in ({"num_hidden_layers": 23}, {"num_hidden_layers": 25}, {"vocab_size": 42_000}):
        with pytest.raises(ConfigError, match="INV-ARCH-370M-001"):
            check_370m(dataclasses.replace(llama_370m, **change))
    assert asked("--preset", "tiny", "--seq-length", "64").model == tiny
    assert asked("--preset", "qwen2_0_5b").model == qwen2_0_5b
