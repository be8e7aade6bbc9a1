"""For the fuzzer: what a valid JSON text, config.json, --config file and run.json is and means, a second time.

Each takes the bytes of a file and gives what they mean; an exception of INVALID for any breach of the rules, which are
those of docs/pretrain.md, of docs/formats.md and of the docstrings.
"""

import json
import math
import re
import struct
from dataclasses import asdict

import yaml
from oracles import require

from apr.presets import PRESETS

INVALID = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError, struct.error,
           yaml.YAMLError)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings")
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
           "qwen3": "Qwen3ForCausalLM"}
PLAIN = {"hidden_act": ["silu"], "attention_bias": [False, None], "mlp_bias": [False, None], "pretraining_tp": [1],
         "attention_dropout": [0, None], "rope_interleaved": [False], "quantization_config": [None],
         "use_sliding_window": [False, None], "use_mrope": [False, None], "is_encoder_decoder": [False],
         "add_cross_attention": [False], "partial_rotary_factor": [1, None]}
HARMLESS = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id",
            "eos_token_id", "pad_token_id", "initializer_range", "max_window_layers", "_name_or_path",
            "_attn_implementation_autoset", "return_dict", "output_attentions", "output_hidden_states",
            "is_llama_config", "transformers.js_config", "id2label", "label2id", "problem_type",
            "chunk_size_feed_forward", "is_decoder", "unk_token_id", "sep_token_id", "attn_implementation",
            "tokenizer_class", "unsloth_version", "unsloth_fixed"}
ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def whole(value, low=1, high=math.inf):
    """A whole number of a range; no bool and no 1.0."""
    require(type(value) is int and low <= value <= high, f"no whole number from {low}: {value!r}")
    return value


def real(value):
    """A number as a float."""
    require(type(value) in (int, float), f"no number: {value!r}")
    return float(value)


def strict(value, of):
    """A value of a type."""
    require(type(value) is of, f"not {of.__name__}: {value!r}")
    return value


def bounded(value):
    """A value at most 64 levels deep, of finite numbers and of texts that can be written."""
    rest, marks = [(value, 0)], 0
    while rest:
        item, depth = rest.pop()
        require(depth <= 64, "too deep")
        if isinstance(item, str):
            item.encode()
        elif isinstance(item, float):
            require(math.isfinite(item), "not finite")
        elif isinstance(item, dict | list):
            marks += 1 + max(len(item) - 1, 0)
            inner = [x for pair in item.items() for x in pair] if isinstance(item, dict) else item
            rest += [(x, depth + 1) for x in inner]
    require(marks <= 2**18, "too many values")
    return value


def json_value(data):
    """The value of a JSON text."""
    def once(pairs):
        require(len({k for k, _ in pairs}) == len(pairs), "a key twice")
        return dict(pairs)

    def constant(name):
        raise ValueError(name)

    return bounded(json.loads(data.decode(), object_pairs_hook=once, parse_constant=constant))


def model(values):
    """The fields of a model: exactly these, each in its range, and fitting each other."""
    require(values.keys() == {*SIZES, "rms_norm_eps", "rope_theta", "rope_scaling", "use_bias", "qk_norm",
                              "architecture", "tie_word_embeddings", "hf_architecture", "hf_model_type"}, "keys")
    for key in SIZES:
        whole(values[key], 1, 2**31 - 1)
    family, eps, theta = values["hf_model_type"], real(values["rms_norm_eps"]), real(values["rope_theta"])
    require(values["num_hidden_layers"] <= 10_000 and values["head_dim"] % 2 == 0, "layers, head_dim")
    require(values["num_attention_heads"] % values["num_key_value_heads"] == 0, "groups")
    require(0 < eps <= 1e-2 and 1 < theta < math.inf, "eps, theta")
    require((values["architecture"], values["hf_architecture"]) == ("decoder", CLASSES[family]), "architecture")
    require(strict(values["use_bias"], bool) == (family == "qwen2"), "bias")
    require(strict(values["qk_norm"], bool) == (family == "qwen3"), "norm of the heads")
    strict(values["tie_word_embeddings"], bool)
    scaling = values["rope_scaling"]
    if scaling is not None:
        require(scaling.keys() == ROPE, "keys of the scaling")
        whole(scaling["original_max_position_embeddings"])
        scaling = {k: v if k.startswith("original") else real(v) for k, v in scaling.items()}
        require(scaling["factor"] >= 1 and 0 < scaling["low_freq_factor"] < scaling["high_freq_factor"], "factors")
    return {**values, "rms_norm_eps": eps, "rope_theta": theta, "rope_scaling": scaling}


