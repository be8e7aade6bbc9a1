"""Hugging Face folders: what is read of them and said about it, and every way in which one is refused."""

import json
import os

import numpy as np
import pytest
from hf_models import ALL, BF16, LLAMA, QWEN2, QWEN3, TEXTS, bits, random_arrays, read_all, write_folder, write_index

from apr.errors import AprError, ConfigError, FormatError, NotFoundError
from apr.formats.hf_folder import MAX_SHARDS, open_hf
from apr.hf_config import to_hf
from apr.params import EMBED, HEAD, param_specs

BIAS, NORM = "model.layers.1.self_attn.k_proj.bias", "model.norm.weight"
SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("family", ALL)
def test_every_tensor_is_read_as_it_is_stored(family, dtype, shards, tmp_path):
    given = random_arrays(ALL[family], dtype)
    with open_hf(write_folder(tmp_path / "m", ALL[family], given, shards, assets=TEXTS)) as source:
        assert (source.format, source.config, source.hf_config) == ("hf", ALL[family], to_hf(ALL[family]))
        assert read_all(source) == {name: bits(array) for name, array in given.items()}
        assert source.assets == TEXTS


def test_types_may_differ_from_tensor_to_tensor(tmp_path):
    given = random_arrays(QWEN2, BF16)
    given[NORM], given[BIAS] = given[NORM].astype(np.float32), given[BIAS].astype(np.float16)
    with open_hf(write_folder(tmp_path / "m", QWEN2, given)) as source:
        assert read_all(source) == {name: bits(array) for name, array in given.items()}
        assert (source.dtypes[NORM], source.dtypes[BIAS], source.dtypes[EMBED]) == ("F32", "F16", "BF16")


def facts(folder) -> tuple[str, ...]:
    with open_hf(folder) as source:
        return source.facts


def test_facts_name_their_origin(tmp_path):
    found = facts(write_folder(tmp_path / "m", QWEN2, random_arrays(QWEN2, BF16), assets=TEXTS))
    for fact in ("rope_theta 1000000 from config.json", "rms_norm_eps 1e-06 from config.json", "qkv bias: 6 tensors",
                 f"tied head: lm_head is {EMBED}", "eos ids [5, 3] from generation_config.json",
                 f"stored as BF16: {len(param_specs(QWEN2))} tensors", "head_dim 8 from config.json",
                 "4 query heads, 2 of keys and values from config.json"):
        assert fact in found
    assert found[-1].startswith("text files: ")
    assert sorted(found[-1].removeprefix("text files: ").split(", ")) == sorted(TEXTS)


def test_facts_of_other_spellings(tmp_path):
    values = {k: v for k, v in to_hf(LLAMA).items() if k not in ("rope_theta", "head_dim", "num_key_value_heads")}
    values |= {"rope_parameters": {"rope_type": "default", "rope_theta": LLAMA.rope_theta}, "eos_token_id": 7,
               "num_key_value_heads": 2}
    found = facts(write_folder(tmp_path / "m", LLAMA, random_arrays(LLAMA), values=values))
    for fact in ("rope_theta 10000 from rope_parameters", "head_dim 8 as hidden_size / num_attention_heads",
                 "eos ids [7] from config.json", f"untied head: {HEAD}", "text files: none"):
        assert fact in found
    assert not any("bias" in fact for fact in found)
    assert "q and k norm: 4 tensors" in facts(write_folder(tmp_path / "n", QWEN3, random_arrays(QWEN3)))
    mistral = {**to_hf(ALL["mistral"]), "sliding_window": 48}
    found = facts(write_folder(tmp_path / "o", ALL["mistral"], random_arrays(LLAMA), values=mistral))
    assert "at most 48 positions from sliding_window, not 64 from max_position_embeddings" in found


def test_a_silent_generation_config_leaves_the_word_to_config(tmp_path):
    made = write_folder(tmp_path / "m", LLAMA, random_arrays(LLAMA), values={**to_hf(LLAMA), "eos_token_id": [4, 2]},
                        assets={"generation_config.json": "{}"})
    assert "eos ids [4, 2] from config.json" in facts(made)


@pytest.mark.parametrize("eos", ["5", [1, "2"], True, -1, {}, 2.0])
def test_eos_ids_are_ids(eos, tmp_path):
    made = write_folder(tmp_path / "m", LLAMA, random_arrays(LLAMA),
                        assets={"generation_config.json": json.dumps({"eos_token_id": eos})})
    with pytest.raises(FormatError, match=r"generation_config\.json: eos_token_id: expected an id"):
        open_hf(made)


def test_head_of_a_tied_model_that_is_the_embedding(tmp_path):
    given = random_arrays(QWEN2, BF16)
    made = write_folder(tmp_path / "m", QWEN2, {**given, HEAD: given[EMBED]}, 3)
    with open_hf(made) as source:
        assert HEAD not in source.shapes
        assert f"not used: {HEAD}, byte for byte {EMBED}" in source.facts


