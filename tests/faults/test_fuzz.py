"""Good files with bytes flipped, inserted, removed or overwritten: an equal read or an AprError, nothing else."""

import functools
import json
import tempfile
from pathlib import Path

import hostile_folders as folders
import numpy as np
import pytest
import safetensors
from examples import EXAMPLES
from hostile import READ, good, run_config
from hostile_data import IDS
from hostile_tokenizers import V
from hypothesis import given
from hypothesis import strategies as st

from apr.config import decode, encode
from apr.data.shards import open_shards, read_manifest
from apr.data.tokenizer import PROBE, Tokenizer
from apr.errors import AprError
from apr.formats.apr_file import write_apr
from apr.formats.safetensors import write_safetensors
from apr.hf_config import to_hf
from apr.train.run_config import RunConfig

TOKENS = [b"null", b"true", b"-1", b"0", b"1e999", b"9" * 25, b"[", b"]", b"{}", b'"', b'\\"', b",", b":", b"\n",
          b"\\ud800", b"\xff", b"\0",
          b"NaN", b'"a"', b"[[[", b"- ", b"? ", b"!!int ", b"&a ", b"*a"]
EDIT = st.tuples(st.sampled_from(["flip", "insert", "remove", "splice", "over"]), st.integers(0, 2**20),
                 st.integers(0, 7), st.integers(1, 255),
                 st.sampled_from(TOKENS))
EDITS = st.lists(EDIT, min_size=1, max_size=4)


def edited(data, edits):
    """The bytes after some edits."""
    for kind, place, bit, byte, token in edits:
        at = place % max(len(data), 1)
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]
        elif kind == "insert":
            data = data[:at] + bytes([byte]) + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + byte % 9 + 1:]
        else:  # a token put between, or over what is there
            data = data[:at] + token + data[at + (len(token) if kind == "over" else 0):]
    return data


def big_apr(folder):
    """An .apr file that is mostly data, so that most edits fall there."""
    write_apr(folder / "x.apr", {"a": np.arange(600, dtype=np.float32), "b": np.arange(7, dtype=np.int8)}, {"k": [1]})
    return folder / "x.apr"


@functools.cache
def original(kind, name, folder):
    """A good file's path in `folder`, the path that its reader takes, and its bytes."""
    home = folder / f"{kind}-{name}"
    home.mkdir()
    made = big_apr(home) if kind == "apr" else good()[kind](home)
    path = made / name if made.is_dir() else made
    return path, made, path.read_bytes()


def outcome(kind, name, folder, edits, read=None):
    """What a reader makes of the edited file (None: refused), its bytes, and whether they differ from the good ones."""
    path, made, whole = original(kind, name, folder)
    data = edited(whole, edits)
    path.write_bytes(data)
    try:
        return (read or READ[kind])(made), data, data != whole
    except AprError as e:
        assert "\n" not in str(e)
        return None, data, data != whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@EXAMPLES
@given(EDITS)
def test_fuzz_apr(folder, edits):
    """A checksum covers every byte: a file that differs is refused."""
    found, _, differs = outcome("apr", "", folder, edits)
    assert differs == (found is None)


@EXAMPLES
@given(EDITS)
def test_fuzz_safetensors(folder, edits):
    """There is no checksum. What is read is what the `safetensors` package reads, which is laxer, and is writable."""
    found, data, differs = outcome("safetensors", "", folder, edits)
    assert differs or found is not None
    if found is not None:
        metadata, tensors = found
        assert {k: bytes(t["data"]) for k, t in safetensors.deserialize(data)} == {k: a.tobytes() for k,
                a in tensors.items()}
        write_safetensors(folder / "again", tensors, metadata)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
@EXAMPLES
@given(EDITS)
def test_fuzz_folder(folder, name, edits):
    """Whatever its texts say, a Hugging Face folder gives its own tensors or none."""
    found, _, differs = outcome("hf", name, folder, edits)
    assert differs or found is not None
    if found is not None:
        whole = READ["hf"](folders.folder(shards=3)(Path(tempfile.mkdtemp(dir=folder))))
        assert {k: a.tobytes() for k, a in found.items()} == {k: a.tobytes() for k, a in whole.items()}


@EXAMPLES
@given(EDITS)
def test_fuzz_manifest(folder, edits):
    """What is read are the very tokens; the manifest holds their hash."""
    tokens = outcome("shards", "manifest.json", folder, edits, lambda path: (
        open_shards(path, None, V).read(0, len(IDS)), read_manifest(path / "manifest.json")))[0]
    if tokens is not None:
        assert np.array_equal(tokens[0], IDS)
        assert json.dumps(tokens[1], allow_nan=False)


@EXAMPLES
@given(EDITS)
def test_fuzz_shard(folder, edits):
    """The manifest's hash covers every token: a shard that differs is refused."""
    tokens, _, differs = outcome("shards", "shard-0000.bin", folder, edits, lambda path: open_shards(path, None, V))
    assert differs == (tokens is None)


@EXAMPLES
@given(EDITS)
def test_fuzz_tokenizer(folder, edits):
    """What is read carries any text there and back, on ids that a manifest can hold."""
    tokenizer = outcome("tokenizer", "", folder, edits, Tokenizer.load)[0]
    if tokenizer is not None:
        ids = tokenizer.encode(PROBE + "The rest: Qq Zz 0189 \x7f é")
        assert tokenizer.decode(ids).strip() == (PROBE + "The rest: Qq Zz 0189 \x7f é").strip()
        assert 0 <= min(ids) <= max(ids) < tokenizer.vocab_size <= 2**20


@EXAMPLES
@given(EDITS)
def test_fuzz_config(folder, edits):
    """What is read is a configuration that can be written and read again."""
    config = outcome("config", "", folder, edits)[0]
    if config is not None:
        (folder / "again.json").write_text(json.dumps(to_hf(config), allow_nan=False))
        assert READ["config"](folder / "again.json") == config


@EXAMPLES
@given(EDITS)
def test_fuzz_yaml(folder, edits):
    """What is read is a run that can be saved and read again."""
    config = outcome("yaml", "", folder, edits, run_config)[0]
    if config is not None:
        assert decode(RunConfig, json.loads(json.dumps(encode(config), allow_nan=False)), "again") == config
