"""Hugging Face `config.json` to TransformerConfig and back, for the decoder families that apr computes.

Reads transformers v4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and v5 (`rope_parameters`, `dtype`) spellings. What
a model computes is never guessed: a missing theta or eps is an error, and so is a key that is neither understood nor on
the list of keys known not to matter.
"""

from typing import Any

from apr.config import FAMILIES, RopeScaling, TransformerConfig, decode
from apr.errors import ConfigError, did_you_mean

ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta", "deberta-v2", "albert", "modernbert")


SAME_NAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
# Keys that are allowed only with the value that means "nothing special".
ONLY = {"hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None),
        "attention_dropout": (0, None), "pretraining_tp": (1,), "rope_interleaved": (False,),
        "quantization_config": (None,), "use_sliding_window": (False, None), "use_mrope": (False, None),
        "is_encoder_decoder": (False,), "add_cross_attention": (False,), "partial_rotary_factor": (1, None)}
# Keys that do not change what is computed here: bookkeeping, tokens of generation, training history.
IGNORED = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id",
           "eos_token_id", "pad_token_id", "initializer_range", "max_window_layers", "_name_or_path",
           "_attn_implementation_autoset", "return_dict", "output_attentions", "output_hidden_states",
           "is_llama_config", "transformers.js_config", "id2label", "label2id", "problem_type",
           "chunk_size_feed_forward", "is_decoder", "unk_token_id", "sep_token_id", "attn_implementation",
           "tokenizer_class", "unsloth_version", "unsloth_fixed"}
STORED_AS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # the type of the weights, which loaders go by
SPECIAL = {"rope_theta", "rope_scaling", "rope_parameters", "num_key_value_heads", "head_dim", "sliding_window",
           "layer_types"}


def from_hf(values: Any, where: str) -> TransformerConfig:
    """The config that a `config.json` describes; `where` is the file's name, for messages.

    Raises ConfigError: encoder family (ARCH-007), unknown family, unknown or missing key, a feature that apr lacks.
    """
    if not isinstance(values, dict):
        raise ConfigError(where, "a JSON object", type(values).__name__, "give the model's config.json")
    family = values.get("model_type")
    if family in ENCODERS:
        raise ConfigError(f"{where}: model_type", "a decoder family (ARCH-007)", f"'{family}', an encoder",
                          "give a decoder model")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"{where}: model_type", "one of " + ", ".join(FAMILIES), repr(family)[:60],
                          "give a model of these families")
    _check_keys(values, where)
    heads, width = _need(values, "num_attention_heads", where), _need(values, "hidden_size", where)
    theta, scaling = _rope(values, where)
    out = {key: _need(values, key, where) for key in SAME_NAME}
    out.update(
        num_key_value_heads=_kv_heads(values, family, heads, where),
        head_dim=_head_dim(values, family, heads, width, where),
        rope_theta=theta, rope_scaling=scaling, use_bias=family == "qwen2", qk_norm=family == "qwen3",
        architecture="decoder", hf_architecture=FAMILIES[family], hf_model_type=family)
    window = values.get("sliding_window")
    if window is not None and (family == "mistral" or values.get("use_sliding_window")):
        # Within the window the model is fully causal, which is what apr computes; longer inputs are refused.
        if type(window) is not int or type(out["max_position_embeddings"]) is not int:
            raise ConfigError(f"{where}: sliding_window", "a whole number", repr(window)[:60], "correct the file")
        out["max_position_embeddings"] = min(out["max_position_embeddings"], window)
    return decode(TransformerConfig, out, where)


def to_hf(config: TransformerConfig) -> dict[str, Any]:
    """A `config.json` that transformers v4 and v5 both read as this model."""
    out: dict[str, Any] = {key: getattr(config, key) for key in SAME_NAME}
    out.update(architectures=[config.hf_architecture], model_type=config.hf_model_type, hidden_act="silu",
               head_dim=config.head_dim, num_key_value_heads=config.num_key_value_heads, rope_theta=config.rope_theta,
               torch_dtype="float32")
    if config.hf_model_type == "mistral":
        out["sliding_window"] = None
    if config.rope_scaling is not None:
        s = config.rope_scaling
        out["rope_scaling"] = {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
                               "high_freq_factor": s.high_freq_factor,
                               "original_max_position_embeddings": s.original_max_position_embeddings}
    return out


