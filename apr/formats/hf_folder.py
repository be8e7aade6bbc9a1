"""A Hugging Face folder as a ModelSource: config.json, weights in one safetensors file or several, text files.

    model.safetensors.index.json    {"metadata": {…}, "weight_map": {tensor: file of this folder}}

An index is not to be trusted: it can only name files of its own folder, and each of those must hold exactly the tensors
that the index says. Links may lead to a file of the folder, or of the blobs/ of a hub cache, and nowhere else.
"""

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import TransformerConfig
from apr.errors import FormatError, NotFoundError
from apr.files import os_errors, read_bytes
from apr.formats.facts import eos_facts, tensor_facts
from apr.formats.safetensors import open_safetensors
from apr.formats.source import ASSETS, FLOATS, ModelSource
from apr.formats.tensors import TensorEntry, TensorFile
from apr.hf_config import config_facts, from_hf
from apr.params import EMBED, HEAD
from apr.strict import read_json

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_ASSET = 64 * 2**20
MAX_SHARDS = 512  # each is an open file
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
# Buffers that old transformers saved with Llama models; they follow from rope_theta.
NOT_PARAMETERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Weights:
    """The open files of a folder, and for every tensor the one that holds it."""

    by_name: dict[str, TensorFile]
    close: Callable[[], None]

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies, and its type."""
        return self.by_name[name].entries[name]

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is stored."""
        return self.by_name[name].read(name)


def open_hf(path: Path) -> ModelSource:
    """Open a Hugging Face folder of one of apr's families.

    Raises NotFoundError, StorageError, ConfigError for a configuration that apr does not compute, FormatError for
    anything else: a tensor missing, left over, of another shape or no float, an index that does not fit its files.
    """
    values = read_json(_inside(path, CONFIG))
    config = from_hf(values, str(path / CONFIG))
    assets = _read_assets(path)
    facts = [*config_facts(values, config), *eos_facts(assets, values, str(path))]
    weights = _open_weights(path)
    try:
        facts += _leave_out(weights, config, path)
        entries = {name: weights.entry(name) for name in weights.by_name}
        for entry in entries.values():
            if entry.dtype.name not in FLOATS:
                raise FormatError(f"{weights.by_name[entry.name].path}: tensor '{entry.name}'", " or ".join(FLOATS),
                                  entry.dtype.name, "convert the tensor")
        dtypes = {name: entry.dtype.name for name, entry in entries.items()}
        facts += tensor_facts(config, dtypes)
        facts.append("text files: " + (", ".join(assets) or "none"))
    except BaseException:
        weights.close()
        raise
    return ModelSource(path, "hf", config, values, assets, {name: e.shape for name, e in entries.items()}, dtypes,
                       weights.read, weights.close, tuple(facts))


def _inside(folder: Path, name: str) -> Path:
    """folder/name, unless it is a link that leads elsewhere: a model must not carry away another file of this machine.

    A hub cache keeps models--x/snapshots/<revision>/<name> as a link to models--x/blobs/<hash>, and that may be one to
    blobs/<xx>/<hash> beside models--x: as good as the folder itself.
    """
    with os_errors(str(folder / name)):
        home = folder.resolve()
        try:
            real = (home / name).resolve()
        except RuntimeError as e:  # a loop of links, before Python 3.13
            raise FormatError(str(folder / name), "a file", "a loop of links", "get the model again") from e
    places = [home]
    if home.parent.name == "snapshots":
        repository = home.parent.parent
        places += [repository / "blobs", repository.parent / "blobs" / real.parent.name]
    if real.parent not in places:
        raise FormatError(str(folder / name), "a file of this folder", "a link that leads out of it",
                          "copy the file into the folder")
    return folder / name


def _read_assets(folder: Path) -> dict[str, str]:
    """The text files that are there, verbatim."""
    assets = {}
    for name in ASSETS:
        if os.path.lexists(folder / name):
            data = read_bytes(_inside(folder, name), MAX_ASSET)
            try:
                assets[name] = data.decode("utf-8")
            except UnicodeDecodeError as e:
                raise FormatError(str(folder / name), "UTF-8", f"byte 0x{data[e.start]:02x} at offset {e.start}",
                                  "get the file again") from None
    return assets


