"""The tokenizer in a GGUF file's metadata as a tokenizer.json, and back: byte-level BPE, and SentencePiece's BPE.

GGUF holds the tokens, merges or scores, and a name for how text is split before (`tokenizer.ggml.pre`); what that name
means is in llama.cpp, and here in SPLITTINGS.

SOURCE  llama.cpp src/llama-vocab.cpp (names, what each implies), convert_hf_to_gguf.py (token types, padding tokens);
        the splits as in the tokenizer.json of Qwen2.5, Llama 3, SmolLM2, GPT-2 and Mistral Nemo.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from apr.errors import FormatError
from apr.formats.gguf_names import one_of, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_PIECES = 2**21  # characters of all tokens; each is a place where one may be cut in two
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPM_SPACE = "\u2581"
Refuse = Callable[[str, str, str], NoReturn]


def _splits(*patterns: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
                                   for p in patterns]
    return {"type": "Sequence", "pretokenizers": [*parts, {**BYTE_LEVEL, "use_regex": False}]}


@dataclass(frozen=True)
class Splitting:
    """What a name of `tokenizer.ggml.pre` means; `add_bos` is what llama.cpp does where the file does not say."""

    pre_tokenizer: dict[str, Any]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = _splits(SUFFIXES + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES)
_QWEN2 = _splits(SUFFIXES + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES)
_BEGIN = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = _splits(f"{_BEGIN}{UPPER}*{LOWER}+|{_BEGIN}{UPPER}+{LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES)
SPLITTINGS = {
    "gpt-2": Splitting(BYTE_LEVEL), "phi-2": Splitting(BYTE_LEVEL),
    "smollm": Splitting({"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}),
    "qwen2": Splitting(_QWEN2, nfc=True), "deepseek-r1-qwen": Splitting(_QWEN2, nfc=True),
    "stablelm2": Splitting(_QWEN2),
    "llama-bpe": Splitting(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama3": Splitting(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": Splitting(_LLAMA3, ignore_merges=True, add_bos=True),
    "smaug-bpe": Splitting(_LLAMA3),
    "tekken": Splitting(_TEKKEN, ignore_merges=True, add_bos=True),
    "default": Splitting(_splits(r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
}


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer as a file says it: its tokenizer.json, how many tokens it lists, and whether a text starts with bos.

    `json` is None for a file without a vocabulary.
    """

    json: str | None
    tokens: tuple[str, ...]
    add_bos: bool
    about: str


def read_tokenizer(metadata: Mapping[str, Any], where: str) -> GgufTokenizer:
    """The tokenizer of a file's metadata.

    Raises FormatError: unknown model or splitting, tokens that are not all different, merges or types that do not fit.
    """
    def refuse(key: str, expected: str, found: str) -> NoReturn:
        raise FormatError(f"{where}: tokenizer.ggml.{key}", expected, found,
                          "convert the model again with llama.cpp of today")

    kind = metadata.get("tokenizer.ggml.model")
    if one_of(kind, "no_vocab", "none"):
        return GgufTokenizer(None, (), False, "no tokenizer in the file")
    if not one_of(kind, "gpt2", "llama"):
        refuse("model", "'gpt2' (byte-level BPE) or 'llama' (SentencePiece's BPE)", shown(kind))
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or "" in tokens or len(set(tokens)) != len(tokens):
        refuse("tokens", "texts that are all different, none empty", "others")
    types = metadata.get("tokenizer.ggml.token_type")
    types = np.full(len(tokens), NORMAL) if types is None else types
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        refuse("token_type", f"{len(tokens)} whole numbers", "others")
    allowed = (NORMAL, CONTROL, USER_DEFINED, UNUSED) + ((UNKNOWN, BYTE) if kind == "llama" else ())
    if not np.isin(types, allowed).all():
        refuse("token_type", f"types {allowed}", f"{types[~np.isin(types, allowed)][0]}")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and (not isinstance(pre, str) or pre not in SPLITTINGS):
        refuse("pre", "one of " + ", ".join(SPLITTINGS), shown(pre))
    by_default = SPLITTINGS[pre].add_bos if kind == "gpt2" else True
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", by_default)
    bos = special_id(metadata, "bos", len(tokens), where)
    if type(add_bos) is not bool or (add_bos and bos is None):
        refuse("add_bos_token", "true or false, and an id of bos if it is true", shown(add_bos))
    usable = {token: i for i, (token, t) in enumerate(zip(tokens, types.tolist(), strict=True)) if t != UNUSED}
    model = (_byte_level(metadata, usable, SPLITTINGS[pre], refuse) if kind == "gpt2"
             else _sentencepiece(metadata, usable, tokens, types, refuse))
    added = [_added(i, tokens[i], int(types[i]) != USER_DEFINED) for i in range(len(tokens))
             if types[i] in (CONTROL, USER_DEFINED, UNKNOWN)]
    out = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **model}
    if add_bos and bos is not None:
        out["post_processor"] = _starts_with(tokens[bos], bos)
    about = f"tokenizer: {len(tokens)} tokens, " + (f"byte-level BPE split as '{pre}'" if kind == "gpt2"
                                                    else "SentencePiece BPE, merges from the scores")
    return GgufTokenizer(json.dumps(out, ensure_ascii=False), tuple(tokens), add_bos, about)