@pytest.mark.parametrize("change", ["one bit", "type", "shape"])
def test_head_of_a_tied_model_that_is_another(change, tmp_path, monkeypatch):
    monkeypatch.setattr("apr.formats.tensors.CHUNK", 100)  # so that they are compared in several pieces
    given = random_arrays(QWEN2, BF16)
    head = given[EMBED].copy()
    if change == "one bit":
        head.view(np.uint8)[-1, -1] ^= 1
    else:  # the same bytes mean something else
        head = head.view(np.float16) if change == "type" else head.reshape(head.shape[::-1])
    with pytest.raises(FormatError, match=f"'{HEAD}': expected the bytes of '{EMBED}'"):
        open_hf(write_folder(tmp_path / "m", QWEN2, {**given, HEAD: head}))


def test_buffers_of_old_llamas_are_passed_over(tmp_path):
    given = random_arrays(LLAMA)
    more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    with open_hf(write_folder(tmp_path / "m", LLAMA, {**given, **more})) as source:
        assert source.shapes.keys() == given.keys()
        assert "not used: 2 rotary_emb.inv_freq, which follow from rope_theta" in source.facts


WRONG = {  # B15, B6: change of the tensors, what the message says
    "missing bias": (lambda a: a.pop(BIAS), rf"missing \['{BIAS}'\]"),
    "extra": (lambda a: a.update(extra=np.zeros(1, "f4")), r"not used \['extra'\]"),
    "renamed": (lambda a: a.update(gamma=a.pop(NORM)), rf"missing \['{NORM}'\].*not used \['gamma'\]"),
    "buffer of another name": (lambda a: a.update({"rotary_emb.inv_freq": np.zeros(1, "f4")}), "not used"),
    "transposed": (lambda a: a.update({EMBED: a[EMBED].T.copy()}), rf"'{EMBED}': expected shape \[97, 32\]"),
    "float64": (lambda a: a.update({NORM: a[NORM].astype("f8")}), rf"'{NORM}': expected F32 or F16 or BF16, found F64"),
    "whole numbers": (lambda a: a.update({NORM: a[NORM].astype("i4")}), f"'{NORM}': expected .* found I32"),
}


