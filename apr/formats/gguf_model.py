"""GGUF files as model sources: not read and not written yet."""

from pathlib import Path

from apr.errors import FormatError
from apr.formats.source import ModelSource


def open_gguf_model(path: Path) -> ModelSource:
    """Raises FormatError."""
    raise FormatError(str(path), "a format that is read", "GGUF", "give a Hugging Face folder or an .apr file")


def write_gguf(path: Path, source: ModelSource, dtype: str | None) -> None:
    """Raises FormatError."""
    raise FormatError(str(path), "a format that is written", f"GGUF of {source.path} as {dtype}", "take --format hf")
