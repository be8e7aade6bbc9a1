"""What the kernel cache holds: listed, explained, verified, filled before a run. No GPU is needed for any of it."""

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from apr import paths
from apr.config import TransformerConfig
from apr.errors import ConfigError, NotFoundError, StorageError
from apr.kernel import fast_paths
from apr.ptx_cache import PtxCache
from apr.ptx_store import Entry, PtxStore
from apr.registry import variants

ARCHS = ("sm_80", "sm_90", "sm_90a")
STALE = 3600.0  # seconds after which a temporary file has no writer any more
BAKED = re.compile(r"-([A-Z][A-Z0-9_]*)=(f[0-9a-f]{8}|-?\d+|f32|bf16)(?=-)")

Row = dict[str, Any]


def open_store(folder: Path | None = None) -> PtxStore:
    """The user's cache (or the one in `folder`). Raises StorageError where it cannot be used or trusted."""
    folder, said = folder or paths.cache_dir(), list[str]()
    store = PtxStore(folder, said.append, lambda: None)
    if said:
        raise StorageError("kernel cache", "a folder that you alone can write", said[0].partition(": ")[2],
                           "chmod 700 it, or set APR_CACHE_DIR")
    return store


def baked_values(label: str) -> dict[str, int | float | str]:
    """The baked values that a label (or key) spells, floats as numbers."""
    def value(text: str) -> int | float | str:
        if len(text) == 9 and text[0] == "f":
            return float(struct.unpack(">f", bytes.fromhex(text[1:]))[0])
        return text if text in ("f32", "bf16") else int(text)

    return {name: value(text) for name, text in BAKED.findall(label)}


def traces(name: str, baked: dict[str, int | float | str]) -> list[bytes]:
    """The bytes of which a cubin must hold one set, if the float `name` is baked in: how compilers write it.

    As its 32 bits, or as the upper half of a double, of it, its negative or its reciprocal (a division by a power of
    two). Llama 3's HIGH is only ever seen less LOW.
    """
    x = float(baked[name])
    if name == "HIGH" and "LOW" in baked:
        x -= float(baked["LOW"])
    doubles = [x, -x, *([1 / x] if x else [])]
    return [struct.pack("<f", x), *(struct.pack("<d", d)[4:] for d in doubles)]


def missing_constants(entry: Entry) -> list[str]:
    """The baked floats of an entry's key that leave no trace in its code."""
    baked = baked_values(entry.key)
    return [f"{name}={value!r}" for name, value in baked.items()
            if isinstance(value, float) and not any(t in entry.image for t in traces(name, baked))]


def rows(store: PtxStore) -> Iterator[Row]:
    """Every entry: key, bytes, entries with their registers, milliseconds that compiling took, problem ('' if none)."""
    for name, found in store.entries():
        if isinstance(found, str):
            yield {"key": name, "bytes": 0, "entries": {}, "milliseconds": 0.0, "problem": found}
            continue
        used = found.meta.get("entries")
        registers = {str(e): u.get("registers") for e, u in sorted(used.items())} if isinstance(used, dict) else {}
        yield {"key": found.key, "bytes": len(found.image), "entries": registers,
               "milliseconds": found.meta.get("milliseconds", 0.0), "problem": ""}


def verify(store: PtxStore) -> Iterator[tuple[str, str]]:
    """Every entry's key and what is wrong with it, or '': file, owner, SHA-256, key, the constants in its code."""
    for name, found in store.entries():
        if isinstance(found, str):
            yield name, found
            continue
        missing = missing_constants(found)
        problem = f"its code has no {', '.join(missing)}" if missing else ""
        if not found.key.startswith(f"{found.meta.get('label')}-"):
            problem = f"it says that it is {found.meta.get('label')}"
        yield found.key, problem


def find(store: PtxStore, text: str) -> Entry:
    """The one sound entry whose key begins with `text`, or else the one that has it anywhere.

    Raises NotFoundError, or ConfigError for several.
    """
    entries = [e for _, e in store.entries() if isinstance(e, Entry)]
    matches = [e for e in entries if e.key.startswith(text)] or [e for e in entries if text in e.key]
    if not matches:
        raise NotFoundError(f"kernel cache: '{text}'", "a key, or a part of one", f"none among {len(entries)}",
                            "see 'apr cache list'")
    if len(matches) > 1:
        raise ConfigError(f"kernel cache: '{text}'", "a part of one key", f"{len(matches)}: {matches[0].key}, …",
                          "give more of it")
    return matches[0]


def ingredients(entry: Entry) -> dict[str, str]:
    """What the key was made of, by field."""
    label = str(entry.meta.get("label", ""))
    baked = {name: str(np.float32(value) if isinstance(value, float) else value)
             for name, value in baked_values(entry.key).items()}
    out = {"kernel": label.partition("-")[0]} | baked
    for name in ("arch", "compiler", "cupy", "options", "schema", "source_sha256"):
        value = entry.meta.get(name, "")
        out[name] = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return out


def difference(a: Entry, b: Entry) -> dict[str, tuple[str, str]]:
    """The fields in which two keys differ, with both values ('' where there is none)."""
    one, two = ingredients(a), ingredients(b)
    return {name: (one.get(name, ""), two.get(name, "")) for name in {**one, **two} if one.get(name) != two.get(name)}


def warm(configs: Iterable[tuple[TransformerConfig, str]], archs: Iterable[str],
         warn: Callable[[str], None]) -> Iterator[Row]:
    """Compile into the cache what these models (with their storage types) need; per architecture what was done.

    Raises StorageError where the cache cannot be used; KernelCompileError.
    """
    open_store().sweep(STALE)
    models = list(configs)
    for arch in archs:
        cache, fast = PtxCache(arch, warn=warn), fast_paths(arch)
        needed = [v for config, storage in models for v in variants(config, storage, fast)]
        made = cache.warm(needed)
        yield {"arch": arch, "modules": len(made), "compiled": cache.counts.compiled, "found": cache.counts.hits,
               "bytes": sum(len(e.image) for e in made)}