def config(data):
    """The model of a config.json: nothing guessed, nothing contradicting itself, no key that might mean something."""
    values = json_value(data)
    family = values["model_type"]
    known = {*SIZES, *PLAIN, *HARMLESS, "rms_norm_eps", "tie_word_embeddings", "rope_theta", "rope_scaling",
             "rope_parameters", "sliding_window", "layer_types"}
    require(family in CLASSES and values.keys() <= known and values["hidden_act"] is not None, "keys")
    require(all(values[key] in allowed for key, allowed in PLAIN.items() if key in values), "what apr does not compute")
    layers = values.get("layer_types")
    require(layers is None or set(strict(layers, list)) <= {"full_attention"}, "layer_types")
    heads, groups = whole(values["num_attention_heads"]), values.get("num_key_value_heads")
    size = values.get("head_dim")
    if size is None:
        require(family != "qwen3" and whole(values["hidden_size"]) % heads == 0, "head_dim")
        size = values["hidden_size"] // heads
    if groups is None:
        require(family == "llama", "num_key_value_heads")
        groups = heads
    tables = [values[key] for key in ("rope_scaling", "rope_parameters") if values.get(key) is not None]
    thetas = [t["rope_theta"] for t in (values, *tables) if t.get("rope_theta") is not None]
    require(all(real(t) == real(thetas[0]) for t in thetas), "one theta")
    require(values.get("rope_theta") is not None or "rope_theta" in (values.get("rope_parameters") or {}), "a theta")
    scalings = [rope_table(t) for t in tables]
    require(all(s == scalings[0] for s in scalings), "one scaling")
    out = {key: values[key] for key in SIZES if key in values} | {
        "rms_norm_eps": values["rms_norm_eps"], "tie_word_embeddings": values["tie_word_embeddings"],
        "num_key_value_heads": groups, "head_dim": size, "rope_theta": thetas[0], "hf_model_type": family,
        "rope_scaling": scalings[0] if scalings else None, "use_bias": family == "qwen2", "qk_norm": family == "qwen3",
        "architecture": "decoder", "hf_architecture": CLASSES[family]}
    out = model(out)
    if family == "mistral" and values.get("sliding_window") is not None:
        out["max_position_embeddings"] = min(out["max_position_embeddings"], whole(values["sliding_window"]))
    return out


def rope_table(table):
    """The scaling of rope_scaling or rope_parameters, None for none."""
    kinds = [table[key] for key in ("rope_type", "type") if key in table] or ["default"]
    rest = {k: v for k, v in table.items() if k not in ("rope_type", "type", "rope_theta")}
    require(all(kind == kinds[0] for kind in kinds) and kinds[0] in ("default", "llama3"), "one type")
    require(rest.keys() == (ROPE if kinds[0] == "llama3" else set()), "parameters")
    return {k: v if k.startswith("original") else real(v) for k, v in rest.items()} or None


TRAIN = {"lr": 1e-3, "lr_min": 0.0, "warmup_steps": 0, "max_steps": 1000, "batch_size": 16, "max_seq_len": 512,
         "accumulation_steps": 1, "max_grad_norm": 1.0, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999,
         "adam_eps": 1e-8, "precision": "fp32", "seed": 42}
LOOP = {"steps_per_epoch": 100, "target_val_loss": 3.0, "patience": 5, "min_epochs": 3, "max_skips": 0,
        "on_divergence": "stop"}
NEEDED = {"model", "train", "loop", "mode", "dataset", "tokenizer", "val_shard", "val_batches", "allow_shard_cycle",
          "synthetic", "init"}
OPTIONAL = {"force_init_loss": False, "weights": "f32", "parity_every": 500, "keep": 2, "milestone_every": 0,
            "step_timeout": None}
ENDINGS = ("stop", "rollback")
ROWS = {"finetune": (5e-5, 100, 2.2), "from-scratch": (3e-4, 1000, 3.0)}


def section(values, defaults):
    """A section of a run: known keys only, whole numbers where the default is one."""
    require(values.keys() <= defaults.keys(), "keys of a section")
    given = {**defaults, **values}
    return {k: real(v) if type(defaults[k]) is float else strict(v, type(defaults[k])) for k, v in given.items()}


