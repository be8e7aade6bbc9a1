"""Checkpoints that a crash cannot spoil: a folder made under a temporary name, fsynced, then renamed.

    RUN_DIR/ckpt/step-00000100/   config.json model.safetensors tokenizer.json  (together a Hugging Face model folder,
                                                                                 with the maker's other text files)
                                  optimizer.safetensors                         (m.<name>, v.<name>)
                                  state.json                                    (step, loop, data cursor, log position)
                                  manifest.json                                 (size and SHA-256 of each, written last)

A folder without a manifest, or whose files differ from it, is not a checkpoint: it is passed over, and said so. Which
one is newest is read off the names, never off clocks.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apr.config import TransformerConfig
from apr.errors import AprError, FormatError, IntegrityError, NotFoundError
from apr.files import fsync_dir, make_folder, os_errors, sha256_file, write_durable
from apr.formats.model_file import TOKENIZER, check_coverage
from apr.formats.safetensors import encode_header, open_safetensors
from apr.formats.source import ASSETS
from apr.formats.tensors import raw_bytes
from apr.hf_config import from_hf, to_hf, with_dtype
from apr.strict import read_json

STEP = re.compile(r"step-(\d{8})$")
REPLACED = re.compile(r"(step-\d{8})\.tmp-replaced-[0-9a-f]+$")
MANIFEST, FORMAT = "manifest.json", "apr-checkpoint"
KEEP = 2  # the newest, and one to fall back on, unless a run keeps more
SLACK = 1 << 20  # bytes of a checkpoint beside its arrays, tokenizer and all


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model, AdamW's m and v (`m.<name>`, `v.<name>`) and the state of the run."""

    path: Path
    config: TransformerConfig
    params: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    state: dict[str, Any]


