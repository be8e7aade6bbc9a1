"""Models through open_model, and as .apr files with what their maker gave along: nothing lost, one tensor at a time."""

import dataclasses
import json
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hf_models import ALL, BF16, LLAMA, QWEN2, TEXTS, bits, random_arrays, read_all, write_folder
from models import train_config

from apr.errors import ConfigError, FormatError, IntegrityError, NotFoundError
from apr.formats import source
from apr.formats.apr_file import open_apr, write_apr
from apr.formats.hf_folder import open_hf
from apr.formats.model_file import (
    MAX_TEXTS,
    fitting,
    load_model,
    model_metadata,
    open_apr_model,
    save_model,
    write_apr_model,
)
from apr.formats.open_model import open_model
from apr.formats.source import check_names
from apr.formats.stored import rounded
from apr.hf_config import to_hf
from apr.params import EMBED
from apr.train.checkpoint import write_checkpoint
from apr.train.trainer import TransformerTrainer

NORM = "model.norm.weight"
VALUES = {**to_hf(QWEN2), "torch_dtype": "bfloat16", "eos_token_id": 5, "_name_or_path": "é/x", "use_cache": True}


def folder(tmp_path, config=QWEN2, dtype=BF16, values=None, assets=TEXTS, shards=1):
    """A folder as transformers writes it, and its tensors."""
    arrays = random_arrays(config, dtype)
    return write_folder(tmp_path / "hf", config, arrays, shards, values or to_hf(config), assets), arrays


def as_apr(tmp_path, made, dtype=None):
    with open_hf(made) as source:
        write_apr_model(tmp_path / "m.apr", source, dtype)
    return tmp_path / "m.apr"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("family", ALL)
def test_apr_keeps_everything(family, dtype, tmp_path):
    made, arrays = folder(tmp_path, ALL[family], dtype, {**to_hf(ALL[family]), "use_cache": True}, shards=3)
    with open_model(as_apr(tmp_path, made)) as source, open_hf(made) as origin:
        assert source.format == "apr"
        assert (source.config, source.hf_config, source.assets) == (origin.config, origin.hf_config, TEXTS)
        assert read_all(source) == {name: bits(array) for name, array in arrays.items()}
        assert source.facts == origin.facts


def test_the_maker_s_config_and_one_tokenizer(tmp_path):
    path = as_apr(tmp_path, folder(tmp_path, values=VALUES)[0])
    with open_apr(path) as opened:
        assert opened.metadata["hf_config"] == VALUES
        assert opened.metadata["tokenizer.json"] == TEXTS["tokenizer.json"]
        assert opened.metadata["tokenizer.eos_token_id"] == 5  # the first of generation_config.json
        assert opened.metadata["hf_assets"] == {k: v for k, v in TEXTS.items() if k != "tokenizer.json"}
        assert opened.metadata["name"] == "hf"