def special_id(metadata: Mapping[str, Any], name: str, count: int, where: str) -> int | None:
    """The id under `tokenizer.ggml.<name>_token_id`, if any. Raises FormatError for no id of `count` tokens."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is not None and not (type(value) is int and 0 <= value < count):
        raise FormatError(f"{where}: {key}", f"an id below {count}", shown(value), "write the file again")
    return value


def _added(number: int, text: str, special: bool) -> dict[str, Any]:
    return {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": special}


def _starts_with(token: str, number: int) -> dict[str, Any]:
    """A post-processor that puts one token before every text."""
    first, a = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [first, a],
            "pair": [first, a, {"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}}}


def _byte_level(metadata: Mapping[str, Any], usable: dict[str, int], splitting: Splitting,
                refuse: Refuse) -> dict[str, Any]:
    lines = metadata.get("tokenizer.ggml.merges")
    if not isinstance(lines, list):
        refuse("merges", "texts of two tokens", "others")
    merges = []
    for line in lines:
        left, _, right = line.partition(" ")
        if left not in usable or right not in usable or left + right not in usable:
            refuse("merges", "pairs of tokens that make a token", shown(line))
        merges.append([left, right])
    if len({*map(tuple, merges)}) != len(merges):
        refuse("merges", "each pair once", "one twice")
    return {"normalizer": {"type": "NFC"} if splitting.nfc else None, "pre_tokenizer": splitting.pre_tokenizer,
            "post_processor": {**BYTE_LEVEL, "trim_offsets": False, "use_regex": False}, "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": splitting.ignore_merges, "vocab": usable, "merges": merges}}


def _sentencepiece(metadata: Mapping[str, Any], usable: dict[str, int], tokens: list[str], types: np.ndarray,
                   refuse: Refuse) -> dict[str, Any]:
    """BPE with bytes as a last resort, whose merges follow from the scores."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) != len(tokens):
        refuse("scores", f"{len(tokens)} numbers", "others")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    if type(prefix) is not bool:
        refuse("add_space_prefix", "true or false", shown(prefix))
    normal = {t: i for t, i in usable.items() if types[i] == NORMAL}
    if sum(map(len, normal)) > MAX_PIECES or max(map(len, normal), default=0) > 256:
        refuse("tokens", f"at most {MAX_PIECES} characters, 256 each", "more")
    merges = merges_of_scores(normal, scores)
    unknown = np.flatnonzero(types == UNKNOWN)
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPM_SPACE}]
    if prefix:
        spaces.insert(0, {"type": "Prepend", "prepend": SPM_SPACE})
    back = [{"type": "Replace", "pattern": {"String": SPM_SPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}] + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix
    return {"normalizer": {"type": "Sequence", "normalizers": spaces}, "pre_tokenizer": None, "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": back},
            "model": {"type": "BPE", "dropout": None, "unk_token": tokens[unknown[0]] if unknown.size else None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                      "byte_fallback": True, "ignore_merges": False, "vocab": usable,
                      "merges": merges}}


def merges_of_scores(tokens: Mapping[str, int], scores: np.ndarray) -> list[list[str]]:
    """The merges that SentencePiece's scores (V,) mean: every cut of every token in two tokens, the best score first.

    Among cuts of equal score the longer left half goes first, as transformers orders them.
    """
    cuts = []
    for token, number in tokens.items():
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        cuts += [(-float(scores[number]), -len(a), -len(b), number, a, b) for a, b in halves
                 if a in tokens and b in tokens]
    cuts.sort(key=lambda c: c[:4])
    return [[a, b] for *_, a, b in cuts]
