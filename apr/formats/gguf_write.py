"""A model written as one GGUF file that llama.cpp runs; read back and compared before anyone is told that it is done.

Vectors are float32, as llama.cpp wants them; matrices are F32, F16, BF16 or Q8_0.
"""

import math
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize

from apr.errors import FormatError, GateError
from apr.files import replacing
from apr.formats.gguf_file import ALIGNMENT, ARRAY, BOOL, FLOAT32, MAGIC, MAX_NAME, STORED, STRING, UINT32, dequantised
from apr.formats.gguf_keys import QUANTIZATION_VERSION, chat_template, config_keys, load, text_keys
from apr.formats.gguf_model import open_gguf_model
from apr.formats.gguf_names import ROPE_FREQS, adjacent_rows, gguf_name, permuted_heads, rope_factors, shortest
from apr.formats.source import FLOATS, ModelSource
from apr.formats.stored import rounded
from apr.formats.tensors import raw_bytes
from apr.params import param_specs

WRITTEN = (*FLOATS, "Q8_0")
BLOCK, GREATEST = 32, 127 * 65504.0  # of Q8_0: values per scale, and the greatest that a float16 scale can say
FILE_TYPES = {"F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16,
              "Q8_0": LlamaFileType.MOSTLY_Q8_0}
ARRAY_TYPES = {np.dtype(np.int32): 5, np.dtype(np.float32): FLOAT32}
SPECIAL = ("_token_id", "add_bos_token")
PROBES = (
    "Hello, world! It's 1234567 o'clock; we'll see, I'VE said.", "  two  spaces\n\n\tand\r\nlines   ", "",
    "def f(x):\n    return x**2 + 3.14e-10  # ok?", "日本語 и русский, עברית, ελληνικά", "naïve cafe\u0301 🙂🇨🇭 \x7f",
    "<|endoftext|><|im_start|>user\nhi<|im_end|> <s> </s> [PAD3]", "a" * 40 + " " * 9 + "=" * 17, "\u2581x \u00a0y")


def write_gguf(path: Path, source: ModelSource, dtype: str | None,
               done: Callable[[str], None] = lambda tensor: None) -> tuple[str, ...]:
    """Write a model with matrices of type `dtype` (F32, F16, BF16, Q8_0; None: as they are read). Returns facts.

    `done` is told the name of each tensor. `path` is replaced whole or not at all. Raises FormatError for what GGUF
    cannot say and for values that the type cannot hold, StorageError.
    """
    if dtype is not None and dtype not in WRITTEN:
        raise FormatError(f"{path}: dtype", "one of " + ", ".join(WRITTEN), repr(dtype),
                          "quantise further with llama-quantize")
    config, names = source.config, [s.name for s in param_specs(source.config)]
    kinds = {name: stored_type(source.shapes[name], source.dtypes[name], dtype) for name in names}
    texts, facts = text_keys(source)
    counts = Counter(kinds[name] for name in names if len(source.shapes[name]) > 1)
    keys = {**config_keys(config, str(source.path)), "general.name": source.path.name.removesuffix(".apr") or "model",
            "general.type": "model", "general.alignment": ALIGNMENT,
            "general.file_type": int(FILE_TYPES[counts.most_common(1)[0][0]]),
            "general.quantization_version": QUANTIZATION_VERSION, **texts}
    index = {gguf_name(name): (kinds[name], source.shapes[name]) for name in names}
    factors = None
    if config.rope_scaling is not None:
        factors = rope_factors(config.rope_scaling, config.rope_theta, config.HS)
        index = {ROPE_FREQS: ("F32", factors.shape), **index}
    with replacing(path) as f:
        f.write(encode_header(keys, index, str(path)))
        if factors is not None:
            f.write(raw_bytes(factors).tobytes().ljust(_up(factors.nbytes), b"\0"))
        for name in names:
            array = source.read(name)
            if heads := permuted_heads(name, config):
                array = adjacent_rows(array, heads)
            data = raw_bytes(converted(array, kinds[name], f"{source.path}: tensor '{name}'"))
            f.write(data)
            f.write(bytes(-data.nbytes % ALIGNMENT))
            done(name)
    facts += [f"{count} matrices written as {kind}" for kind, count in sorted(counts.items())]
    if dtype == "Q8_0" and len(counts) > 1:
        facts.append(f"F16 where a row is no multiple of {BLOCK} values, which Q8_0 wants")
    if any(kind not in FLOATS for kind in source.dtypes.values()) and dtype is None:
        facts.append("blocks became F32: quantising them again would lose more")
    return tuple(facts)