@pytest.mark.parametrize(("change", "says"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("shards", [1, 3])
def test_wrong_tensors_are_refused(change, says, shards, tmp_path):
    given = random_arrays(QWEN2)
    change(given)
    with pytest.raises(FormatError, match=says):
        open_hf(write_folder(tmp_path / "m", QWEN2, given, shards))


def test_a_head_that_is_wanted_and_absent(tmp_path):
    given = random_arrays(LLAMA)
    del given[HEAD]
    with pytest.raises(FormatError, match=rf"missing \['{HEAD}'\]"):
        open_hf(write_folder(tmp_path / "m", LLAMA, given))


def test_values_that_are_not_finite_are_refused_when_read(tmp_path):
    given = random_arrays(LLAMA, BF16)
    given[NORM][3] = np.inf
    source = open_hf(write_folder(tmp_path / "m", LLAMA, given))
    with source, pytest.raises(FormatError, match=f"'{NORM}': expected finite values, found inf at element 3"):
        source.read(NORM)


INDEXES = {  # B10: change of the weight_map, what the message says
    "parent": (lambda t: t.update({NORM: "../x.safetensors"}), "points elsewhere"),
    "absolute": (lambda t: t.update({NORM: "/etc/x.safetensors"}), "points elsewhere"),
    "up and down": (lambda t: t.update({NORM: "a/../../x.safetensors"}), "points elsewhere"),
    "sub-folder": (lambda t: t.update({NORM: "a/x.safetensors"}), "points elsewhere"),
    "hidden": (lambda t: t.update({NORM: ".x.safetensors"}), "points elsewhere"),
    "another kind": (lambda t: t.update({NORM: "config.json"}), "points elsewhere"),
    "zero byte": (lambda t: t.update({NORM: "x\0.safetensors"}), "points elsewhere"),
    "line feed": (lambda t: t.update({NORM: SHARD + "\n"}), "points elsewhere"),
    "empty": (lambda t: t.update({NORM: ""}), "points elsewhere"),
    "long": (lambda t: t.update({NORM: "x" * 300 + ".safetensors"}), "points elsewhere"),
    "too many": (lambda t: t.update({f"t{i}": f"{i}.safetensors" for i in range(MAX_SHARDS)}), "at most 512 files"),
    "number": (lambda t: t.update({NORM: 5}), "weight_map"),
    "no table": (lambda t: t.clear(), "weight_map"),
    "listed, not there": (lambda t: t.update(extra=SHARD), rf"{SHARD}: tensor 'extra': .*listed in the index, not"),
    "there, not listed": (lambda t: t.pop(NORM), f"tensor '{NORM}': .*in the file, not listed"),
}


@pytest.mark.parametrize(("change", "says"), INDEXES.values(), ids=INDEXES)
def test_an_index_that_lies_is_refused(change, says, tmp_path, monkeypatch):
    made = write_folder(tmp_path / "m", QWEN2, random_arrays(QWEN2), 3)
    table = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    change(table)
    write_index(made, table)
    (tmp_path / "x.safetensors").write_bytes((made / SHARD).read_bytes())
    if "not" not in says:  # nothing may be opened on the word of such an index
        monkeypatch.setattr("apr.formats.hf_folder.open_safetensors", None)
    with pytest.raises(FormatError, match=says):
        open_hf(made)


@pytest.mark.parametrize("value", [None, [], "x", {}, {"weight_map": None}, {"weight_map": []}])
def test_an_index_without_a_table_is_refused(value, tmp_path):
    made = write_folder(tmp_path / "m", QWEN2, random_arrays(QWEN2), 3)
    (made / "model.safetensors.index.json").write_text(json.dumps(value))
    with pytest.raises(FormatError, match="weight_map"):
        open_hf(made)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    made = write_folder(tmp_path / "m", QWEN2, random_arrays(QWEN2), 3)
    (made / SHARD).write_bytes((made / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(FormatError, match=rf"{SHARD}: tensor .*: expected each tensor in one file, found it is in"):
        open_hf(made)


def test_a_file_of_the_index_that_is_not_there(tmp_path):
    made = write_folder(tmp_path / "m", QWEN2, random_arrays(QWEN2), 3)
    (made / SHARD).unlink()
    with pytest.raises(NotFoundError, match=SHARD):
        open_hf(made)


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_link_out_of_the_folder_is_refused(name, tmp_path):
    made = write_folder(tmp_path / "m", QWEN2, random_arrays(QWEN2), 3, assets=TEXTS)
    (made / name).rename(tmp_path / "elsewhere")
    (made / name).symlink_to("../elsewhere")
    with pytest.raises(FormatError, match=f"{name}: .*found a link that leads out of it"):
        open_hf(made)
    (made / name).unlink()
    (made / name).symlink_to(name)  # a loop
    with pytest.raises(AprError, match=name):
        open_hf(made)


@pytest.mark.parametrize("shared", [False, True])
def test_the_hub_cache_is_a_folder_of_links(shared, tmp_path):
    """snapshots/<revision>/<name> leads to blobs/<hash>, that perhaps to a store that all models share."""
    given = random_arrays(QWEN2)
    made = write_folder(tmp_path / "models--a--b" / "snapshots" / "0123", QWEN2, given, 3, assets=TEXTS)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for n, file in enumerate(sorted(made.iterdir())):
        file.rename(blobs / str(n))
        if shared:
            (tmp_path / "blobs" / f"{n:02x}").mkdir(parents=True)
            (blobs / str(n)).rename(tmp_path / "blobs" / f"{n:02x}" / "hash")
            (blobs / str(n)).symlink_to(f"../../blobs/{n:02x}/hash")
        file.symlink_to(os.path.relpath(blobs / str(n), made))
    (tmp_path / "link").symlink_to(made)
    with open_hf(tmp_path / "link") as source:
        assert read_all(source) == {name: bits(array) for name, array in given.items()}
        assert source.assets == TEXTS


def test_two_models_in_one_folder_are_refused(tmp_path):
    made = write_folder(tmp_path / "m", QWEN2, random_arrays(QWEN2), 3)
    (made / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match="both, for different files"):
        open_hf(made)


def test_an_index_of_one_file(tmp_path):
    """Some tools write an index for a single file too."""
    given = random_arrays(LLAMA)
    made = write_folder(tmp_path / "m", LLAMA, given)
    write_index(made, dict.fromkeys(given, "model.safetensors"))
    with open_hf(made) as source:
        assert source.shapes.keys() == given.keys()


def test_what_is_no_model_folder(tmp_path):
    with pytest.raises(NotFoundError, match=r"config\.json"):
        open_hf(tmp_path)
    made = write_folder(tmp_path / "m", LLAMA, random_arrays(LLAMA))
    (made / "model.safetensors").rename(made / "pytorch_model.bin")
    with pytest.raises(NotFoundError, match=r"only pytorch_model\.bin; pickled weights are not read"):
        open_hf(made)
    with pytest.raises(ConfigError, match="ARCH-007"):
        open_hf(write_folder(tmp_path / "e", LLAMA, random_arrays(LLAMA), values={"model_type": "bert"}))
    made = write_folder(tmp_path / "u", LLAMA, random_arrays(LLAMA))
    (made / "merges.txt").write_bytes(b"a\xff")
    with pytest.raises(FormatError, match=r"merges\.txt: expected UTF-8, found byte 0xff at offset 1"):
        open_hf(made)


def test_a_file_that_changes_while_it_is_read(tmp_path):
    made = write_folder(tmp_path / "m", LLAMA, random_arrays(LLAMA))
    with open_hf(made) as source:
        source.read(NORM)
        data = (made / "model.safetensors").read_bytes()
        with open(made / "model.safetensors", "r+b") as f:
            f.seek(len(data) - 1)
            f.write(bytes([data[-1] ^ 1]))
        os.utime(made / "model.safetensors", ns=(1, 1))
        with pytest.raises(FormatError, match=f"'{NORM}': .*changed while it was read"):
            source.read(NORM)
