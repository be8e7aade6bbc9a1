"""A model to begin from: every gate by its id, the same weights from every kind, and trainers built from it."""

import json

import numpy as np
import pytest
from hf_models import BF16, LLAMA, QWEN2, QWEN3, TEXTS, random_arrays, write_folder
from models import train_config
from test_hf_models import HF, STORED, load

import apr.train.build
from apr.errors import ConfigError, FormatError, IntegrityError, NotFoundError
from apr.formats.apr_file import write_apr
from apr.formats.model_file import load_model, model_metadata, save_model
from apr.formats.safetensors import write_safetensors
from apr.hf_config import to_hf
from apr.train import checkpoint
from apr.train.build import build_cuda_trainer_with_init, build_trainer
from apr.train.init import open_init, own_sha256, read_record, record_of, write_record
from apr.train.trainer import TransformerTrainer

NORM, BIAS = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"


def as_file(path, change=lambda metadata, arrays: None, config=QWEN2):
    """An .apr file of a model, its metadata and tensors changed before it is written."""
    metadata, arrays = model_metadata(config, "m", None, None), random_arrays(config)
    change(metadata, arrays)
    write_apr(path, arrays, metadata)
    return path


def as_folder(path, change=lambda values, arrays: None, config=QWEN2):
    """The same as a Hugging Face folder."""
    values, arrays = to_hf(config), random_arrays(config)
    change(values, arrays)
    return write_folder(path, config, arrays, values=values)


def text(path, data):
    path.write_bytes(data)
    return path


