"""Whole runs with --init: the first loss, what is kept for whoever takes the result, resuming, the gate at step 0."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from hf_models import BF16, write_folder
from test_hf_models import HF
from test_run import arguments, end_state, stop_at, without_stop

from apr.cli.main import build
from apr.cli.pretrain import build_config, open_asked
from apr.data.shards import write_shards
from apr.data.tokenizer import Tokenizer
from apr.errors import ConfigError, GateError, NotFoundError, Stopped
from apr.formats.export import export_hf
from apr.formats.model_file import load_model
from apr.formats.open_model import open_model
from apr.hf_config import to_hf
from apr.train import checkpoint
from apr.train.corpus import open_corpus
from apr.train.run import pretrain, read_run, resume
from apr.train.trainer import TransformerTrainer

GATE = "FALSIFY-APR-PRETRAIN-INIT-FINETUNE-003"
TEXTS = {"tokenizer_config.json": '{"eos_token": "<|endoftext|>"}\n',
         "generation_config.json": '{\n  "eos_token_id": [0, 1],\n  "temperature": 0.7\n}\n',
         "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}\n"}
SHORT = ("--num-steps", "6", "--steps-per-epoch", "3", "--batch-size", "2", "--seq-length", "16",
         "--warmup-steps", "1")


@pytest.fixture(scope="module")
def base(folder):
    """A folder with one trained model in every form: base/run, its .apr, and maker/, as somebody would publish it."""
    pretrain(build_config(arguments(folder)), folder / "base", "cpu", [])
    config, params, metadata = load_model(folder / "base" / "ckpt" / "epoch-002.apr")
    spaced = json.dumps(json.loads(metadata["tokenizer.json"]), indent=3)  # the maker's bytes are not apr's
    values = {**to_hf(config), "torch_dtype": "bfloat16", "eos_token_id": 0, "_name_or_path": "maker/model"}
    write_folder(folder / "maker", config, {k: v.astype(BF16) for k, v in params.items()}, 3, values,
                 {**TEXTS, "tokenizer.json": spaced})
    return folder


def asked(base, init, *more, dataset="texts"):
    """The configuration of a fine-tune, through the command line's own functions."""
    args = build("pretrain").parse_args(["--dataset", str(base / dataset), "--init", str(init), "--run-dir", "unused",
                                         "--allow-shard-cycle", *SHORT, *more])
    with open_asked(args) as init_model:
        return build_config(args, "fp32", init_model)


def events(run_dir):
    return [json.loads(line) for line in (run_dir / "train.jsonl").read_text().splitlines()]


def notes(run_dir):
    return [e["text"] for e in events(run_dir) if e["event"] == "note"]


@pytest.mark.parametrize("kind", ["maker", "base/ckpt/epoch-002.apr", "base/ckpt/step-00000024", "base"])
def test_the_first_loss_is_that_of_the_model_loaded_otherwise(base, tmp_path, kind):
    config = asked(base, base / kind)
    assert config.weights == ("bf16" if kind == "maker" else "f32") and config.mode == "finetune"
    end = pretrain(config, tmp_path / "run", "cpu", [])
    with open_model(base / kind) as source:
        params = {name: source.read(name).astype(np.float32) for name in source.shapes}
    trainer = TransformerTrainer.with_model(config.model, params, config.train)
    corpus = open_corpus(config, Tokenizer.load(tmp_path / "run" / "tokenizer.json"), print)
    assert end["initial_val_loss"] == trainer.eval_batches(corpus.heldout)
    assert end["status"] == "OK" and end["final_val_loss"] < end["initial_val_loss"]
    start, recorded = events(tmp_path / "run")[0], json.loads((tmp_path / "run" / "run.json").read_text())["versions"]
    for said in (start, recorded):
        assert said["init"] == str(base / kind) and said["init_parameters_sha256"] == trainer.parameters_sha256()
    own = Tokenizer.load(base / "base" / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "run" / "tokenizer.json").sha256 == own.sha256
    assert not any("training a byte-level BPE" in text for text in notes(tmp_path / "run"))