def _open_weights(folder: Path) -> Weights:
    shards = _weight_map(folder)
    with ExitStack() as stack:
        by_name: dict[str, TensorFile] = {}
        for shard, expected in shards.items():
            opened = stack.enter_context(open_safetensors(folder / shard))
            for name in opened.entries:
                if name in by_name:
                    raise FormatError(f"{opened.path}: tensor '{name}'", "each tensor in one file",
                                      f"it is in {by_name[name].path.name} too", "get the model again")
                by_name[name] = opened
            if expected is not None and (odd := sorted(expected ^ opened.entries.keys())):
                listed = "listed in the index, not in the file" if odd[0] in expected else "in the file, not listed"
                raise FormatError(f"{opened.path}: tensor '{odd[0]}'", f"the tensors that {INDEX} lists for this file",
                                  f"{len(odd)} that differ; this one is {listed}", "get the model again")
        return Weights(by_name, stack.pop_all().close)


def _weight_map(folder: Path) -> dict[str, set[str] | None]:
    """The files to open, and which tensors each must hold (None: whichever it has). Nothing is opened but the index."""
    where = str(folder / INDEX)
    if not os.path.lexists(folder / INDEX):
        if not os.path.lexists(folder / SINGLE):
            pickles = sorted(p.name for p in folder.glob("*.bin"))
            raise NotFoundError(str(folder), f"{SINGLE} or {INDEX}", f"only {pickles[0]}" if pickles else "neither",
                                "pickled weights are not read; save the model as safetensors" if pickles
                                else "get the model again")
        return {_inside(folder, SINGLE).name: None}
    index = read_json(_inside(folder, INDEX))
    table: Any = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise FormatError(where, "'weight_map', a table of tensor to file", "none", "get the file again")
    shards: dict[str, set[str] | None] = {}
    for name, shard in table.items():
        if not SHARD_NAME.fullmatch(shard):
            raise FormatError(f"{where}: tensor '{name[:80]}'", "the name of a .safetensors file of this folder",
                              repr(shard)[:80], "do not use this model: its index points elsewhere")
        known = shards.setdefault(shard, set())
        assert known is not None
        known.add(name)
        if len(shards) > MAX_SHARDS:
            raise FormatError(where, f"at most {MAX_SHARDS} files", "more", "save the model in fewer")
    for shard in shards:
        _inside(folder, shard)
    if os.path.lexists(folder / SINGLE) and SINGLE not in shards:
        raise FormatError(str(folder), f"one of {SINGLE} and {INDEX}", "both, for different files",
                          "remove the one that is out of date")
    return dict(sorted(shards.items()))


def _leave_out(weights: Weights, config: TransformerConfig, folder: Path) -> list[str]:
    """Drop what files may hold that is no parameter; returns what is to be said about it."""
    facts = []
    buffers = [name for name in weights.by_name if NOT_PARAMETERS.fullmatch(name)]
    for name in buffers:
        del weights.by_name[name]
    if buffers:
        facts.append(f"not used: {len(buffers)} rotary_emb.inv_freq, which follow from rope_theta")
    if config.tie_word_embeddings and HEAD in weights.by_name and EMBED in weights.by_name:
        if not _same_bytes(weights, EMBED, HEAD):
            raise FormatError(f"{folder}: tensor '{HEAD}'", f"the bytes of '{EMBED}', to which config.json ties it",
                              "others", "set tie_word_embeddings to false if the model has a head of its own")
        del weights.by_name[HEAD]
        facts.append(f"not used: {HEAD}, byte for byte {EMBED}")
    return facts


def _same_bytes(weights: Weights, one: str, other: str) -> bool:
    a, b = weights.entry(one), weights.entry(other)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    parts = zip(weights.by_name[one].pieces(one), weights.by_name[other].pieces(other), strict=True)
    return all(x == y for x, y in parts)
