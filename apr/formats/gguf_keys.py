"""A model's configuration and tokenizer as the metadata of a GGUF file, complete for llama.cpp.

What GGUF has no way to say is refused, or named in the facts where it does not change what the model computes.

SOURCE  llama.cpp: convert_hf_to_gguf.py (keys, token types, padding tokens), src/llama-vocab.cpp (defaults).
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers

from apr.config import END_OF_TEXT, TransformerConfig
from apr.errors import FormatError
from apr.formats.gguf_model import (
    EPS,
    KEY,
    KV_HEADS,
    MODEL_TYPE,
    ORIGINAL,
    ROTATED,
    SIZES,
    THETA,
    VALUE,
    VOCABULARY,
)
from apr.formats.gguf_names import ARCHITECTURES, rope_factors, scaling_of
from apr.formats.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPLITTINGS,
    SPM_SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    merges_of_scores,
)
from apr.formats.source import ModelSource
from apr.strict import parse_json

QUANTIZATION_VERSION = 2
NO_PLACE = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")  # GGUF's tokens say the same
SAID = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}
Keys = dict[str, Any]


def config_keys(config: TransformerConfig, where: str) -> Keys:
    """The keys of the architecture. Raises FormatError for a rope scaling that the file could not give back."""
    arch = ARCHITECTURES[config.hf_model_type]
    out: Keys = {"general.architecture": arch}
    out |= {f"{arch}.{key}": getattr(config, name) for key, name in SIZES.items()}
    out |= {f"{arch}.{KV_HEADS}": config.NKV, f"{arch}.{KEY}": config.HS, f"{arch}.{VALUE}": config.HS,
            f"{arch}.{ROTATED}": config.HS, f"{arch}.{EPS}": float(config.rms_norm_eps),
            f"{arch}.{THETA}": float(config.rope_theta), f"{arch}.{VOCABULARY}": config.V}
    if config.hf_model_type != arch:
        out[MODEL_TYPE] = config.hf_model_type
    if (scaling := config.rope_scaling) is not None:
        factors = rope_factors(scaling, config.rope_theta, config.HS)
        original = scaling.original_max_position_embeddings
        if scaling_of(factors, config.rope_theta, config.HS, original) != scaling:
            raise FormatError(f"{where}: rope_scaling", "Llama 3's, with low_freq_factor 1 and high_freq_factor 4",
                              f"{scaling}", "GGUF cannot say it; export to another format")
        out[f"{arch}.{ORIGINAL}"] = original
    return out


def text_keys(source: ModelSource) -> tuple[Keys, list[str]]:
    """The keys of tokenizer, special ids and chat template, and what of the source's text files has no place in GGUF.

    Raises FormatError for a tokenizer that GGUF cannot say, and for one without an end of text.
    """
    where, facts = str(source.path), []
    left = [name for name in NO_PLACE if name in source.assets]
    if left:
        facts.append("said by the tokens: " + ", ".join(left))
    generation = _object(source, "generation_config.json")
    if more := sorted(generation.keys() - SAID):
        facts.append("not in GGUF: generation_config.json's " + ", ".join(more))
    if "tokenizer.json" not in source.assets:
        if "vocab.json" in source.assets:
            raise FormatError(f"{where}: tokenizer", "a tokenizer.json", "vocab.json", "load it with transformers, "
                              "which writes one")
        return {"tokenizer.ggml.model": "no_vocab"}, [*facts, "no tokenizer: llama.cpp will want token ids"]
    inner = load(source.assets["tokenizer.json"], where)
    out = _tokenizer_keys(inner, source.config.V, f"{where}: tokenizer.json")
    settings = _object(source, "tokenizer_config.json")
    out |= _special_keys(source, inner, generation, settings, where)
    template = chat_template(source)
    if template is not None:
        out["tokenizer.chat_template"] = template
    if isinstance(settings.get("chat_template"), list) and len(settings["chat_template"]) > 1:
        facts.append("not in GGUF: the chat templates other than 'default'")
    return out, facts


def chat_template(source: ModelSource) -> str | None:
    """The source's chat template: that of its own file, or of tokenizer_config.json."""
    if "chat_template.jinja" in source.assets:
        return source.assets["chat_template.jinja"]
    found = _object(source, "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}.get("default")
    return found if isinstance(found, str) else None


def end_ids(source: ModelSource) -> list[int]:
    """The ids that end a text, as the source says them; by the names of its tokens where it does not say."""
    said = _object(source, "generation_config.json").get("eos_token_id", source.hf_config.get("eos_token_id"))
    if said is None and "tokenizer.json" in source.assets:
        inner = load(source.assets["tokenizer.json"], str(source.path))
        named = _object(source, "tokenizer_config.json").get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        said = next((inner.token_to_id(t) for t in (named, *END_OF_TEXT)
                     if isinstance(t, str) and inner.token_to_id(t) is not None), None)
    out = said if isinstance(said, list) else [said] if said is not None else []
    if not all(type(i) is int and 0 <= i < source.config.V for i in out):
        raise FormatError(f"{source.path}: eos_token_id", f"ids below {source.config.V}", f"{out}"[:60],
                          "correct generation_config.json")
    return list(dict.fromkeys(out))


def load(text: str, where: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json. Raises FormatError for whatever the library raises."""
    try:
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # bare Exception, and PanicException from Rust
        raise FormatError(f"{where}: tokenizer.json", "a tokenizer.json", str(e)[:160],
                          "give what the tokenizers library wrote") from None


def _object(source: ModelSource, name: str) -> dict[str, Any]:
    """The object of a small text file, {} if the source has none."""
    if name not in source.assets:
        return {}
    value = parse_json(source.assets[name].encode(), f"{source.path}: {name}")
    if not isinstance(value, dict):
        raise FormatError(f"{source.path}: {name}", "an object", type(value).__name__, "correct the file")
    return value


def _special_keys(source: ModelSource, inner: tokenizers.Tokenizer, generation: dict[str, Any],
                  settings: dict[str, Any], where: str) -> Keys:
    ends = end_ids(source)
    last = [i for i in ends[1:] if inner.id_to_token(i) == "<|eom_id|>"]
    turn = [i for i in ends[1:] if i not in last]
    if not ends or len(turn) > 1:  # llama.cpp would take token 11 for the end
        raise FormatError(f"{where}: eos_token_id", "one to three ids that end a text", f"{ends}"[:60],
                          "name them in generation_config.json")
    out: Keys = {"tokenizer.ggml.eos_token_id": ends[0]}
    out |= {f"tokenizer.ggml.{n}_token_id": ids[0] for n, ids in (("eot", turn), ("eom", last)) if ids}
    for name, key in (("bos", "bos"), ("pad", "padding")):
        text = settings.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        value = generation.get(f"{name}_token_id", source.hf_config.get(f"{name}_token_id"))
        value = inner.token_to_id(text) if value is None and isinstance(text, str) else value
        if value is not None:
            if type(value) is not int or not 0 <= value < source.config.V:
                raise FormatError(f"{where}: {name}_token_id", f"an id below {source.config.V}", repr(value)[:60],
                                  "correct generation_config.json")
            out[f"tokenizer.ggml.{key}_token_id"] = value
    first = inner.encode("", add_special_tokens=True).ids
    if len(first) > 1 or (first and out.setdefault("tokenizer.ggml.bos_token_id", first[0]) != first[0]):
        raise FormatError(f"{where}: tokenizer.json", "nothing, or the bos token alone, put before a text", f"{first}",
                          "GGUF cannot say it")
    return {**out, "tokenizer.ggml.add_bos_token": bool(first), "tokenizer.ggml.add_eos_token": False}


def _tokenizer_keys(inner: tokenizers.Tokenizer, vocabulary: int, where: str) -> Keys:
    parts = json.loads(inner.to_str())
    model, added = parts["model"], parts["added_tokens"]
    if model["type"] != "BPE" or model["dropout"] or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise FormatError(where, "plain BPE", model["type"], "GGUF cannot say it")
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise FormatError(f"{where}: token {token['content']!r}"[:200], "no lstrip, rstrip or single_word", "one",
                              "GGUF cannot say it")
    byte_fallback = bool(model["byte_fallback"])
    ids = inner.get_vocab(with_added_tokens=True)
    if max(ids.values(), default=0) >= vocabulary:
        raise FormatError(where, f"ids below vocab_size {vocabulary}", f"{max(ids.values())}",
                          "the tokenizer is of another model")
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = np.full(vocabulary, UNUSED, np.int32)
    for text, i in ids.items():
        tokens[i], types[i] = text, NORMAL
        if byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            types[i] = BYTE
    for token in added:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if byte_fallback and model["unk_token"] in ids:
        types[ids[model["unk_token"]]] = UNKNOWN
    if len(set(tokens)) != vocabulary or "" in tokens:
        raise FormatError(where, "tokens that are all different, none empty", "others", "GGUF cannot say it")
    out: Keys = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    if byte_fallback:
        return out | _spm_keys(parts, merges, {t: i for t, i in ids.items() if types[i] == NORMAL}, vocabulary, where)
    if any(" " in half for pair in merges for half in pair):
        raise FormatError(f"{where}: merges", "tokens without spaces (byte-level)", "others", "GGUF cannot say it")
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _splitting(parts, where), **out,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in merges]}


def _splitting(parts: dict[str, Any], where: str) -> str:
    """The name of the tokenizer's way to split text."""
    normalizers = [n["type"] for n in _flat(parts["normalizer"], "normalizers")]
    found = [_plain(p) for p in _flat(parts["pre_tokenizer"], "pretokenizers")]
    for name, known in SPLITTINGS.items():
        if (found == [_plain(p) for p in _flat(known.pre_tokenizer, "pretokenizers")]
                and normalizers == ["NFC"] * known.nfc and bool(parts["model"]["ignore_merges"]) == known.ignore_merges
                and (parts["decoder"] or {}).get("type") == "ByteLevel"):
            return name
    raise FormatError(f"{where}: normalizer, pre_tokenizer, ignore_merges and decoder",
                      "those of one of " + ", ".join(SPLITTINGS),
                      f"{normalizers}, {json.dumps(found)[:120]}, {parts['model']['ignore_merges']}",
                      "GGUF names how text is split; it cannot hold a pattern")


def _flat(part: Any, inside: str) -> Iterator[dict[str, Any]]:
    if part is not None:
        yield from part[inside] if part["type"] == "Sequence" else [part]


def _plain(part: dict[str, Any]) -> dict[str, Any]:
    """Without what only changes offsets."""
    return {key: value for key, value in part.items() if key != "trim_offsets"}


def _spm_keys(parts: dict[str, Any], merges: list[list[str]], normal: dict[str, int], vocabulary: int,
              where: str) -> Keys:
    """SentencePiece keeps scores, not merges: these are the ranks, if they give the same merges back."""
    scores = np.full(vocabulary, -len(merges) - 1, np.float32)
    for rank, (a, b) in reversed(list(enumerate(merges))):
        if a + b in normal:
            scores[normal[a + b]] = -rank
    kinds = [n["type"] for n in _flat(parts["normalizer"], "normalizers")]
    metaspace = parts["pre_tokenizer"] or {}
    scheme = metaspace.get("prepend_scheme") if metaspace.get("type") == "Metaspace" else None
    prefix = "Prepend" in kinds or scheme in ("first", "always")
    plain = kinds in (["Prepend", "Replace"], ["Replace"]) and not metaspace
    spaces = not kinds and scheme is not None and not metaspace.get("split", True)
    if not (plain or spaces) or SPM_SPACE not in json.dumps(parts["normalizer"] or metaspace, ensure_ascii=False):
        raise FormatError(f"{where}: normalizer and pre_tokenizer", "SentencePiece's: spaces become \u2581",
                          f"{kinds}, {metaspace.get('type')}", "GGUF cannot say it")
    if merges_of_scores(normal, scores) != merges:
        raise FormatError(f"{where}: merges", "those that follow from scores", "others", "GGUF cannot say it")
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": prefix}
