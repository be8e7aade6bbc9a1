"""For the fuzzer: for each format how cases are made, how apr reads them, and what they mean by the oracles."""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import fuzz_files
import fuzz_folder_rules as folder_rules
import fuzz_folders as folders
import fuzz_models
import fuzz_rules as rules
import fuzz_values as values
import msgspec
import oracles
import safetensors

from apr.cli.main import build
from apr.cli.pretrain import build_config
from apr.data.shards import open_shards
from apr.data.tokenizer import Tokenizer
from apr.errors import FormatError
from apr.formats.apr_file import open_apr
from apr.formats.gguf_file import STORED, open_gguf
from apr.formats.hf_folder import open_hf
from apr.formats.safetensors import open_safetensors
from apr.hf_config import from_hf
from apr.ptx_store import decode
from apr.strict import read_json
from apr.train.checkpoint import read_checkpoint
from apr.train.real_run import saved_state
from apr.train.run import read_run

Files = bytes | dict[str, bytes | str]  # a file; or a folder: files by name, and targets of links


class Form(NamedTuple):
    """A format. `read(path)` gives what `meaning(files)` must equal; no meaning: `read` holds all the conditions."""

    make: Callable[[Any], Files]
    read: Callable[[Path], Any]
    meaning: Callable[[Any], Any] | None
    name: str


def read_apr(path):
    with open_apr(path) as opened:
        return {name: array.tobytes() for name, array in opened.read_all().items()}


def read_safetensors(path):
    with open_safetensors(path) as opened:
        return {name: array.tobytes() for name, array in opened.read_all().items()}


def safetensors_tensors(data):
    """By our oracle and by the safetensors package, which is laxer."""
    valid = oracles.safetensors_tensors(data)
    oracles.require({name: bytes(t["data"]) for name, t in safetensors.deserialize(data)} == valid, "the package")
    return valid


def read_gguf(path):
    """The bytes of every tensor; of blocks what lies in the file, once their values have been read."""
    out = {}
    with open_gguf(path) as opened:
        for name, entry in opened.entries.items():
            array = opened.read(name)
            assert array.shape == entry.shape
            out[name] = path.read_bytes()[entry.start:entry.start + entry.nbytes]
            if entry.type in STORED:
                assert array.tobytes() == out[name]
    return out


def read_config(path):
    return asdict(from_hf(read_json(path), str(path)))


def read_shards(path):
    source = open_shards(path, None, folders.V)
    return source.read(0, source.tokens).tolist(), source.starts.tolist()


def read_sharded(path):
    with open_hf(path) as source:
        return {name: source.read(name).tobytes() for name in source.shapes}


def read_whole_checkpoint(path):
    found = read_checkpoint(path)
    params, moments = ({name: a.tobytes() for name, a in arrays.items()} for arrays in (found.params, found.optimizer))
    return asdict(found.config), params, moments, asdict(saved_state(found))


def read_tokenizer(path):
    """What is read carries any text there and back, on ids of the vocabulary."""
    tokenizer = Tokenizer.load(path)
    eos, vocab = tokenizer.require_eos(), tokenizer.inner.get_vocab()
    ids = [tokenizer.encode(text) for text in folder_rules.PROBES]
    assert 0 <= eos < tokenizer.vocab_size == max(vocab.values()) + 1 <= 2**20
    for text, found in zip(folder_rules.PROBES, ids, strict=True):
        assert tokenizer.decode(found).strip() == text.strip(), f"{text!r} came back as {tokenizer.decode(found)!r}"
        assert set(found) <= set(vocab.values())
    return vocab, eos, ids


def read_kernel(path):
    entry = decode(path.read_bytes())
    if isinstance(entry, str):
        raise FormatError("kernel cache entry", f"one that is not {entry}", "one that is", "it is compiled again")
    return entry.key, entry.meta, entry.image


FLAGS = vars(build("pretrain").parse_args(["--run-dir", "run"]))


def read_yaml_run(path):
    return asdict(build_config(argparse.Namespace(**{**FLAGS, "config": path})))


def shown(value):
    """What tells 1, 1.0 and True, and the order of keys, apart."""
    return repr(value)


def json_meaning(data):
    """By Python's parser under our rules; msgspec's, which owes nothing to it, must say the same where it reads it."""
    value = rules.json_value(data)
    try:
        other = msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        return shown(value)
    oracles.require(shown(other) == shown(value), "msgspec reads something else")
    return shown(value)


def file(form, read, meaning):
    return Form(lambda rng: fuzz_files.mutated(rng, form), read, meaning, f"x.{form}")


FORMS = {
    "apr": file("apr", read_apr, oracles.apr_tensors),
    "safetensors": file("safetensors", read_safetensors, safetensors_tensors),
    "gguf": file("gguf", read_gguf, oracles.gguf_tensors),
    "gguf-model": Form(fuzz_models.model_bytes, fuzz_models.read_model, None, "x.gguf"),
    "json": Form(values.json_bytes, lambda path: shown(read_json(path)), json_meaning, "x.json"),
    "config": Form(values.config_bytes, read_config, rules.config, "config.json"),
    "yaml": Form(values.yaml_bytes, read_yaml_run, rules.yaml_run, "run.yaml"),
    "run": Form(values.run_bytes, lambda path: asdict(read_run(path.parent)), rules.run_json, "run.json"),
    "shards": Form(folders.shards, read_shards, folder_rules.shards, "shards"),
    "index": Form(folders.sharded, read_sharded, folder_rules.sharded, "model"),
    "checkpoint": Form(folders.checkpoint, read_whole_checkpoint, folder_rules.checkpoint, "step-00000004"),
    "tokenizer": Form(folders.tokenizer_bytes, read_tokenizer, folder_rules.tokenizer, "tokenizer.json"),
    "kernel": Form(folders.kernel_bytes, read_kernel, folder_rules.kernel, "x.kernel"),
}


def put(form: str, files: Files, home: Path) -> Path:
    """Write a case below `home`, in place of the last one."""
    path = home / FORMS[form].name
    if isinstance(files, bytes):
        path.write_bytes(files)
        return path
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    (path / folders.OUTSIDE).unlink(missing_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        else:
            (path / name).symlink_to(content)
    return path
