"""A model in one GGUF file: what llama.cpp runs. Names and layouts become Hugging Face's, values stay as stored.

The configuration comes from the metadata of the file and is never guessed: a missing eps or theta is an error, and so
is a key of the architecture that is not understood here.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from apr.config import FAMILIES, TransformerConfig, decode
from apr.errors import FormatError
from apr.formats.gguf_file import GgufFile, open_gguf
from apr.formats.gguf_names import (
    ARCHITECTURES,
    ORIGINAL_CONTEXT,
    ROPE_FREQS,
    hf_name,
    one_of,
    permuted_heads,
    scaling_of,
    shortest,
    shown,
    split_half_rows,
)
from apr.formats.gguf_tokenizer import GgufTokenizer, read_tokenizer, special_id
from apr.formats.source import ModelSource
from apr.hf_config import to_hf

MODEL_TYPE = "apr.model_type"  # which family of Hugging Face's, where GGUF's architecture stands for more than one
SIZES = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size",
         "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
         "context_length": "max_position_embeddings"}
EPS, THETA, KV_HEADS = "attention.layer_norm_rms_epsilon", "rope.freq_base", "attention.head_count_kv"
KEY, VALUE, ROTATED, WINDOW = ("attention.key_length", "attention.value_length", "rope.dimension_count",
                               "attention.sliding_window")
ORIGINAL, SCALING, VOCABULARY = "rope.scaling.original_context_length", "rope.scaling.type", "vocab_size"
# Keys that are allowed only with a value that means "nothing special".
ONLY: dict[str, tuple[Any, ...]] = {
    SCALING: ("none",), "rope.scaling.factor": (1.0,), "rope.scale_linear": (1.0,), "expert_count": (0,),
    "expert_used_count": (0,), "attention.causal": (True,), "use_parallel_residual": (False,),
    "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,), "logit_scale": (1.0,),
    "residual_scale": (1.0,), "embedding_scale": (1.0,), "rope.scaling.attn_factor": (1.0,)}
KNOWN = {*SIZES, EPS, THETA, KV_HEADS, KEY, VALUE, ROTATED, WINDOW, ORIGINAL, VOCABULARY, *ONLY,
         "rope.scaling.finetuned", "tensor_data_layout"}
END_IDS = ("eos", "eot", "eom")


def open_gguf_model(path: Path) -> ModelSource:
    """A model of the families llama (mistral, smollm), qwen2 or qwen3.

    Raises NotFoundError, StorageError, FormatError naming the key, tensor or type, ConfigError for impossible sizes.
    """
    opened = open_gguf(path)
    try:
        return _source(path, opened)
    except BaseException:
        opened.close()
        raise


def _source(path: Path, opened: GgufFile) -> ModelSource:
    where, metadata = str(path), opened.metadata
    config, facts = gguf_config(opened, where)
    tokenizer = read_tokenizer(metadata, where)
    if tokenizer.json is not None and len(tokenizer.tokens) != config.V:
        raise FormatError(f"{where}: tokenizer.ggml.tokens", f"{config.V} tokens, the rows of token_embd.weight",
                          f"{len(tokenizer.tokens)}", "the file contradicts itself")
    assets, ids = _assets(metadata, tokenizer, config.V, where)
    names: dict[str, str] = {}
    for name in opened.entries:
        if name == ROPE_FREQS:
            continue
        known = hf_name(name)
        if known is None:
            raise FormatError(f"{where}: tensor '{name}'", "a tensor of these families", "an unknown name",
                              "give a model that apr computes")
        names[known] = name
    kinds = Counter(opened.entries[name].type for name in names.values())
    facts += [f"stored as {kind}: {count} tensors" for kind, count in sorted(kinds.items())]
    if any(permuted_heads(name, config) for name in names):
        facts.append("q, k rows reordered from adjacent to split-half pairs")
    facts.append("head tied to the embedding: no output.weight" if config.tie_word_embeddings
                 else "head of its own: output.weight")
    facts.append(tokenizer.about)

    def read(name: str) -> np.ndarray:
        array = opened.read(names[name])
        heads = permuted_heads(name, config)
        return split_half_rows(array, heads) if heads else array

    return ModelSource(path, "gguf", config, {**to_hf(config), **ids}, assets,
                       {known: opened.entries[name].shape for known, name in names.items()},
                       {known: opened.entries[name].type for known, name in names.items()}, read, opened.close,
                       tuple(facts))


def gguf_config(opened: GgufFile, where: str) -> tuple[TransformerConfig, list[str]]:
    """The configuration that a file's metadata and its tensors' shapes say, and what was understood from where."""
    metadata, facts = opened.metadata, []
    arch = metadata.get("general.architecture")
    family = metadata.get(MODEL_TYPE, arch)
    if not isinstance(family, str) or family not in FAMILIES or not one_of(arch, ARCHITECTURES[family]):
        raise FormatError(f"{where}: general.architecture", "one of " + ", ".join(sorted(set(ARCHITECTURES.values()))),
                          shown(arch), "give a model that apr computes")
    if not one_of(metadata.get("split.count", 1), 0, 1) or not one_of(metadata.get("general.type", "model"), "model"):
        raise FormatError(where, "one whole model", "a part of one, or another kind of file",
                          "join it with llama-gguf-split --merge")
    own = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    _check_own(own, f"{where}: {arch}")

    def take(key: str, kind: type) -> Any:
        if type(own.get(key)) is not kind:
            raise FormatError(f"{where}: {arch}.{key}", f"a value of type {kind.__name__}", shown(own.get(key)),
                              "it changes what the model computes; convert the model again")
        return shortest(own[key]) if kind is float else own[key]

    values: dict[str, Any] = {name: take(key, int) for key, name in SIZES.items()}
    facts += [f"{name} {values[name]} from {arch}.{key}" for key, name in SIZES.items()]
    eps, theta = take(EPS, float), take(THETA, float)
    facts += [f"rms_norm_eps {eps:g} from {arch}.{EPS}", f"rope_theta {theta:g} from {arch}.{THETA}"]
    heads, width = values["num_attention_heads"], values["hidden_size"]
    head_dim = take(KEY, int) if KEY in own else width // heads if heads and width % heads == 0 else 0
    for key in (VALUE, ROTATED):
        if not one_of(own.get(key, head_dim), head_dim):
            raise FormatError(f"{where}: {arch}.{key}", f"{head_dim}, the size of a head", shown(own[key]),
                              "this feature is not implemented")
    if WINDOW in own and take(WINDOW, int):  # within it the model is fully causal; longer inputs are refused
        values["max_position_embeddings"] = min(values["max_position_embeddings"], own[WINDOW])
    embed = opened.entries.get("token_embd.weight")
    if embed is None or not one_of(own.get(VOCABULARY, embed.shape[0]), embed.shape[0]):
        raise FormatError(f"{where}: {arch}.{VOCABULARY}", "the rows of token_embd.weight",
                          "no such tensor" if embed is None else f"{embed.shape[0]} against {shown(own[VOCABULARY])}",
                          "the file contradicts itself")
    facts.append(f"vocab_size {embed.shape[0]} from the rows of token_embd.weight")
    values.update(
        num_key_value_heads=take(KV_HEADS, int) if KV_HEADS in own or arch != "llama" else heads,
        head_dim=head_dim, rms_norm_eps=eps, rope_theta=theta, rope_scaling=None, vocab_size=embed.shape[0],
        use_bias=family == "qwen2", qk_norm=family == "qwen3",
        tie_word_embeddings="output.weight" not in opened.entries, architecture="decoder",
        hf_architecture=FAMILIES[family], hf_model_type=family)
    plain = decode(TransformerConfig, values, where)  # which checks the sizes before they are used in arithmetic
    if len(opened.entries) < plain.L:  # before anything is made for each layer that a small file claims
        raise FormatError(f"{where}: {arch}.block_count", f"at most {len(opened.entries)}, the number of tensors",
                          f"{plain.L}", "the file contradicts itself")
    return _scaled(plain, opened, own.get(ORIGINAL, ORIGINAL_CONTEXT), where, facts), facts


def _check_own(own: Mapping[str, Any], where: str) -> None:
    for key, value in own.items():
        if key not in KNOWN:
            raise FormatError(f"{where}.{key[:80]}", "a key that apr understands", "an unknown key",
                              "this feature is not implemented")
        if key in ONLY and not one_of(value, *ONLY[key]):
            raise FormatError(f"{where}.{key}", f"{ONLY[key][0]!r}", shown(value),
                              "this feature is not implemented")


def _scaled(config: TransformerConfig, opened: GgufFile, original: Any, where: str,
            facts: list[str]) -> TransformerConfig:
    """The configuration with Llama 3's rope scaling, if the file has the factors of one."""
    if ROPE_FREQS not in opened.entries:
        return config

    def refuse(found: str) -> NoReturn:
        raise FormatError(f"{where}: tensor '{ROPE_FREQS}'", f"F32 factors [{config.HS // 2}] of Llama 3's scaling",
                          found, "this rope scaling is not implemented")

    entry = opened.entries[ROPE_FREQS]
    if entry.type != "F32" or entry.shape != (config.HS // 2,) or type(original) is not int or not 0 < original < 2**31:
        refuse(f"{entry.type} {list(entry.shape)}, original context {shown(original)}")
    factors = opened.read(ROPE_FREQS)
    if not np.isfinite(factors).all():
        refuse("numbers that are not finite")
    scaling = scaling_of(factors, config.rope_theta, config.HS, original)
    if scaling is None:
        refuse(f"others, up to {factors.max():g}")
    facts.append(f"rope_scaling llama3, factor {scaling.factor:g} from {ROPE_FREQS}")
    values = {**{f: getattr(config, f) for f in config.__dataclass_fields__}, "rope_scaling": scaling}
    return TransformerConfig(**values)


def _assets(metadata: Mapping[str, Any], tokenizer: GgufTokenizer, vocabulary: int,
            where: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The text files that a Hugging Face folder of this model would hold, and the ids for its config.json."""
    count = len(tokenizer.tokens) or vocabulary
    ends = [special_id(metadata, name, count, where) for name in END_IDS]
    ids: dict[str, Any] = {"bos_token_id": special_id(metadata, "bos", count, where),
                           "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)),
                           "pad_token_id": special_id(metadata, "padding", count, where)}
    ids = {key: value for key, value in ids.items() if value not in (None, [])}
    assets = {"generation_config.json": json.dumps(ids)} if ids else {}
    if tokenizer.json is not None:
        assets["tokenizer.json"] = tokenizer.json
        named = {"bos_token": ids.get("bos_token_id"), "eos_token": ends[0], "pad_token": ids.get("pad_token_id")}
        assets["tokenizer_config.json"] = json.dumps(
            {**{name: tokenizer.tokens[i] for name, i in named.items() if i is not None},
             "add_bos_token": tokenizer.add_bos, "tokenizer_class": "PreTrainedTokenizerFast"}, ensure_ascii=False)
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        if not isinstance(template, str):
            raise FormatError(f"{where}: tokenizer.chat_template", "a text", type(template).__name__,
                              "write the file again")
        assets["chat_template.jinja"] = template
    return assets, ids
