"""GGUF files put together byte by byte, and models in memory to write as GGUF."""

import json
import struct
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from apr.formats.gguf_tokenizer import SPLITTINGS
from apr.formats.source import ModelSource
from apr.hf_config import to_hf
from apr.params import param_specs

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
TEXT = ("The quick brown fox's 1234 jumps; we'll see naïve cafés. def f(x):\n    return x + 1  # 日本語\n" * 9,
        "<p>it's 12,345.67 and\r\n\r\n\tmore</p> ÄÖÜ ßẞ русский язык 🙂🙂 I'VE\n\n\n" * 9)


def text(value):
    """A string of the format."""
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind, value):
    """A value of one of the fixed sizes, with its type."""
    return struct.pack("<I" + "BbHhIifBxxQqd"[kind], kind, value)


def string(value):
    """A string with its type."""
    return struct.pack("<I", STRING) + text(value)


def array(kind, length, body):
    """An array with its type."""
    return struct.pack("<IIQ", ARRAY, kind, length) + body


def key(name, value):
    """A key and a value that has its type."""
    return text(name) + value


def tensor(name, dims, kind, offset, ndim=None):
    """An entry of the index; dims as in the file, fastest first."""
    ndim = len(dims) if ndim is None else ndim
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", ndim, *dims, kind, offset)


KEYS = (key("general.architecture", string("llama")), key("a.flag", scalar(BOOL, 1)),
        key("a.list", array(STRING, 2, text("x") + text("yz"))), key("a.numbers", array(I32, 3, bytes(12))),
        key("a.float", scalar(F32, 0.5)))
TENSORS = (tensor("w", (3, 2), 0, 0), tensor("q", (32, 2), 8, 32))
DATA = np.arange(6, dtype="<f4").tobytes().ljust(32, b"\0") + bytes(68).ljust(96, b"\0")


def gguf_bytes(keys=KEYS, tensors=TENSORS, data=DATA, magic=b"GGUF", version=3, counts=None, align=32):
    """A whole file; `counts` are those of tensors and keys."""
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, n_tensors % 2**64, n_keys % 2**64) + b"".join(keys) + b"".join(tensors)
    return head.ljust(-(-len(head) // align) * align, b"\0") + data


def model_source(config, arrays, assets=None, **ids):
    """A ModelSource of arrays in memory."""
    names = {np.dtype("f4"): "F32", np.dtype("f2"): "F16"}
    return ModelSource(Path("memory"), "hf", config, {**to_hf(config), **ids},
                       assets or {}, {k: a.shape for k, a in arrays.items()},
                       {k: names.get(a.dtype, "BF16") for k, a in arrays.items()}, arrays.__getitem__, lambda: None)


def random_arrays(config, rng, dtype=np.float32):
    """Random parameters, vectors included, in one type."""
    return {s.name: rng.standard_normal(s.shape).astype(np.float32).astype(dtype) for s in param_specs(config)}


def byte_level(name="gpt-2", size=400, special=("<|endoftext|>", "<|im_end|>")):
    """A trained byte-level tokenizer.json that splits text as `name` says."""
    splitting = SPLITTINGS[name]
    inner = Tokenizer(models.BPE(ignore_merges=splitting.ignore_merges))
    inner.pre_tokenizer = _pre_tokenizer(splitting.pre_tokenizer)
    if splitting.nfc:
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return inner.to_str()


def _pre_tokenizer(part):
    """The library's object of the JSON of a pre-tokenizer."""
    if part["type"] == "Sequence":
        return pre_tokenizers.Sequence([_pre_tokenizer(p) for p in part["pretokenizers"]])
    if part["type"] == "Split":
        return pre_tokenizers.Split(Regex(part["pattern"]["Regex"]), "isolated")
    if part["type"] == "Digits":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=part["use_regex"])


def sentencepiece(prefix=True):
    """A small tokenizer.json as transformers makes one of a SentencePiece model."""
    words = ["\u2581the", "\u2581cat", "\u2581th", "the", "th", "he", "\u2581t", "at", "\u2581c", "ca", "cat", "in",
             "\u2581in"]
    single = sorted({c for w in words for c in w})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *single]
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = []
    for word in words:  # the earlier the word, the better its score
        cuts = [[word[:i], word[i:]] for i in range(1, len(word)) if word[:i] in vocab and word[i:] in vocab]
        merges += sorted(cuts, key=lambda c: (-len(c[0]), -len(c[1])))
    added = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, t in enumerate(tokens[:3])]
    spaces = [{"type": "Prepend", "prepend": "\u2581"}] * prefix
    spaces += [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    back = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, *[{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix]
    start = {"type": "TemplateProcessing",
             "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "pre_tokenizer": None,
        "normalizer": {"type": "Sequence", "normalizers": spaces}, "post_processor": start,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocab, "merges": merges}})
