"""Export and import again: nothing lost, nothing changed, and no success before the result was read and compared."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from hf_models import ALL, BF16, LLAMA, QWEN2, TEXTS, bits, random_arrays, read_all, write_folder

from apr.errors import AprError, ConfigError, FormatError, IntegrityError
from apr.files import new_path
from apr.formats import export
from apr.formats.export import export_apr, export_hf, export_safetensors
from apr.formats.hf_folder import open_hf
from apr.formats.model_file import open_apr_model
from apr.formats.open_model import open_model
from apr.formats.safetensors import open_safetensors
from apr.hf_config import to_hf
from apr.params import EMBED, HEAD, param_specs
from apr.presets import qwen2_0_5b

NORM = "model.norm.weight"
V5 = {**{k: v for k, v in to_hf(QWEN2).items() if k not in ("rope_theta", "torch_dtype")}, "dtype": "bfloat16",
      "rope_parameters": {"rope_type": "default", "rope_theta": 1000000}, "layer_types": ["full_attention"] * 2,
      "eos_token_id": [5, 3], "pad_token_id": None, "initializer_range": 0.02}


def contents(folder) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("family", ALL)
def test_there_and_back(family, dtype, shards, tmp_path):
    """Hugging Face to .apr to Hugging Face: equal bits, equal configuration, equal text files."""
    arrays = random_arrays(ALL[family], dtype)
    values = V5 if family == "qwen2" else {**to_hf(ALL[family]), "use_cache": False}
    made = write_folder(tmp_path / "a", ALL[family], arrays, shards, values, TEXTS)
    with open_model(made) as source:
        export_apr(source, tmp_path / "m.apr")
    with open_model(tmp_path / "m.apr") as source:
        names = export_hf(source, tmp_path / "b", shard_bytes=20_000 if shards > 1 else export.SHARD_BYTES)
    assert names == sorted(contents(tmp_path / "b"))
    with open_hf(tmp_path / "b") as back, open_hf(made) as origin:
        assert read_all(back) == {name: bits(array) for name, array in arrays.items()}
        assert json.dumps(back.hf_config, sort_keys=True) == json.dumps(values, sort_keys=True)
        assert back.facts == origin.facts
    written = contents(tmp_path / "b")
    assert {name: written[name] for name in TEXTS} == {name: text.encode() for name, text in TEXTS.items()}
    assert ("model.safetensors" in written) == (shards == 1)


def test_the_package_reads_what_is_written(tmp_path):
    """The reader is not the writer's own: the safetensors package, which transformers uses."""
    arrays = random_arrays(QWEN2)
    with open_hf(write_folder(tmp_path / "a", QWEN2, arrays)) as source:
        export_hf(source, tmp_path / "b", shard_bytes=20_000)
        export_safetensors(source, tmp_path / "m.safetensors")
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    parts = sorted(set(index["weight_map"].values()))
    assert len(parts) > 2
    assert parts == [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    found = {}
    for part in parts:
        tensors = safetensors.numpy.load_file(tmp_path / "b" / part)
        assert {name for name, file in index["weight_map"].items() if file == part} == tensors.keys()
        assert sum(t.nbytes for t in tensors.values()) <= 20_000
        found |= tensors
    alone = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    for tensors in (found, alone):
        assert {n: bits(t) for n, t in tensors.items()} == {n: bits(a) for n, a in arrays.items()}
    assert HEAD not in found
    with safetensors.safe_open(tmp_path / "b" / parts[0], "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_tensor_larger_than_a_file_is_a_file_of_its_own(tmp_path):
    with open_hf(write_folder(tmp_path / "a", QWEN2, random_arrays(QWEN2))) as source:
        export_hf(source, tmp_path / "b", shard_bytes=1)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == len(param_specs(QWEN2))


@pytest.mark.parametrize(("dtype", "named"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_the_type_asked_for(dtype, named, tmp_path):
    arrays = random_arrays(QWEN2, BF16)
    arrays[NORM] = arrays[NORM].astype(np.float32) + np.float32(1e-6)
    with open_hf(write_folder(tmp_path / "a", QWEN2, arrays, values=V5)) as source:
        export_hf(source, tmp_path / "b", dtype)
        export_apr(source, tmp_path / "m.apr", dtype)
        export_safetensors(source, tmp_path / "m.safetensors", dtype)
    for path in (tmp_path / "b", tmp_path / "m.apr"):
        with open_model(path) as back:
            assert back.hf_config == {**V5, "dtype": named}
            assert set(back.dtypes.values()) == {dtype}
            for name, array in arrays.items():
                assert bits(back.read(name)) == bits(array.astype(np.float32).astype(back.read(name).dtype))
    with open_safetensors(tmp_path / "m.safetensors") as opened:
        assert {e.dtype.name for e in opened.entries.values()} == {dtype}


def test_a_value_that_float16_cannot_hold(tmp_path):
    arrays = random_arrays(QWEN2)
    arrays[EMBED][3, 4] = 7e4
    with open_hf(write_folder(tmp_path / "a", QWEN2, arrays)) as source:
        for write in (export_hf, export_apr, export_safetensors):
            with pytest.raises(FormatError, match=rf"'{EMBED}': expected values that F16 can hold, found 70000"):
                write(source, tmp_path / "b", "F16")
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "nothing half made is left"


@pytest.mark.parametrize("write", [export_hf, export_apr, export_safetensors])
def test_an_existing_path_is_refused(write, tmp_path):
    with open_hf(write_folder(tmp_path / "a", QWEN2, random_arrays(QWEN2))) as source:
        (tmp_path / "b").symlink_to("nowhere")
        with pytest.raises(ConfigError, match="a path that does not exist yet"):
            write(source, tmp_path / "b")
        with pytest.raises(AprError, match="nowhere"):
            write(source, tmp_path / "nowhere" / "b")


def spoil_config(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "use_cache": 1}))


def spoil_text(folder):
    (folder / "chat_template.jinja").write_text("other")


def spoil_tensor(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def drop_text(folder):
    (folder / "generation_config.json").unlink()


@pytest.mark.parametrize(("spoil", "says"), [
    (spoil_config, "configuration"), (spoil_text, "chat_template.jinja"), (spoil_tensor, "tensor '"),
    (drop_text, "generation_config.json")])
def test_what_reads_differently_is_no_success(spoil, says, tmp_path, monkeypatch):
    """Whatever a disk, or a defect here, does to the files between writing and reading."""
    def open_spoilt(path):
        spoil(path)
        return open_hf(path)

    made = write_folder(tmp_path / "a", QWEN2, random_arrays(QWEN2), values=V5 | {"use_cache": True}, assets=TEXTS)
    monkeypatch.setattr(export, "open_hf", open_spoilt)
    with open_hf(made) as source, pytest.raises(IntegrityError, match=says):
        export_hf(source, tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_configuration_that_says_another_model_is_no_success(tmp_path):
    """A reader of another format makes up config.json: it must describe the very model that was read."""
    with open_hf(write_folder(tmp_path / "a", QWEN2, random_arrays(QWEN2))) as source:
        other = dataclasses.replace(source, config=dataclasses.replace(QWEN2, rms_norm_eps=1e-5))
        with pytest.raises(IntegrityError, match="configuration"):
            export_hf(other, tmp_path / "b")


def test_every_tensor_is_counted_twice(tmp_path):
    seen: list[str] = []
    with open_hf(write_folder(tmp_path / "a", QWEN2, random_arrays(QWEN2))) as source:
        export_hf(source, tmp_path / "b", done=seen.append)
    names = [s.name for s in param_specs(QWEN2)]
    assert sorted(seen) == sorted(2 * names)


def test_290_of_290(tmp_path):
    """Qwen2-0.5B's own depth and names, its width shrunk: 24 layers of 12 tensors, embedding and last norm."""
    config = dataclasses.replace(qwen2_0_5b, hidden_size=28, intermediate_size=16, vocab_size=64, head_dim=2)
    arrays = random_arrays(config, BF16)
    assert len(arrays) == 290
    with open_hf(write_folder(tmp_path / "a", config, arrays, 3)) as source:
        assert {"qkv bias: 72 tensors", "stored as BF16: 290 tensors"} <= set(source.facts)
        export_apr(source, tmp_path / "m.apr")
    with open_apr_model(tmp_path / "m.apr") as source:
        export_hf(source, tmp_path / "b")
    assert {n: bits(a) for n, a in arrays.items()} == read_all(open_and_close(tmp_path / "b"))
    bias = "model.layers.23.self_attn.v_proj.bias"  # the upstream's: dropped in the last layer only
    made = write_folder(tmp_path / "c", config, {n: a for n, a in arrays.items() if n != bias}, 3)
    with pytest.raises(FormatError, match=rf"missing \['{bias}'\] \(1\)"):
        open_hf(made)


def open_and_close(folder):
    """A source whose values have been read into memory."""
    with open_hf(folder) as source:
        held = {name: source.read(name) for name in source.shapes}
    return dataclasses.replace(source, read_stored=held.__getitem__)


def test_new_path_is_whole_or_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_path(tmp_path / "x") as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), new_path(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_path(tmp_path / "x") as temporary:
        temporary.write_text("whole")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "whole")]


def test_llama_keeps_its_head(tmp_path):
    arrays = random_arrays(LLAMA)
    with open_hf(write_folder(tmp_path / "a", LLAMA, arrays)) as source:
        export_hf(source, tmp_path / "b")
    with open_hf(tmp_path / "b") as back:
        assert bits(back.read(HEAD)) == bits(arrays[HEAD])