def flipped(path):
    data = bytearray(as_file(path).read_bytes())
    data[len(data) // 2] ^= 1
    return text(path, bytes(data))


def without(path, name):
    (as_folder(path) / name).unlink()
    return path


def drop(names):
    return lambda _, arrays: [arrays.pop(n) for n in list(arrays) if names in n]


def nan(_, arrays):
    arrays[NORM][3] = np.nan


INIT = "FALSIFY-APR-PRETRAIN-INIT-"
GATES = {  # name: (what makes the model, class of the error, its id, what else it says)
    "nothing": (lambda p: p, NotFoundError, INIT + "003", "x"),
    "no config": (lambda p: without(p, "config.json"), NotFoundError, INIT + "003", r"config\.json"),
    "no weights": (lambda p: without(p, "model.safetensors"), NotFoundError, INIT + "003", "safetensors"),
    "text": (lambda p: text(p, b"no model at all"), FormatError, INIT + "004", "no m"),
    "APRX": (lambda p: text(p, b"APRX" + bytes(99)), FormatError, INIT + "004", "magic"),
    "version 1": (lambda p: text(p, b"APRN" + bytes(99)), FormatError, INIT + "004", "version 1"),
    "pickle": (lambda p: text(p, b"\x80\x02junk"), FormatError, INIT + "004", "a pickle"),
    "no configuration": (lambda p: as_file(p, lambda m, _: m.pop("hf_config")), FormatError, INIT + "005", "hf_config"),
    "contradiction": (lambda p: as_file(p, lambda m, _: m.update(num_layers=3)), FormatError, INIT + "005",
                      "contradicts itself"),
    "no theta": (lambda p: as_folder(p, lambda v, _: v.pop("rope_theta")), ConfigError, INIT + "005", "rope_theta"),
    "unknown family": (lambda p: as_folder(p, lambda v, _: v.update(model_type="gpt2")), ConfigError, INIT + "005",
                       "gpt2"),
    "flipped bit": (flipped, IntegrityError, INIT + "006", "CRC32"),
    "NaN": (lambda p: as_file(p, nan), FormatError, INIT + "006", NORM),
    "NaN in a folder": (lambda p: as_folder(p, nan), FormatError, INIT + "006", NORM),
    "whole numbers": (lambda p: as_file(p, lambda _, a: a.update({NORM: np.ones(32, "i4")})), FormatError,
                      INIT + "006", NORM),
    "missing": (lambda p: as_file(p, drop("layers.1.self_attn.q_proj.bias")), FormatError, INIT + "007",
                r"POPULATE-COVERAGE.*missing \['model\.layers\.1\.self_attn\.q_proj\.bias'\]"),
    "left over": (lambda p: as_folder(p, lambda _, a: a.update(extra=np.ones(1, "f4"))), FormatError, INIT + "007",
                  r"POPULATE-COVERAGE.*not used \['extra'\]"),
    "shape": (lambda p: as_folder(p, lambda _, a: a.update({NORM: np.ones(33, "f4")})), FormatError, INIT + "007",
              "POPULATE-COVERAGE.*33"),
    "qwen2 without biases": (lambda p: as_file(p, drop(".bias")), FormatError, "INIT-ARCH-MATCH-001",
                             "of a qwen2.*of a llama or mistral"),
    "llama with biases": (lambda p: as_folder(p, lambda _, a: a.update(random_arrays(QWEN2)), LLAMA), FormatError,
                          "INIT-ARCH-MATCH-001", "of a llama.*of a qwen2"),
    "llama with head norms": (lambda p: as_file(p, lambda _, a: a.update(random_arrays(QWEN3)), LLAMA), FormatError,
                              "INIT-ARCH-MATCH-001", "of a llama.*of a qwen3"),
    "encoder": (lambda p: as_folder(p, lambda v, _: v.update(model_type="bert")), ConfigError, INIT + "CUDA-003",
                "ARCH-007"),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("build", [None, build_trainer, build_cuda_trainer_with_init])
def test_a_gate_says_its_id_and_no_device_is_touched(build, name, tmp_path, monkeypatch):
    make, error, gate, says = GATES[name]
    path = make(tmp_path / "x")
    monkeypatch.setattr(apr.train.build, "Device", lambda *_, **__: pytest.fail("a device was touched"))
    with pytest.raises(error, match=says) as caught:
        if build is None:
            with open_init(path) as init:
                init.params()
        else:
            build(1e-3, 16, 1, LLAMA if "llama" in name else QWEN2, path)
    assert str(caught.value).startswith(gate + " ") and type(caught.value) is error


def test_gated_models_are_good_without_the_damage(tmp_path):
    for path in (as_file(tmp_path / "a"), as_folder(tmp_path / "b")):
        with open_init(path) as init:
            assert init.config == QWEN2 and init.params().keys() == random_arrays(QWEN2).keys()


@pytest.mark.parametrize("name", STORED)
def test_the_same_weights_from_every_kind(name, tmp_path):
    """A folder of transformers, .apr files in F32 and in its own type, a checkpoint, a run."""
    config, params = load(HF / name)
    save_model(tmp_path / "f32.apr", config, params, "m")
    save_model(tmp_path / "own.apr", config, params, "m", dtype=STORED[name])
    trainer = TransformerTrainer.with_model(config, params, train_config())
    trainer.m_buf.fill(1)
    trainer.v_buf.fill(1)
    made = checkpoint.write_checkpoint(tmp_path / "run" / "ckpt", 3, config, params, trainer.optimizer_state(),
                                       {"step": 3}, None)
    (tmp_path / "run" / "run.json").write_text("{}")
    for path in (HF / name, tmp_path / "f32.apr", tmp_path / "own.apr", made, tmp_path / "run"):
        with open_init(path) as init:
            stored, found = STORED[name] if path in (HF / name, tmp_path / "own.apr") else "F32", init.params()
            assert init.dtype == ("BF16" if stored == "BF16" else "F32") and init.config == config
        assert list(found) == list(trainer.params) and all(a.dtype == np.float32 for a in found.values())
        for _ in range(2):  # INIT-010: loading twice gives identical weights
            built = build_trainer(1e-3, 16, 1, config, path)
            assert built.parameters_sha256() == trainer.parameters_sha256()
            assert built.step == 0 and not any(a.any() for a in built.optimizer_state().values())  # INIT-009


def test_one_matrix_in_f32_makes_it_f32(tmp_path):
    for name, expected in (("model.layers.1.mlp.up_proj.weight", "F32"), (NORM, "BF16")):
        arrays = random_arrays(LLAMA, BF16)
        arrays[name] = arrays[name].astype(np.float32)
        with open_init(write_folder(tmp_path / expected, LLAMA, arrays)) as init:
            assert init.dtype == expected


def test_a_model_is_opened_and_read_once(tmp_path, monkeypatch):
    path, opened, read = as_folder(tmp_path / "m"), [], []
    real = apr.train.build.open_init

    def counting(place):
        init = real(place)
        inner = init.source.read_stored
        opened.append(place)
        object.__setattr__(init.source, "read_stored", lambda name: read.append(name) or inner(name))
        return init

    monkeypatch.setattr(apr.train.build, "open_init", counting)
    build_trainer(1e-3, 16, 1, QWEN2, path)
    assert opened == [path] and sorted(read) == sorted(random_arrays(QWEN2))


def test_the_record_is_read_back_strictly(tmp_path):
    with open_init(write_folder(tmp_path / "m", QWEN2, random_arrays(QWEN2), assets=TEXTS)) as init:
        record = record_of(init, "0" * 64, None)
        assert own_sha256(init)  # a tokenizer that apr cannot use has a hash too
    assert record.assets == TEXTS and record.hf_config == to_hf(QWEN2)
    write_record(tmp_path, record)
    assert read_record(tmp_path, QWEN2) == record
    with pytest.raises(ConfigError, match=r"the model of run\.json"):
        read_record(tmp_path, LLAMA)
    good = json.loads((tmp_path / "init.json").read_text())
    for change in ({"assets": {"../evil": "x"}}, {"assets": {"merges.txt": 3}}, {"stored": None}, {"more": 1},
                   {"hf_config": {}}, {"facts": [1]}):
        (tmp_path / "init.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(ConfigError, match=r"init\.json"):
            read_record(tmp_path, QWEN2)
    (tmp_path / "init.json").write_text("{")
    with pytest.raises(FormatError, match=r"init\.json"):
        read_record(tmp_path, QWEN2)
    (tmp_path / "init.json").unlink()
    with pytest.raises(NotFoundError, match=r"init\.json"):
        read_record(tmp_path, QWEN2)


def test_safetensors_alone_and_upstreams_dtypes(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", random_arrays(LLAMA), {})
    with pytest.raises(FormatError, match=INIT + "004.*says nothing of its model"):
        open_init(tmp_path / "m.safetensors")
    with open_init(as_file(tmp_path / "m.apr", lambda _, a: a.update({k: v.astype("f8") for k, v in a.items()}),
                           LLAMA)) as init:
        params = init.params()
    again = load_model(tmp_path / "m.apr")[1]
    assert init.dtype == "F32" and all(np.array_equal(params[k], v) for k, v in again.items())
