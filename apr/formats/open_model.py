"""Any model that apr can read, by what it is: the first bytes of a file and the contents of a folder decide."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from apr.errors import FormatError, IntegrityError, NotFoundError
from apr.files import open_regular, os_errors
from apr.formats.gguf_model import open_gguf_model
from apr.formats.hf_folder import CONFIG, open_hf
from apr.formats.model_file import open_apr_model
from apr.formats.source import ModelSource
from apr.strict import read_json

RUN, MANIFEST = "run.json", "manifest.json"
CHECKPOINT = re.compile(r"step-\d{8}")
TRAINING = ("state.json", "optimizer.safetensors")  # only a checkpoint has these
KNOWN = "an .apr or GGUF file, a Hugging Face folder, a checkpoint or a run"
MAGIC = {b"PK\x03\x04": "a zip or PyTorch file", b"\x80\x02": "a pickle", b"\x80\x04": "a pickle",
         b"version https://git-lfs": "a pointer to a file that git-lfs has not fetched", b"<": "HTML or XML"}


Reader = Callable[[Path], ModelSource]


def open_model(path: Path) -> ModelSource:
    """Open a model: .apr file, GGUF file, Hugging Face folder, checkpoint folder or run folder (its newest checkpoint).

    Raises NotFoundError, StorageError, FormatError, IntegrityError, and ConfigError for a configuration that apr does
    not compute (ARCH-007 for encoders).
    """
    reader, place = find_reader(path)
    return reader(place)


def find_reader(path: Path) -> tuple[Reader, Path]:
    """What opens the model, and the file or folder that holds it; nothing is read but what tells one from another.

    Raises NotFoundError, StorageError, FormatError for what is no model, IntegrityError for a checkpoint's sizes.
    """
    with os_errors(str(path)):
        folder = path.is_dir()
    return _folder(path) if folder else _file(path)


def _file(path: Path) -> tuple[Reader, Path]:
    file, _ = open_regular(path)
    with file, os_errors(str(path)):
        head = file.read(64)
    if head[:3] == b"APR":
        return open_apr_model, path
    if head[:4] == b"GGUF":
        return open_gguf_model, path
    if head[8:9] == b"{":
        raise FormatError(str(path), KNOWN, "a safetensors file, which says nothing of its model",
                          "give the folder that also holds its config.json")
    found = next((what for magic, what in MAGIC.items() if head.startswith(magic)), f"a file that starts {head[:4]!r}")
    raise FormatError(str(path), KNOWN, found, "check the path")


def _folder(path: Path) -> tuple[Reader, Path]:
    if os.path.lexists(path / RUN):
        path = _newest(path)
    if os.path.lexists(path / MANIFEST):
        _check_sizes(path)
    elif any(os.path.lexists(path / name) for name in TRAINING):
        raise NotFoundError(str(path / MANIFEST), "a checkpoint's manifest", "nothing there",
                            "this folder is no complete checkpoint")
    if not os.path.lexists(path / CONFIG):
        raise NotFoundError(str(path / CONFIG), "a model's configuration", "nothing there", f"give {KNOWN}")
    return open_hf, path


def _newest(run: Path) -> Path:
    """The newest checkpoint of a run, by name; one without a manifest is not complete and does not count."""
    with os_errors(str(run / "ckpt")):
        found = [p for p in (run / "ckpt").glob("step-*") if CHECKPOINT.fullmatch(p.name) and (p / MANIFEST).is_file()]
    if not found:
        raise NotFoundError(str(run / "ckpt"), "a complete checkpoint of this run", "none",
                            "let the run reach a checkpoint")
    return max(found)


def _check_sizes(folder: Path) -> None:
    """Raise IntegrityError unless the files of a checkpoint have the sizes in its manifest.

    The files' hashes are verified on resuming and by `apr inspect`.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != "apr-checkpoint":
        return  # another tool's, which says nothing to apr
    files = manifest.get("files")
    if not isinstance(files, dict) or "model.safetensors" not in files or CONFIG not in files:
        raise FormatError(str(folder / MANIFEST), "the files of a checkpoint", "others", "use another checkpoint")
    for name, entry in files.items():
        expected = entry.get("size") if isinstance(entry, dict) else None
        if os.path.basename(name) != name or not (folder / name).is_file():
            raise IntegrityError(str(folder / MANIFEST), "files that are there", f"'{name[:80]}'",
                                 "use another checkpoint")
        size = (folder / name).stat().st_size
        if size != expected:
            raise IntegrityError(str(folder / name), f"{expected} bytes", f"{size}", "use another checkpoint")