def with_dtype(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json whose weights are stored as `dtype` (F32, F16, BF16); the other keys as they are."""
    return {key: STORED_AS[dtype] if key in ("dtype", "torch_dtype") else value for key, value in values.items()}


def config_facts(values: dict[str, Any], config: TransformerConfig) -> list[str]:
    """What from_hf read out of a config.json where there was a choice, and from where: one line each, for people."""
    def origin(key: str, otherwise: str) -> str:
        return "from config.json" if values.get(key) is not None else otherwise

    nested = (values.get("rope_parameters") or {}).get("rope_theta") is not None
    heads = f"{config.NH} query heads"
    facts = [f"family {config.hf_model_type} from model_type",
             f"rope_theta {config.rope_theta:.12g} from {'rope_parameters' if nested else 'config.json'}",
             f"rms_norm_eps {config.rms_norm_eps:.12g} from config.json",
             f"head_dim {config.HS} {origin('head_dim', 'as hidden_size / num_attention_heads')}",
             f"{heads}, {config.NKV} of keys and values {origin('num_key_value_heads', 'as num_attention_heads')}"]
    if config.rope_scaling is not None:
        facts.append(f"rope scaling llama3, factor {config.rope_scaling.factor:.12g}, from "
                     f"{'rope_scaling' if values.get('rope_scaling') is not None else 'rope_parameters'}")
    if config.max_position_embeddings != values["max_position_embeddings"]:
        facts.append(f"at most {config.max_position_embeddings} positions from sliding_window, not "
                     f"{values['max_position_embeddings']} from max_position_embeddings")
    return facts


def _need(values: dict[str, Any], key: str, where: str) -> Any:
    if values.get(key) is None:
        raise ConfigError(f"{where}: {key}", "a value (it changes what the model computes)", "nothing",
                          f"add '{key}' to the file")
    return values[key]


def _check_keys(values: dict[str, Any], where: str) -> None:
    known = {*SAME_NAME, *ONLY, *IGNORED, *SPECIAL}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{where}: key '{key[:40]}'", "a key that apr understands", "an unknown key",
                              did_you_mean(key[:40], known))
        if key in ONLY and value not in ONLY[key]:
            raise ConfigError(f"{where}: {key}", f"{ONLY[key][0]!r}", repr(value)[:60],
                              "this feature is not implemented")
    _need(values, "hidden_act", where)
    kinds = values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError(f"{where}: layer_types", "'full_attention' only", repr(kinds)[:60],
                          "this feature is not implemented")


def _kv_heads(values: dict[str, Any], family: str, heads: int, where: str) -> int:
    """Absent, it means one per query head in the first Llamas; other families' defaults differ, so they must say."""
    if family == "llama" and values.get("num_key_value_heads") is None:
        return heads
    return _need(values, "num_key_value_heads", where)


def _head_dim(values: dict[str, Any], family: str, heads: Any, width: Any, where: str) -> int:
    """Absent, it is hidden_size / num_attention_heads by definition; not in Qwen3, whose heads are wider."""
    if values.get("head_dim") is not None or family == "qwen3":
        return _need(values, "head_dim", where)
    if type(heads) is not int or type(width) is not int or heads < 1 or width % heads:
        raise ConfigError(f"{where}: hidden_size", f"a multiple of num_attention_heads ({heads!r})", f"{width!r}",
                          "add 'head_dim'")
    return width // heads


def _rope(values: dict[str, Any], where: str) -> tuple[Any, dict[str, Any] | None]:
    """Theta and scaling from whichever spelling is there; two that disagree are an error."""
    v5 = values.get("rope_parameters")
    if v5 is not None and not isinstance(v5, dict):
        raise ConfigError(f"{where}: rope_parameters", "an object", type(v5).__name__, "correct the file")
    theta, nested = values.get("rope_theta"), (v5 or {}).get("rope_theta")
    if theta is None and nested is None:
        raise ConfigError(f"{where}: rope_theta", "'rope_theta' or 'rope_parameters.rope_theta'", "neither",
                          "add it: a wrong theta is a different model")
    if theta is not None and nested is not None and theta != nested:
        raise ConfigError(f"{where}: rope_theta", "the same value in both spellings", f"{theta!r} and {nested!r}",
                          "remove one")
    used, scaling = theta if nested is None else nested, values.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_theta", used) != used:
        raise ConfigError(f"{where}: rope_scaling.rope_theta", f"rope_theta's {used!r}", f"{scaling['rope_theta']!r}",
                          "remove one")
    scalings = [_scaling(s, where) for s in (values.get("rope_scaling"), v5) if s is not None]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise ConfigError(f"{where}: rope_scaling", "the same scaling in both spellings", "two that differ",
                          "remove one")
    return used, scalings[0] if scalings else None


def _scaling(values: Any, where: str) -> dict[str, Any] | None:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: rope_scaling", "an object", type(values).__name__, "correct the file")
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("type", kind) != kind:
        raise ConfigError(f"{where}: rope_scaling", "the same rope_type and type", f"{kind!r} and {values['type']!r}",
                          "remove one")
    rest = {k: v for k, v in values.items() if k not in ("rope_type", "type", "rope_theta")}
    if kind == "default":
        if rest:
            raise ConfigError(f"{where}: rope_scaling", "no parameters for rope_type 'default'", ", ".join(rest),
                              "remove them")
        return None
    if kind != "llama3":
        raise ConfigError(f"{where}: rope_type", "'default' or 'llama3'", repr(kind), "this feature is not implemented")
    names = set(RopeScaling.__dataclass_fields__)
    if set(rest) != names:
        raise ConfigError(f"{where}: rope_scaling", ", ".join(sorted(names)), ", ".join(sorted(rest)),
                          "give exactly these")
    return rest