@pytest.mark.parametrize(("dtype", "named"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_apr_of_another_type(dtype, named, tmp_path):
    made, arrays = folder(tmp_path, dtype=np.float32, values={**to_hf(QWEN2), "torch_dtype": "float32"})
    with open_apr_model(as_apr(tmp_path, made, dtype)) as source:
        assert set(source.dtypes.values()) == {dtype}
        assert source.hf_config == {**to_hf(QWEN2), "torch_dtype": named}
        for name, array in arrays.items():
            assert bits(source.read(name)) == bits(array.astype(source.read(name).dtype))


@pytest.mark.parametrize(("value", "dtype", "fits"), [
    (65519.0, "F16", True), (65520.0, "F16", False), (-7e4, "F16", False), (3.4e38, "BF16", False),
    (3.38e38, "BF16", True), (3.4e38, "F32", True)])
def test_values_that_the_type_cannot_hold_are_refused(value, dtype, fits):
    array = np.array([[0, 1], [value, 2]], np.float32)
    if fits:
        assert np.isfinite(rounded(array, dtype, "t")).all()
        return
    with pytest.raises(FormatError, match=rf"tensor 't': expected values that {dtype} can hold, found .* at element 2"):
        rounded(array, dtype, "tensor 't'")


def test_rounding_is_to_nearest_even():
    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    assert rounded(halves, "BF16", "t").astype(np.float32).tolist() == [1, 1 + 2**-6, 1 + 2**-7]
    assert rounded(halves, "F32", "t") is halves


def test_writing_holds_one_tensor(tmp_path):
    config = dataclasses.replace(LLAMA, vocab_size=16, hidden_size=256, intermediate_size=256, num_hidden_layers=12)
    made, arrays = folder(tmp_path, config, np.float32, assets={})
    largest, total = max(a.nbytes for a in arrays.values()), sum(a.nbytes for a in arrays.values())
    del arrays
    tracemalloc.start()
    try:
        as_apr(tmp_path, made)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 20 * largest
    assert peak < 5 * largest + 2**20, f"{peak} of {total}"


def test_texts_that_do_not_fit_lose_their_spaces_first():
    pretty = json.dumps({"a  b": ["\\\"  ", "é"] * 10, "n": -1.50e-3}, indent=4, ensure_ascii=False)
    padded = {"tokenizer.json": pretty + " " * MAX_TEXTS, "merges.txt": "a b\n\n  c"}
    less = fitting(padded)
    assert less["merges.txt"] == padded["merges.txt"]
    assert less["tokenizer.json"] == pretty.replace("    ", "").replace("\n", "").replace('": ', '":')
    assert json.loads(less["tokenizer.json"]) == json.loads(pretty)
    assert fitting({"tokenizer.json": pretty}) == {"tokenizer.json": pretty}
    with pytest.raises(FormatError, match="leave out vocab"):
        fitting({"merges.txt": "x" * MAX_TEXTS})


def test_a_tokenizer_as_large_as_llama_3s(tmp_path):
    """17 MB with its indentation; 128,000 entries and 280,000 pairs are far more values than a header may have."""
    tokens = {f"Ġtoken{i}": i for i in range(128_000)}
    merges = [[f"Ġt{i}", f"oken{i}"] for i in range(280_000)]
    text = json.dumps({"model": {"vocab": tokens, "merges": merges}}, indent=2, ensure_ascii=False)
    assert len(text.encode()) > 17_000_000
    path = as_apr(tmp_path, folder(tmp_path, assets={**TEXTS, "tokenizer.json": text})[0])
    with open_apr_model(path) as source:
        assert json.loads(source.assets["tokenizer.json"]) == json.loads(text)
        assert source.assets["merges.txt"] == TEXTS["merges.txt"]


@pytest.mark.parametrize(("key", "value", "says"), [
    ("hf_assets", [], "found list"), ("hf_assets", {"../x": "a"}, "'../x'"),
    ("hf_assets", {"config.json": "{}"}, "config"),
    ("hf_assets", {"tokenizer.json": "{}"}, "tokenizer.json"), ("hf_assets", {"merges.txt": 5}, "merges.txt: expected"),
    ("tokenizer.json", 5, "tokenizer.json: expected a text"), ("tokenizer.json", None, "expected a text")])
def test_text_files_of_other_names_or_kinds_are_refused(key, value, says, tmp_path):
    write_apr(tmp_path / "m.apr", random_arrays(QWEN2), {**model_metadata(QWEN2, "", None, None), key: value})
    with pytest.raises(FormatError, match=says):
        open_apr_model(tmp_path / "m.apr")


def test_save_model_keeps_the_maker_s_files(tmp_path):
    arrays = random_arrays(QWEN2)
    save_model(tmp_path / "m.apr", QWEN2, arrays, "tuned", '{"mine": 1}', 7, dtype="BF16", hf_config=VALUES,
               assets=TEXTS)
    with open_apr_model(tmp_path / "m.apr") as source:
        assert source.hf_config == VALUES
        assert source.assets == {**TEXTS, "tokenizer.json": '{"mine": 1}'}
        assert read_all(source) == {name: bits(array.astype(BF16)) for name, array in arrays.items()}
    save_model(tmp_path / "m.apr", QWEN2, arrays, "tuned", dtype="F32", hf_config=VALUES)
    assert load_model(tmp_path / "m.apr")[2]["hf_config"] == {**VALUES, "torch_dtype": "float32"}
    with pytest.raises(ConfigError, match="hf_config: expected the configuration of this model"):
        save_model(tmp_path / "n.apr", LLAMA, arrays, "", hf_config=VALUES)
    with pytest.raises(FormatError, match=f"'{NORM}': expected values that F16 can hold"):
        save_model(tmp_path / "n.apr", QWEN2, {**arrays, NORM: np.full(32, 1e5, np.float32)}, "", dtype="F16")
    assert not (tmp_path / "n.apr").exists()


def test_a_trained_model_says_which_id_ends_a_text(tmp_path):
    save_model(tmp_path / "m.apr", QWEN2, random_arrays(QWEN2), "", "{}", 7)
    with open_apr_model(tmp_path / "m.apr") as source:
        assert "eos ids [7] from config.json" in source.facts


def test_an_apr_file_that_changes_while_it_is_read(tmp_path):
    path = as_apr(tmp_path, folder(tmp_path)[0])
    with open_apr_model(path) as source:
        source.read(NORM)
        with open(path, "ab") as f:
            f.write(b"x")
        with pytest.raises(FormatError, match=rf"m\.apr: tensor '{NORM}': .*changed while it was read"):
            source.read(NORM)


@pytest.fixture
def run(tmp_path):
    """A run folder with two checkpoints, the parameters of the newest, and its path."""
    trainer = TransformerTrainer.new(QWEN2, train_config())
    state = {"step": 1, "parameters_sha256": "", "optimizer_sha256": "", "loop": {}, "data": {}}
    for step in (9, 10):
        trainer.params[NORM][...] = step
        write_checkpoint(tmp_path / "run" / "ckpt", step, QWEN2, trainer.params, trainer.optimizer_state(),
                         {**state, "step": step}, TEXTS["tokenizer.json"])
    (tmp_path / "run" / "run.json").write_text("{}")
    return tmp_path / "run"


def test_checkpoint_and_run_are_models(run):
    newest = run / "ckpt" / "step-00000010"
    (run / "ckpt" / "step-00000011.tmp-1").mkdir()
    (run / "ckpt" / "step-00000012").mkdir()  # without a manifest: not complete
    for path in (run, newest):
        with open_model(path) as source:
            assert (source.path, source.config) == (newest, QWEN2)
            assert (source.read(NORM) == 10).all()
            assert source.assets == {"tokenizer.json": TEXTS["tokenizer.json"]}
    for path in run.glob("ckpt/*/manifest.json"):
        path.unlink()
    with pytest.raises(NotFoundError, match="a complete checkpoint of this run"):
        open_model(run)
    with pytest.raises(NotFoundError, match=r"manifest\.json: .* no complete checkpoint"):
        open_model(newest)


def test_a_run_that_is_its_own_checkpoint(run):
    (run / "manifest.json").write_text("{}")
    (run / "ckpt" / "step-00000099").symlink_to(run)
    with pytest.raises(NotFoundError, match=r"step-00000099.config\.json"):
        open_model(run)


@pytest.mark.parametrize("damage", ["longer", "gone", "true", "elsewhere"])
def test_a_checkpoint_that_its_manifest_does_not_fit(damage, run):
    path = run / "ckpt" / "step-00000010"
    manifest = json.loads((path / "manifest.json").read_text())
    if damage == "longer":
        with open(path / "tokenizer.json", "ab") as f:
            f.write(b" ")
    elif damage == "gone":
        (path / "optimizer.safetensors").unlink()
    elif damage == "true":
        manifest["files"]["state.json"]["size"] = True
    else:
        manifest["files"]["../../run.json"] = {"size": 2}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="use another checkpoint"):
        open_model(path)


@pytest.mark.parametrize(("content", "says"), [
    (b"", "starts b''"), (b"PK\x03\x04rest", "a zip or PyTorch file"), (b"\x80\x02}q", "a pickle"),
    (b"<html>", "HTML"), (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"), (b"\0" * 99, "starts"),
    (b"APRN" + bytes(99), r"version 1 \(APRN\)"), (b"APR\0", "header"),
    ((9).to_bytes(8, "little") + b"{}", "a safetensors file, which says nothing of its model")])
def test_unknown_files_are_named(content, says, tmp_path):
    (tmp_path / "m.apr").write_bytes(content)  # the suffix decides nothing
    with pytest.raises(FormatError, match=says) as caught:
        open_model(tmp_path / "m.apr")
    assert "m.apr" in str(caught.value) and "\n" not in str(caught.value)


def test_the_first_bytes_decide(tmp_path):
    path = as_apr(tmp_path, folder(tmp_path)[0])
    path.rename(tmp_path / "m.gguf")
    with open_model(tmp_path / "m.gguf") as source:
        assert source.format == "apr"


def test_other_paths(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match=r"config\.json"):
        open_model(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FormatError, match="a regular file"):
        open_model(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="ARCH-007"):
        open_model(write_folder(tmp_path / "bert", LLAMA, {EMBED: np.zeros(1, "f4")}, values={"model_type": "bert"}))
    made, _ = folder(tmp_path)
    (made / "manifest.json").write_text('{"format": "of another tool"}')
    with open_model(made) as source:
        assert source.format == "hf"


def test_more_layers_than_tensors_are_refused_before_their_table_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("apr.formats.source.param_specs", lambda config: pytest.fail("a table was made"))
    with pytest.raises(FormatError, match="the tensors of 1024 layers, found 3 tensors"):
        check_names(dataclasses.replace(QWEN2, num_hidden_layers=1024), dict.fromkeys("abc", (1,)), "m")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=str)
def test_what_is_not_finite_is_found_wherever_it_is(dtype):
    largest = ml_dtypes.finfo(dtype).max
    values = np.full(source.BLOCK + 3, largest, dtype)
    values[:4] = [-largest, 0, ml_dtypes.finfo(dtype).smallest_subnormal, 1]
    source.check_finite(values, "t")
    source.check_finite(values[:0], "t")
    for bad in (np.nan, np.inf, -np.inf):
        for at in (0, source.BLOCK - 1, source.BLOCK, source.BLOCK + 2):
            broken = values.copy()
            broken[at] = bad
            with pytest.raises(FormatError, match=f"t: expected finite values, found -?(nan|inf) at element {at};"):
                source.check_finite(broken.reshape(1, -1), "t")
