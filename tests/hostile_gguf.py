"""Malformed GGUF files: the container byte by byte (llama.cpp's own list and more), and models whose metadata lie."""

import dataclasses
import functools
import struct

import numpy as np
from gguf_files import (
    ARRAY,
    BOOL,
    DATA,
    F32,
    F64,
    I32,
    KEYS,
    STRING,
    TENSORS,
    U8,
    U16,
    U32,
    U64,
    array,
    byte_level,
    gguf_bytes,
    key,
    model_source,
    scalar,
    string,
    tensor,
    text,
)
from hostile import CONFIG, FORMAT, Case, put
from hostile_models import MODEL, UNTIED, arrays
from hostile_tensors import WRAPS, appended, special_files

from apr.formats.gguf_keys import config_keys, text_keys
from apr.formats.gguf_names import adjacent_rows, gguf_name, permuted_heads
from apr.formats.gguf_write import encode_header, write_gguf

HUGE = (2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
ALIGN = "general.alignment"


def w(*dims, kind=0, offset=0, ndim=None):
    """The index with another entry for 'w'."""
    return gguf_bytes(tensors=(tensor("w", dims, kind, offset, ndim), TENSORS[1]))


def with_key(*keys):
    """A file with keys added."""
    return gguf_bytes(keys=(*KEYS, *keys))


def file_cases():
    def case(row, what, data, says=""):
        return Case(row, "gguf", what, put("x.gguf", data), FORMAT, says)

    good = gguf_bytes()
    for n in [n for n in range(len(good)) if n != len(good) - 28]:  # without its last padding a file is whole
        yield case("B1", f"cut to {n} bytes", good[:n])
    for n in HUGE:
        yield case("B3", f"{n} tensors", gguf_bytes(counts=(n, len(KEYS))), "tensors")
        yield case("B3", f"{n} keys", gguf_bytes(counts=(len(TENSORS), n)), "keys")
        yield case("B2", f"a key of {n} bytes", gguf_bytes(keys=(struct.pack("<Q", n) + b"key", *KEYS)))
        yield case("B2", f"a text of {n} bytes", with_key(text("k") + struct.pack("<IQ", STRING, n)))
        yield case("B2", f"a name of {n} bytes", gguf_bytes(tensors=(struct.pack("<Q", n) + b"w", *TENSORS)))
        for kind in (U8, F32, STRING):
            yield case("B3", f"an array of {n} values of type {kind}", with_key(key("k", array(kind, n, b""))))
        yield case("B4", f"offset {n}", w(3, 2, offset=n))
        if n < 2**32:
            yield case("B5", f"{n} sizes", w(3, 2, ndim=n))
        yield case("B5", f"a size of {n}", w(n, 2))
    for counts in ((1, len(KEYS)), (3, len(KEYS)), (2, len(KEYS) - 1), (2, len(KEYS) + 1), (0, len(KEYS)), (0, 0)):
        yield case("B3", f"{counts} tensors and keys", gguf_bytes(counts=counts))
    for what, second in (("overlap", 0), ("hole", 64), ("past the end", 2**20), ("unaligned", 40)):
        yield case("B4", what, gguf_bytes(tensors=(TENSORS[0], tensor("q", (32, 2), 8, second))))
    yield case("B7", "the same entry twice", gguf_bytes(tensors=(*TENSORS, TENSORS[0])), "'w'")
    yield case("B4", "an offset that wraps", w(3, 2, offset=2**64 - 32))
    yield case("B4", "data without tensors", gguf_bytes(tensors=()))
    for what, dims in (("wraps to 16 bytes", WRAPS), ("wraps to 0", (2**32, 2**32)), ("two of 2^62", (2**62, 2**62)),
                       ("2^60 - 1", (2**60 - 1,)), ("0", (0,)), ("0 and 2", (2, 0)), ("too many", (3, 3)),
                       ("too few", (1,))):
        yield case("B5", f"sizes {what}", w(*dims))
    yield case("B5", "an empty tensor", gguf_bytes(tensors=(tensor("z", (0,), 0, 0), *TENSORS)), "'z'")
    for ndim in (0, 5, 255):
        yield case("B5", f"{ndim} sizes", w(3, 2, ndim=ndim))
    for kind in (4, 5, 31, 36, 42, 200, 2**31, 2**32 - 1):
        yield case("B6", f"type {kind}", w(3, 2, kind=kind), "type")
    for kind, name in ((2, "Q4_0"), (8, "Q8_0"), (12, "Q4_K"), (14, "Q6_K"), (39, "MXFP4")):
        for dims in ((31, 2), (33, 2), (48, 2), (100, 2)):
            yield case("B12", f"{name} {dims}", w(*dims, kind=kind), name)
    for kind, name in ((24, "I8"), (28, "F64"), (34, "TQ1_0"), (16, "IQ2_XXS")):
        size = {24: 256, 28: 2048, 34: 54, 16: 66}[kind]
        yield case("B12", f"{name}, which is not read", gguf_bytes(
            tensors=(tensor("w", (256,), kind, 0),), data=bytes(-(-size // 32) * 32)), name)
    for version in (0, 1, 4, 0x03000000, 2**32 - 1):
        yield case("B6", f"version {version}", gguf_bytes(version=version), "version 2 or 3")
    for magic in (b"FUGG", b"ggjt", b"APR\0", b"\0\0\0\0"):
        yield case("B13", f"magic {magic!r}", gguf_bytes(magic=magic), "GGUF")
    for kind in (13, 14, 255, 2**31, 2**32 - 1):
        yield case("B11", f"a value of type {kind}", with_key(text("k") + struct.pack("<I", kind)), "type")
        yield case("B11", f"an array of type {kind}", with_key(key("k", array(kind, 1, bytes(9)))), "array")
    yield case("B11", "10,000 arrays in arrays", with_key(
        key("k", struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 10_000)), "array")
    for value in (0, 1, 4, 13, 33, 2**17, 2**31, 2**32 - 1):
        yield case("B11", f"alignment {value}", with_key(key(ALIGN, scalar(U32, value))), ALIGN)
    for what, value in (("UINT16", scalar(U16, 32)), ("UINT64", scalar(U64, 32)), ("INT32", scalar(I32, 32)),
                        ("FLOAT32", scalar(F32, 32)), ("BOOL", scalar(BOOL, 1)), ("text", string("32")),
                        ("array", array(U32, 1, struct.pack("<I", 32)))):
        yield case("B11", f"alignment of type {what}", with_key(key(ALIGN, value)), ALIGN)
    yield case("B11", "alignment 64, data at 32", with_key(key(ALIGN, scalar(U32, 64))))
    for what, added in (("empty", (key("", scalar(U8, 1)),)), ("twice", (KEYS[0],)),
                        ("with a zero byte", (key("a\0b", scalar(U8, 1)),)),
                        ("not UTF-8", (key(b"\xff\xfe", scalar(U8, 1)),)), ("65,536 bytes", (key("k" * 65536,
                                                                                                scalar(U8, 1)),))):
        yield case("B7", f"key {what}", with_key(*added))
    for what, name in (("empty", ""), ("64 bytes", "n" * 64), ("10 MB", "n" * 10_000_000), ("zero byte", "a\0b"),
                       ("not UTF-8", b"\xc3("), ("twice", "q"), ("surrogate", b"\xed\xa0\x80")):
        yield case("B7", f"name {what}", gguf_bytes(tensors=(tensor(name, (3, 2), 0, 0), TENSORS[1])))
    for raw in (b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"a\xe3\x81"):
        yield case("B7", f"text {raw!r}", with_key(key("k", struct.pack("<I", STRING) + text(raw))), "UTF-8")
        yield case("B7", f"text {raw!r} in an array", with_key(key("k", array(STRING, 1, text(raw)))), "UTF-8")
    for kind in (F32, F64):
        for value in (np.nan, np.inf, -np.inf):
            yield case("B8", f"{value} of type {kind}", with_key(key("k", scalar(kind, value))), "finite")
            body = struct.pack("<3" + "fd"[kind == F64], 0, value, 1)
            yield case("B8", f"{value} of type {kind} in an array", with_key(key("k", array(kind, 3, body))), "finite")
    for value in (2, 255):
        yield case("B8", f"BOOL {value}", with_key(key("k", struct.pack("<IB", BOOL, value))), "true")
    yield case("B3", "2^20 + 1 texts", lambda: with_key(key("k", array(STRING, 2**20 + 1, bytes(8 * (2**20 + 1))))))
    for what, at in (("after the index", len(good) - len(DATA) - 1), ("after a tensor", len(good) - len(DATA) + 25),
                     ("at the end", len(good) - 1)):
        yield case("B14", f"bytes in the padding {what}", good[:at] + b"\1" + good[at + 1:])
    for what, write in special_files("x.gguf").items():
        yield Case("B13", "gguf", what, write, FORMAT)
    for what, write in appended("x.gguf", good).items():
        yield Case("B14", "gguf", what, write, FORMAT)
    for name, says in (("a\nb\x1b[2J.gguf", "\\x0a"), ("é\u202e.gguf", "")):
        yield Case("B7", "gguf", f"file name {name!r}", put(name, b"x"), FORMAT, says)


def model(config=MODEL, tensors=lambda t: None, **change):
    """A `write` of a model without a tokenizer, tensors and keys (`_` for `.`, None: removed) changed."""
    def write(folder):
        values = {gguf_name(n): a for n, a in arrays(config).items()}
        for n, a in arrays(config).items():
            if heads := permuted_heads(n, config):
                values[gguf_name(n)] = adjacent_rows(a, heads)
        tensors(values)
        keys = {**config_keys(config, "x"), "tokenizer.ggml.model": "no_vocab", **change}
        keys = {k: v for k, v in keys.items() if v is not None}
        index = {n: ("F32", a.shape) for n, a in values.items()}
        data = b"".join(a.astype("<f4").tobytes().ljust(-(-a.nbytes // 32) * 32, b"\0") for a in values.values())
        return put("model.gguf", encode_header(keys, index, "x") + data)(folder)
    return write


def model_cases():
    def case(row, what, write, code=FORMAT, says=""):
        return Case(row, "gguf model", what, write, code, says)

    arch, bias, norm = "qwen2", "blk.0.attn_q.bias", "output_norm.weight"
    eps, theta, heads = f"{arch}.attention.layer_norm_rms_epsilon", f"{arch}.rope.freq_base", f"{arch}.block_count"
    for name in (eps, theta, heads, f"{arch}.embedding_length", f"{arch}.attention.head_count_kv",
                 f"{arch}.context_length", f"{arch}.feed_forward_length", "general.architecture"):
        yield case("H3", f"no {name}", model(**{name: None}), says=name)
        yield case("H3", f"{name} a text", model(**{name: "12"}), says=name)
        yield case("H3", f"{name} true", model(**{name: True}), says=name)
    for name, value in ((eps, 0.0), (eps, 1.0), (theta, 0.5), (heads, 0), (heads, 2**31 - 1), (heads, 2**32 - 1),
                        (f"{arch}.attention.head_count", 0), (f"{arch}.attention.head_count_kv", 3),
                        (f"{arch}.context_length", 0)):
        yield case("H3", f"{name} {value}", model(**{name: value}), CONFIG)
    yield case("B15", "10,000 layers", model(**{heads: 10_000}), says="block_count")
    for name, value in (("general.architecture", "bert"), ("general.architecture", "mistral"),
                        ("apr.model_type", "llama"), ("apr.model_type", 5), ("general.type", "adapter"),
                        ("split.count", 2), (f"{arch}.unheard_of", 1), (f"{arch}.rope.scaling.type", "yarn"),
                        (f"{arch}.rope.scaling.type", "linear"), (f"{arch}.rope.scaling.factor", 4.0),
                        (f"{arch}.expert_count", False), ("general.architecture", np.zeros(3, np.int32)),
                        ("general.type", ["model"]), (f"{arch}.rope.dimension_count", np.full(2, 4, np.int32)),
                        (f"{arch}.expert_count", 8), (f"{arch}.attention.causal", False),
                        (f"{arch}.attention.value_length", 2), (f"{arch}.rope.dimension_count", 2),
                        (f"{arch}.vocab_size", 17), (f"{arch}.block_count", 2), (f"{arch}.attention.key_length", 8)):
        yield case("B15", f"{name} {value!r}", model(**{name: value}))
    for what, change, config, says in (
            ("missing bias", lambda t: t.pop(bias), MODEL, "q_proj.bias"),
            ("missing norm", lambda t: t.pop(norm), MODEL, "model.norm.weight"),
            ("extra tensor", lambda t: t.update(extra=np.zeros(3, np.float32)), MODEL, "'extra'"),
            ("renamed", lambda t: t.update({"blk.0.attn_norm.gamma": t.pop("blk.0.attn_norm.weight")}), MODEL, "gamma"),
            ("another spelling", lambda t: t.update({"blk.00.attn_norm.weight": t.pop("blk.0.attn_norm.weight")}),
             MODEL, "blk.00"),
            ("layer 1 of 1", lambda t: t.update({"blk.1.attn_norm.weight": t["blk.0.attn_norm.weight"]}), MODEL,
             "layers.1"),
            ("bias of a model without", lambda t: t.update({bias: np.zeros(8, np.float32)}), UNTIED, "q_proj.bias"),
            ("transposed", lambda t: t.update({"token_embd.weight": t["token_embd.weight"].T.copy()}), MODEL,
             "vocab_size"),
            ("flat", lambda t: t.update({"blk.0.attn_q.weight": t["blk.0.attn_q.weight"].reshape(-1)}), UNTIED,
             "q_proj"),
            ("no embedding", lambda t: t.pop("token_embd.weight"), MODEL, "token_embd"),
            ("rope factors of none", lambda t: t.update({"rope_freqs.weight": np.array([1, 7], np.float32)}), UNTIED,
             "rope_freqs"),
            ("rope factors of 0", lambda t: t.update({"rope_freqs.weight": np.zeros(2, np.float32)}), UNTIED,
             "rope_freqs"),
            ("rope factors NaN", lambda t: t.update({"rope_freqs.weight": np.full(2, np.nan, np.float32)}), UNTIED,
             "rope_freqs"),
            ("rope factors too many", lambda t: t.update({"rope_freqs.weight": np.ones(3, np.float32)}), UNTIED,
             "rope_freqs")):
        yield case("B15", what, model(config, change), says=says)
    for value in (np.nan, np.inf, -np.inf):
        yield case("B16", f"{value}", model(tensors=lambda t, v=value: t[norm].__setitem__(2, v)),
                   says="model.norm.weight")
    yield from tokenizer_cases()


@functools.cache
def good_tokenizer():
    """The metadata of a good tokenizer, as the writer makes them."""
    config = dataclasses.replace(MODEL, vocab_size=300)
    return text_keys(model_source(config, arrays(config), {"tokenizer.json": byte_level(size=290)}))[0]


def tokenizer_cases():
    config = dataclasses.replace(MODEL, vocab_size=300)
    good, g = good_tokenizer(), "tokenizer.ggml."
    tokens, types, merges = good[g + "tokens"], good[g + "token_type"], good[g + "merges"]
    odd = types.copy()
    odd[5] = 9
    for row, name, value in (
            ("C1", "model", "bert"), ("C1", "model", None), ("C1", "model", 5), ("C1", "pre", "unheard-of"),
            ("C1", "pre", 5), ("B7", "tokens", [*tokens[:-1], tokens[0]]),
            ("B7", "tokens", [*tokens[:-1], ""]), ("B7", "tokens", None), ("B7", "tokens", types), ("B7", "tokens", []),
            ("B6", "token_type", types[:-1]), ("B6", "token_type", odd), ("B6", "token_type", "1"),
            ("B6", "merges", None), ("B6", "merges", ["qq zz"]), ("B6", "merges", [*merges, merges[0]]),
            ("B6", "merges", ["a"]), ("B6", "merges", [merges[0] + " a"]), ("B6", "merges", 5),
            ("B8", "eos_token_id", 300), ("B8", "eos_token_id", 2**32 - 1), ("B8", "eos_token_id", "1"),
            ("B8", "bos_token_id", True), ("B8", "eot_token_id", 0.5), ("B8", "add_bos_token", "yes"),
            ("B8", "add_bos_token", True), ("B8", "padding_token_id", 301)):
        kind = f"{value!r}"[:20] if not isinstance(value, list | np.ndarray) else f"of {len(value)}"
        yield Case(row, "gguf model", f"{name} {kind}", model(config, **{**good, g + name: value}), FORMAT, g + name)
    yield Case("B7", "gguf model", "tokens of 299", model(config, **{**good, g + "tokens": tokens[:-1],
                                                                     g + "token_type": types[:-1]}), FORMAT, "tokens")
    yield Case("B8", "gguf model", "a chat template of 5", model(config, **{**good, "tokenizer.chat_template": 5}),
               FORMAT, "chat_template")
    spm = {**good, g + "model": "llama"}
    scores = np.zeros(300, np.float32)
    for name, value in (("scores", None), ("scores", scores[:-1]), ("scores", types), ("add_space_prefix", 5)):
        yield Case("C1", "gguf model", f"{name} {type(value).__name__}", model(
            config, **{**spm, g + "scores": scores, g + "bos_token_id": 1, g + name: value}), FORMAT, g + name)


def written_model(folder):
    """A good model file with a tokenizer."""
    config = dataclasses.replace(MODEL, vocab_size=300)
    write_gguf(folder / "model.gguf", model_source(config, arrays(config), {"tokenizer.json": byte_level(size=290)}),
               None)
    return folder / "model.gguf"


def cases():
    return [*file_cases(), *model_cases()]
