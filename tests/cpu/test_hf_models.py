"""Models saved by transformers (tests/golden/make_hf_models.py): what apr computes from those folders, in float32."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from compare import assert_close, relative_l2
from hf_models import read_all

from apr.formats.export import export_apr, export_hf
from apr.formats.open_model import open_model
from apr.formats.safetensors import open_safetensors
from apr.reference.model import model_forward

HF = Path(__file__).parents[1] / "golden" / "hf"
NAMES = ("llama", "mistral", "qwen2", "qwen3", "smollm")
STORED = {"llama": "F32", "mistral": "BF16", "qwen2": "F32", "qwen3": "BF16", "smollm": "F16"}
TOLERANCE = 1e-5  # float32 against float32; measured worst of a position 1.9e-6


def load(path):
    """Configuration and float32 parameters of any model."""
    with open_model(path) as source:
        return source.config, {name: source.read(name).astype(np.float32) for name in source.shapes}


def expected(name):
    """What transformers computed."""
    with open_safetensors(HF / name / "expected.safetensors") as opened:
        return opened.read_all()


def test_no_golden_file_was_altered():
    listed = dict(reversed(line.split("  ")) for line in (HF / "SHA256SUMS").read_text().splitlines())
    there = {p.relative_to(HF).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
             for p in HF.rglob("*") if p.is_file() and p.name != "SHA256SUMS"}
    assert there == listed and {name.split("/")[0] for name in there} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_transformers(name):
    config, params = load(HF / name)
    truth = expected(name)
    for i in range(2):
        scores = model_forward(params, config, truth[f"prompt.{i}"][None])[0]
        assert_close(scores, truth[f"logits.{i}"], TOLERANCE, f"scores of prompt {i}")
        for t, row in enumerate(truth[f"logits.{i}"]):
            assert_close(scores[t], row, TOLERANCE, f"scores of prompt {i} at position {t}")


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_of_transformers(name):
    config, params = load(HF / name)
    truth = expected(name)
    given, tokens = truth["prompt.1"], truth["greedy"]
    scores = model_forward(params, config, np.concatenate([given, tokens])[None])[0]
    assert scores.argmax(axis=-1)[len(given) - 1:-1].tolist() == tokens.tolist() and len(tokens) == 64


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_what_transformers_saved(name, tmp_path):
    with open_model(HF / name) as source:
        assert set(source.dtypes.values()) == {STORED[name]}
        export_apr(source, tmp_path / "m.apr")
    with open_model(tmp_path / "m.apr") as source:
        export_hf(source, tmp_path / name, shard_bytes=260_000 if name == "qwen2" else 10**9)
    with open_model(HF / name) as ours, open_model(tmp_path / name) as theirs:
        assert read_all(ours) == read_all(theirs)
    for path in sorted(HF.glob(f"{name}/*")):
        if path.suffix == ".jinja" or path.name.startswith(("tokenizer", "generation_config")):
            assert (tmp_path / name / path.name).read_bytes() == path.read_bytes(), path.name
    before, after = (json.loads((p / name / "config.json").read_text()) for p in (HF, tmp_path))
    assert json.dumps(before, sort_keys=True) == json.dumps(after, sort_keys=True)
    assert len(list((tmp_path / name).glob("*.safetensors"))) == (3 if name == "qwen2" else 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_constant_shows(name):
    """If these changes did not show in the scores, the tests above could not see them either."""
    config, params = load(HF / name)
    truth = expected(name)

    def error(change, values=params):
        scores = model_forward(values, dataclasses.replace(config, **change), truth["prompt.0"][None])[0]
        return relative_l2(scores, truth["logits.0"])

    changes = [{"rms_norm_eps": config.rms_norm_eps * 10}, {"rope_theta": config.rope_theta * 2}]
    if config.rope_scaling is not None:
        changes.append({"rope_scaling": None})
    for change in changes:
        assert error(change) > 10 * TOLERANCE, change
    last = f"model.layers.{config.L - 1}."
    for part in params:
        if part.startswith(last) and part.endswith((".bias", "norm.weight")):
            neutral = np.zeros_like(params[part]) if part.endswith(".bias") else np.ones_like(params[part])
            assert error({}, {**params, part: neutral}) > 10 * TOLERANCE, part