def run(values):
    """A run: every field, in its range."""
    require(NEEDED <= values.keys() <= NEEDED | OPTIONAL.keys(), "keys of a run")
    out = {**OPTIONAL, **values, "model": model(values["model"]), "train": section(values["train"], TRAIN),
           "loop": section(values["loop"], LOOP)}
    train, loop = out["train"], out["loop"]
    for key in ("max_steps", "batch_size", "max_seq_len", "accumulation_steps"):
        whole(train[key])
    require(all(0 < train[key] < math.inf for key in ("lr", "max_grad_norm", "adam_eps")), "positive numbers")
    require(0 <= train["lr_min"] <= train["lr"] and train["warmup_steps"] >= 0, "learning rate")
    require(train["weight_decay"] >= 0 and 0 <= train["beta1"] < 1 and 0 <= train["beta2"] < 1, "optimizer")
    require(train["precision"] in ("fp32", "bf16") and 0 <= train["seed"] < 2**63, "precision, seed")
    require(min(loop["steps_per_epoch"], loop["min_epochs"]) >= 1 and loop["on_divergence"] in ENDINGS, "loop")
    require(min(loop["patience"], loop["max_skips"]) >= 0, "loop")
    require(loop["target_val_loss"] > 0 and out["mode"] in ROWS and out["weights"] in ("f32", "bf16"), "names")
    for key, least in (("val_batches", 1), ("keep", 1), ("parity_every", 0), ("milestone_every", 0)):
        whole(out[key], least)
    if out["step_timeout"] is not None:
        out["step_timeout"] = real(out["step_timeout"])
        require(0 <= out["step_timeout"] < math.inf, "step_timeout")
    for key in ("allow_shard_cycle", "synthetic", "force_init_loss"):
        strict(out[key], bool)
    require(all(out[k] is None or type(out[k]) is str for k in ("dataset", "tokenizer", "val_shard", "init")), "paths")
    require(out["synthetic"] or out["dataset"] is not None, "nothing to train on")
    return out


def run_json(data):
    """The run of a run.json."""
    return run(json_value(data)["config"])


def yaml_value(data):
    """The value of a YAML text, by PyYAML's events: one document, no alias, no tag, no key twice, JSON's scalars."""
    require(len(data) <= 2**15, "too long")
    events = iter(list(yaml.parse(data.decode(), yaml.BaseLoader))[1:-1])
    kinds = (yaml.AliasEvent, yaml.DocumentStartEvent)

    def node(event):
        require(getattr(event, "tag", None) is None and not isinstance(event, kinds), "an alias, a tag, two documents")
        if isinstance(event, yaml.SequenceStartEvent):
            return list(inner(yaml.SequenceEndEvent))
        if isinstance(event, yaml.MappingStartEvent):
            flat = list(inner(yaml.MappingEndEvent))
            keys = flat[::2]
            require(all(not isinstance(k, dict | list) for k in keys) and len(set(keys)) == len(keys), "keys")
            return dict(zip(keys, flat[1::2], strict=True))
        return event.value if event.style else yaml_scalar(event.value)

    def inner(end):
        while not isinstance(event := next(events), end):
            yield node(event)

    next(events)  # the document's start
    value = node(next(events))
    require(isinstance(next(events), yaml.DocumentEndEvent) and next(events, None) is None, "two documents")
    return bounded(value)


def yaml_scalar(text):
    """The value of a scalar without quotes."""
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", text):
        return int(text)
    number = r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
    return float(text) if re.fullmatch(number, text) else text


def yaml_run(data):
    """The run that `apr pretrain --config` makes of a file, without another flag; a key that is null is as none."""
    values = yaml_value(data)
    require(values.keys() <= NEEDED | OPTIONAL.keys() | {"preset"}, "keys of the file")
    given = {key: value for key, value in values.items() if value is not None}
    row = ROWS[given.get("mode", "from-scratch")]
    preset = asdict(PRESETS[given.pop("preset", "llama_370m")])
    train = {"batch_size": 16, "max_seq_len": 1024, "lr": row[0], "warmup_steps": row[1], **given.get("train", {})}
    train.setdefault("lr_min", min(max(0.01 * train["lr"], 1e-7), train["lr"]))
    absent = dict.fromkeys(("dataset", "tokenizer", "val_shard", "init")) | {
        "mode": "from-scratch", "val_batches": 16, "allow_shard_cycle": False, "synthetic": False}
    return run({"model": preset, **absent, **given, "train": train,
                "loop": {"target_val_loss": row[2], **given.get("loop", {})}})