def write_checkpoint(ckpt_dir: Path, step: int, config: TransformerConfig, params: Mapping[str, np.ndarray],
                     optimizer: Mapping[str, np.ndarray], state: Mapping[str, Any], tokenizer_json: str | None,
                     hf_config: Mapping[str, Any] | None = None, assets: Mapping[str, str] | None = None, *,
                     keep: int = KEEP, milestone_every: int = 0) -> Path:
    """Write ckpt_dir/step-N whole and durable, then drop all but the newest `keep`; returns its path.

    Steps that `milestone_every` divides are kept for good; 0: none. `hf_config` and `assets` are what the model's maker
    gave, to be kept; a tokenizer among them is the one written. Raises StorageError, and then the folder is as it was
    before.
    """
    final = ckpt_dir / name_of(step)
    temporary = ckpt_dir / f"{final.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}"
    values = to_hf(config) if hf_config is None else with_dtype(dict(hf_config), "F32")
    texts = {"config.json": json.dumps(values, indent=1),
             **({} if tokenizer_json is None else {TOKENIZER: tokenizer_json}), **(assets or {}),
             "state.json": json.dumps(state, indent=1, allow_nan=False)}
    try:
        with os_errors(str(final)):
            make_folder(ckpt_dir)
            temporary.mkdir()
            digests = {name: write_durable(temporary / name, text.encode()) for name, text in texts.items()}
            for name, arrays in (("model.safetensors", params), ("optimizer.safetensors", optimizer)):
                digests[name] = write_durable(temporary / name, encode_header(arrays, {"format": "pt"}),
                                              *map(raw_bytes, arrays.values()))
            files = {name: {"size": (temporary / name).stat().st_size, "sha256": digest}
                     for name, digest in sorted(digests.items())}
            manifest = {"format": FORMAT, "version": 1, "step": step, "files": files}
            write_durable(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
            fsync_dir(temporary)
            if final.exists():  # what is left of a damaged checkpoint of the same step
                os.rename(final, ckpt_dir / f"{final.name}.tmp-replaced-{os.urandom(4).hex()}")
            os.rename(temporary, final)
            fsync_dir(ckpt_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sweep(ckpt_dir)
    whole = [path for path in steps(ckpt_dir) if (path / MANIFEST).is_file()]
    for old in steps(ckpt_dir):
        milestone = milestone_every and step_of(old) % milestone_every == 0 and old in whole
        if old < whole[:keep][-1] and not milestone:  # also what a kill left half removed
            _remove(old)
    return final


def bytes_needed(parameters: int) -> int:
    """What a checkpoint of so many parameters takes on the disk: weights, m and v in float32."""
    return 12 * parameters + SLACK


def _remove(folder: Path) -> None:
    """Remove a checkpoint; its manifest goes first, so that a kill half-way leaves no half checkpoint behind."""
    with suppress(OSError):  # what cannot be removed does no harm
        if folder.is_symlink():  # what it points to is another's
            folder.unlink(missing_ok=True)
        else:
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)


def sweep(ckpt_dir: Path) -> None:
    """Remove what killed writers left. Only the run that holds the run directory's lock may call this."""
    for leftover in (*ckpt_dir.glob("step-*.tmp-*"), *ckpt_dir.glob(".*.tmp-*")):
        found = REPLACED.match(leftover.name)
        with suppress(OSError):
            if found and not (ckpt_dir / found[1]).exists():
                os.rename(leftover, ckpt_dir / found[1])  # its writer was killed between the two renamings
            elif leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def pass_over(ckpt_dir: Path, step: int) -> None:
    """Take away the names of checkpoints after `step`, which could not be read: the run goes on from before them.

    Otherwise one that can be read again later would be taken for the newest of a run that has gone another way.
    """
    with os_errors(str(ckpt_dir)):
        for path in steps(ckpt_dir):
            if step_of(path) > step:
                os.rename(path, ckpt_dir / f"{path.name}.tmp-passed-over-{os.urandom(4).hex()}")


def name_of(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def steps(ckpt_dir: Path) -> list[Path]:
    """The folders named as checkpoints, newest first."""
    return sorted((p for p in ckpt_dir.glob("step-*") if STEP.match(p.name)), reverse=True)


def _candidates(ckpt_dir: Path) -> list[Path]:
    """The steps, and those of which a killed writer had taken the name away; newest first."""
    aside = {p: found[1] for p in ckpt_dir.glob("step-*") if (found := REPLACED.match(p.name))}
    named = {p: p.name for p in steps(ckpt_dir)} | {p: n for p, n in aside.items() if not (ckpt_dir / n).exists()}
    return sorted(named, key=lambda p: named[p], reverse=True)


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, every byte of it verified.

    Raises NotFoundError, FormatError, IntegrityError naming the file, StorageError.
    """
    if not (path / MANIFEST).is_file():
        raise NotFoundError(str(path / MANIFEST), "a checkpoint's manifest", "nothing there",
                            "this folder is no complete checkpoint")
    manifest, where = read_json(path / MANIFEST), str(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT \
            or type(manifest.get("version")) is not int or manifest["version"] != 1:
        raise FormatError(where, f"format '{FORMAT}' version 1", "another",
                          "give a checkpoint that this version of apr wrote")
    files = manifest.get("files")
    needed = {"config.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    if not isinstance(files, dict) or files.keys() - {*ASSETS} != needed:
        raise FormatError(where, "files " + ", ".join(sorted(needed)), "others", "use another checkpoint")
    before = {name: _file_state(path / name) for name in files}
    for name, entry in files.items():
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or not (path / name).is_file():
            raise IntegrityError(str(path / name), "the file that the manifest lists", "nothing",
                                 "use another checkpoint")
        size = (path / name).stat().st_size
        if size != entry.get("size"):
            raise IntegrityError(str(path / name), f"{entry.get('size')} bytes", f"{size}", "use another checkpoint")
        if sha256_file(path / name) != entry.get("sha256"):
            raise IntegrityError(str(path / name), f"SHA-256 {str(entry.get('sha256'))[:16]}…", "another",
                                 "use another checkpoint")
    config = from_hf(read_json(path / "config.json"), str(path / "config.json"))
    params = check_coverage(config, _read_arrays(path / "model.safetensors"), str(path / "model.safetensors"))
    optimizer = _read_arrays(path / "optimizer.safetensors")
    expected = {f"{kind}.{name}": (array.shape, "float32") for kind in "mv" for name, array in params.items()}
    if {name: (array.shape, str(array.dtype)) for name, array in optimizer.items()} != expected:
        raise FormatError(str(path / "optimizer.safetensors"), "m and v of every parameter", "others",
                          "use another checkpoint")
    state = read_json(path / "state.json")
    if not isinstance(state, dict) or type(manifest.get("step")) is not int or state.get("step") != manifest["step"]:
        raise FormatError(str(path / "state.json"), "the manifest's step", "another", "use another checkpoint")
    for name in files:
        if _file_state(path / name) != before[name]:
            raise IntegrityError(str(path / name), "a file that stays as it is", "changed while it was read",
                                 "use another checkpoint")
    return Checkpoint(path, config, params, optimizer, state)


def _file_state(path: Path) -> tuple[int, int, int] | None:
    """What differs when a file was written to or replaced; None where there is none."""
    with suppress(OSError):
        info = path.stat()
        return info.st_ino, info.st_size, info.st_mtime_ns
    return None


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with open_safetensors(path) as opened:
        return opened.read_all()


def latest(ckpt_dir: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint that is whole; `warn` is told of each that is not.

    Raises NotFoundError when there is none.
    """
    for path in _candidates(ckpt_dir):
        try:
            return read_checkpoint(path)
        except AprError as e:
            warn(f"passed over {path.name}: {e}")
    raise NotFoundError(str(ckpt_dir), "a complete checkpoint", "none", "start a new run")