def test_export_of_a_fine_tune_loses_nothing_and_bf16_stays_bf16(base, tmp_path):
    pretrain(asked(base, base / "maker"), tmp_path / "run", "cpu", [])
    saved = checkpoint.latest(tmp_path / "run" / "ckpt", print)
    with open_model(tmp_path / "run" / "ckpt" / "epoch-001.apr") as source, open_model(base / "maker") as maker:
        assert source.assets == maker.assets and source.hf_config == maker.hf_config
        assert set(source.dtypes.values()) == {"BF16"}
        for name, master in saved.params.items():
            assert np.array_equal(source.read(name), master.astype(BF16))
        export_hf(source, tmp_path / "out")
    with open_model(tmp_path / "run") as source, open_model(base / "maker") as maker:  # the newest checkpoint
        assert source.assets == maker.assets and set(source.dtypes.values()) == {"F32"}
        assert source.hf_config == {**maker.hf_config, "torch_dtype": "float32"}
    assert any(not np.array_equal(a, a.astype(BF16).astype(np.float32)) for a in saved.params.values())
    for name in (*TEXTS, "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / "maker" / name).read_bytes()
    values = [json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", base / "maker")]
    assert values[0] == values[1] and values[0]["torch_dtype"] == "bfloat16"


def test_weights_may_be_asked_for(base, tmp_path):
    pretrain(asked(base, base / "maker", "--weights", "f32"), tmp_path / "f32", "cpu", [])
    with open_model(tmp_path / "f32" / "ckpt" / "epoch-001.apr") as source:
        assert set(source.dtypes.values()) == {"F32"} and source.hf_config["torch_dtype"] == "float32"
    pretrain(build_config(arguments(base, "--num-steps", "8", "--weights", "bf16")), tmp_path / "bf16", "cpu", [])
    with open_model(tmp_path / "bf16" / "ckpt" / "epoch-000.apr") as source:
        assert set(source.dtypes.values()) == {"BF16"}


def test_resuming_needs_no_init_and_changes_no_bit(base, tmp_path):
    shutil.copytree(base / "maker", tmp_path / "maker")
    config = asked(base, tmp_path / "maker")
    pretrain(config, tmp_path / "whole", "cpu", [])
    with pytest.raises(Stopped):
        pretrain(config, tmp_path / "run", "cpu", [stop_at(2, signal.SIGTERM)])
    shutil.rmtree(tmp_path / "maker")
    resume(read_run(tmp_path / "run"), tmp_path / "run", "cpu", [], print)
    assert without_stop(end_state(tmp_path / "run")) == end_state(tmp_path / "whole")
    for name in ("epoch-000.apr", "epoch-001.apr"):
        assert (tmp_path / "run" / "ckpt" / name).read_bytes() == (tmp_path / "whole" / "ckpt" / name).read_bytes()
    (tmp_path / "run" / "init.json").unlink()
    with pytest.raises(NotFoundError, match=r"init\.json"):
        resume(read_run(tmp_path / "run"), tmp_path / "run", "cpu", [], print)


def test_scrambled_weights_are_refused_before_the_first_step(base, tmp_path):
    command = [sys.executable, "-m", "apr", "pretrain", "--init", str(HF / "qwen2"), "--dataset", str(base / "texts"),
               "--allow-shard-cycle", "--force-under-provisioned", "--device", "cpu", *SHORT]
    done = subprocess.run([*command, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 5 and "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert GATE in said and "--force-init-loss" in said and f"{0.7 * np.log(307):.4f}" in said
    assert [e["event"] for e in events(tmp_path / "run")] == ["start", "note", "note", "eval", "guard", "end"]
    assert events(tmp_path / "run")[-1]["status"] == "ABORTED" and not (tmp_path / "run" / "ckpt").exists()
    assert events(tmp_path / "run")[3]["val_loss"] > 0.7 * np.log(307)
    with pytest.raises(NotFoundError, match="a complete checkpoint"):
        resume(read_run(tmp_path / "run"), tmp_path / "run", "cpu", [], print)
    done = subprocess.run([*command, "--run-dir", str(tmp_path / "forced"), "--force-init-loss", "--lr", "0.01",
                           "--num-steps", "40", "--steps-per-epoch", "40"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_run(tmp_path / "forced").force_init_loss
    assert any(GATE in text and "passed over" in text for text in notes(tmp_path / "forced"))


def test_the_gate_is_not_for_runs_from_scratch_nor_needed_by_good_ones(base, tmp_path):
    assert not any(GATE in str(e) for e in events(base / "base"))  # began at ln V
    pretrain(asked(base, base / "maker", "--force-init-loss"), tmp_path / "run", "cpu", [])
    assert not any(GATE in text for text in notes(tmp_path / "run"))


def test_a_tokenizer_of_ones_own(base, tmp_path):
    """Another tokenizer is said, a smaller one taken, a larger one refused."""
    texts = [p.read_text() for p in (base / "texts").iterdir()]
    for size in (300, 340):
        (tmp_path / str(size)).mkdir()
        (tmp_path / str(size) / "tokenizer.json").write_text(Tokenizer.train(texts, size).json)
    small, own = Tokenizer.load(tmp_path / "300"), Tokenizer.load(base / "maker")
    config = asked(base, base / "maker", "--tokenizer", str(tmp_path / "300"), "--force-init-loss")
    pretrain(config, tmp_path / "run", "cpu", [])  # ARCH-009
    warnings = [text for text in notes(tmp_path / "run") if text.startswith("warning")]
    assert len(warnings) == 1 and small.sha256[:16] in warnings[0] and own.sha256[:16] in warnings[0]
    with open_model(tmp_path / "run" / "ckpt" / "epoch-001.apr") as source:
        assert source.assets["tokenizer.json"] == small.json
        assert source.assets["generation_config.json"] == TEXTS["generation_config.json"]
    with pytest.raises(GateError, match=r"FALSIFY-APR-PRETRAIN-ARCH-010.*at most 320.*340"):
        pretrain(asked(base, base / "maker", "--tokenizer", str(tmp_path / "340")), tmp_path / "large", "cpu", [])
    assert not (tmp_path / "large").exists()


def test_no_tokenizer_is_made_for_a_model_that_brings_none(base, tmp_path):
    with pytest.raises(ConfigError, match=r"--tokenizer.*brings none"):
        pretrain(asked(base, HF / "qwen3"), tmp_path / "run", "cpu", [])
    own = Tokenizer.load(base / "maker")
    write_shards(base / "shards", own.encode_stream(p.read_text() for p in sorted((base / "texts").iterdir())), own)
    config = asked(base, base / "maker", dataset="shards")
    pretrain(config, tmp_path / "shards", "cpu", [])  # which bring the model's own
    assert not any(text.startswith("warning") for text in notes(tmp_path / "shards"))
    (base / "shards" / "tokenizer.json").unlink()
    pretrain(config, tmp_path / "bare", "cpu", [])
    assert Tokenizer.load(tmp_path / "bare" / "tokenizer.json").sha256 == own.sha256


def test_the_configuration_must_be_the_models(base, tmp_path):
    config = build_config(arguments(base, "--preset", "demo"))
    with pytest.raises(ConfigError, match="INIT-ARCH-MATCH-001"):
        pretrain(dataclasses.replace(config, init=str(base / "maker")), tmp_path / "run", "cpu", [])
    assert not (tmp_path / "run").exists()