def check_gguf(path: Path, source: ModelSource, dtype: str | None,
               done: Callable[[str], None] = lambda tensor: None) -> tuple[str, ...]:
    """Read a written file back and compare everything with its source. Returns what was compared; `done` as above.

    Raises GateError naming the first difference, and as open_gguf_model.
    """
    def demand(what: str, expected: Any, found: Any) -> None:
        if expected != found:
            raise GateError(f"EXPORT-GGUF {path}: {what}", str(expected)[:120], str(found)[:120],
                            "this is a defect of apr; the file is not to be used")

    with open_gguf_model(path) as back:
        demand("configuration", source.config, back.config)
        for name, shape in source.shapes.items():
            kind = stored_type(shape, source.dtypes[name], dtype)
            demand(f"type of '{name}'", kind, back.dtypes[name])
            expected = converted(source.read(name), kind, name)
            if kind not in STORED:
                expected = dequantised(expected, kind, shape)
            demand(f"values of '{name}'", True, raw_bytes(expected) == raw_bytes(back.read(name)))
            done(name)
        facts = [f"{len(source.shapes)} of {len(source.shapes)} tensors equal", "configuration equal"]
        demand("tokenizer", "tokenizer.json" in source.assets, "tokenizer.json" in back.assets)
        if "tokenizer.json" in source.assets:
            old, new = (load(s.assets["tokenizer.json"], str(s.path)) for s in (source, back))
            for as_text in (False, True):
                old.encode_special_tokens = new.encode_special_tokens = as_text
                for text in PROBES:
                    demand(f"token ids of {text[:20]!r}", old.encode(text).ids, new.encode(text).ids)
            demand("special ids", *({key: value for key, value in text_keys(s)[0].items() if key.endswith(SPECIAL)}
                                    for s in (source, back)))
            demand("chat template", chat_template(source), chat_template(back))
            facts.append(f"token ids equal on {len(PROBES)} probe texts; special ids and chat template equal")
    return tuple(facts)


def stored_type(shape: tuple[int, ...], source: str, dtype: str | None) -> str:
    """The type that a tensor is written in."""
    if len(shape) < 2:
        return "F32"
    wanted = dtype or (source if source in FLOATS else "F32")
    return "F16" if wanted == "Q8_0" and shape[-1] % BLOCK else wanted


def converted(array: np.ndarray, kind: str, where: str) -> np.ndarray:
    """The array in a stored type, rounded to nearest even, or as bytes of blocks. Raises FormatError on overflow."""
    if kind != "Q8_0":
        return rounded(array, kind, where)
    values = array.astype(np.float32, copy=False)
    if not np.abs(values).max(initial=0) <= GREATEST:
        raise FormatError(where, "values that Q8_0 can hold", f"up to {np.abs(values).max():g}", "write F32 or BF16")
    return quantize(values, GGMLQuantizationType.Q8_0)


def encode_header(keys: Mapping[str, Any], index: Mapping[str, tuple[str, tuple[int, ...]]], where: str) -> bytes:
    """Everything before the data, padded. `keys` by Python's types: int is UINT32, float FLOAT32; `index` type, shape.

    Raises FormatError for a number that the format would change and for names that are too long.
    """
    out = [MAGIC, struct.pack("<IQQ", 3, len(index), len(keys))]
    for key, value in keys.items():
        out += [_text(key), _value(value, f"{where}: {key}")]
    position = 0
    for name, (kind, shape) in index.items():
        if len(name.encode()) > MAX_NAME:
            raise FormatError(f"{where}: tensor '{name}'", f"a name of at most {MAX_NAME} bytes", f"{len(name)}",
                              "GGUF cannot say it")
        code = GGMLQuantizationType[kind]
        block, nbytes = GGML_QUANT_SIZES[code]
        out += [_text(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], code, position)]
        position += _up(math.prod(shape) // block * nbytes)
    head = b"".join(out)
    return head.ljust(_up(len(head)), b"\0")


def _up(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any, where: str) -> bytes:
    """Type and value of a key."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, int) and 0 <= value < 2**32:
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float) and shortest(float(np.float32(value))) == value:
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", ARRAY, ARRAY_TYPES[value.dtype], len(value)) + value.tobytes()
    raise FormatError(where, "a number that float32 or uint32 gives back", repr(value)[:60],
                      "GGUF would change it; export to another format")
