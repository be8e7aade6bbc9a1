"""For the fuzzer: JSON values, configurations, runs and YAML files, small and changed in a few places."""

import copy
import dataclasses
import json

from hostile_models import MODEL
from hostile_settings import LLAMA3

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 32}
HF = {**SIZES, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True, "hidden_act": "silu",
      "head_dim": 4}
V5 = {"rope_type": "default", "rope_theta": 1e4}
MORE = {  # keys that a config.json may have besides
    "rope_scaling": [None, LLAMA3, {**LLAMA3, "type": "llama3"}, {"type": "default"}, {**V5, "rope_theta": 5e5}],
    "rope_parameters": [None, V5, {**LLAMA3, "rope_theta": 1e4}, {**V5, "rope_theta": 10000}, {"rope_theta": 5e5}],
    "sliding_window": [None, 16, 64, 0, 2**40, 8.0], "use_sliding_window": [False, True, 0, None],
    "layer_types": [None, [], ["full_attention"] * 2, ["full_attention", "sliding_attention"]],
    "attention_bias": [False, True, None, 0], "mlp_bias": [False, True], "attention_dropout": [0, 0.0, 0.1, None],
    "pretraining_tp": [1, 1.0, 2], "quantization_config": [None, {}], "partial_rotary_factor": [1, 1.0, 0.5, None],
    "torch_dtype": ["bfloat16", 5], "eos_token_id": [2, [2, 3], None], "architectures": [["LlamaForCausalLM"], []],
    "rms_norm_epsilon": [1e-5], "is_encoder_decoder": [False, True], "use_cache": [True], "bos_token_id": [1]}
VALUES = [None, True, False, 0, 1, 2, 3, 4, 8, 16, 10_000, 10_001, -1, 2**31 - 1, 2**31, 2**63, 10**30, 10**400, 0.0,
          0.5, 1.0, 1e-2, 1.1e-2, 1e-300, 1e308, -1e-6, "", "8", "x", "silu", "llama", "qwen2", "qwen3", "mistral",
          "bert", [], {}, [1], {"a": 1}, "é\0", "decoder", "tiny", "from-scratch", "finetune", "bf16", "f32", "fp32"]
TOKENS = ["null", "true", "-1", "0", "-0", "1e999", "-1e-999", "1.0", "1E+2", "01", "1.", "+1", ".5", "NaN", "Infinity",
          "-Infinity", "9" * 25, "9" * 4301, '"a"', '""', '"\\ud800"', '"\\ud83d\\ude42"', '"\\u0000"', '"\\x"',
          '"\x01"', "[]", "{}", "[", "]", "{", "}", ",", ":", '"', "\\", '{"a": 1, "a": 2}', '{"a": {"b": 1}}',
          "[" * 63 + "]" * 63, "[" * 64 + "0" + "]" * 64, "[" * 65 + "]" * 65, "[" * 2000, "\ufeff", "\x0b", "\u00a0",
          "//", "#", "\n", " ", "\u0661", "\0", "\x7f", "'a'", "1_0", "0x1F", "é", "\U0001f642"]
YAML_TOKENS = ["&a ", "*a", "!!int ", "!x ", "! ", "? ", "- ", ": ", "\t", "\n", "#", " #", "---\n",
               "\n---\n", "...", "%", "<<: ", "|\n", ">\n", "'", '"', "010", "0x10", "1_0", "1:30", "no", "yes",
               "~", ".nan", ".inf", "-.5", "1.", "1e3", "+7", "1e999", "2026-01-01", '"\\UFFFFFFFF"', "\\", "{", "}",
               "[", "]", ",", "\0", "\x85", "\ufeff", "é", "%YAML 1.1\n"]
SETTINGS = {"model": dataclasses.asdict(MODEL), "loop": {"steps_per_epoch": 4, "patience": 5}, "mode": "from-scratch",
            "train": {"lr": 1e-3, "lr_min": 1e-5, "max_steps": 8, "seed": 10, "beta2": 0.95, "precision": "fp32"},
            "synthetic": True, "val_batches": 2, "dataset": "texts", "allow_shard_cycle": False, "weights": "bf16"}
ALSO = {"preset": ["tiny", "tinny", "demo", None], "tokenizer": ["tok", 5], "val_shard": ["held", None],
        "mode": ["finetune", "x"], "init": ["model", []], "force_init_loss": [True, 1], "weights": ["f32", "f16"],
        "parity_every": [0, 500, -1], "keep": [1, 0], "milestone_every": [0, -1], "max_skips": [1], "datset": ["x"],
        "step_timeout": [0, 0.5, -1, None], "train": [None, {"lr": 1e-7}, {"lr_min": 2e-3}, {"warmup_steps": 0}],
        "loop": [{}, {"min_epochs": 1}, {"max_skips": 2, "on_divergence": "rollback"}, {"on_divergence": "x"}]}


def near(rng, old):
    """A number near another, or of another kind."""
    return rng.choice((old - 1, old + 1, old * 2, -old, old / 2, float(old), int(old), old % 7, str(old)))


def places(value, found=None):
    """Every (container, key) of a tree of JSON values."""
    found = [] if found is None else found
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        places(value[key], found)
    return found


def change(rng, value, others=VALUES):
    """Change one place of a tree, in place: drop it, rename it, repeat it, put a near or another value there."""
    every = places(value)
    if not every:
        return
    at, key = rng.choice(every)
    choice, old = rng.randrange(8), at[key]
    if choice == 0:
        del at[key]
    elif choice == 1 and isinstance(at, dict):
        at[rng.choice((*at, "x", key[:-1], key.upper()))] = at.pop(key)
    elif choice == 1:
        at.insert(rng.randrange(len(at) + 1), copy.deepcopy(old))
    elif choice < 5 and type(old) in (int, float) and abs(old) < 2**53:
        at[key] = near(rng, old)
    else:
        at[key] = copy.deepcopy(rng.choice((*others, rng.choice(every)[0])))


def edited(rng, text, tokens, times=1):
    """A text with tokens put into it, or over parts of it, at places between its own; or cut, or a part repeated."""
    for _ in range(times):
        at, choice = rng.randrange(len(text) + 1), rng.randrange(8)
        if choice < 6:
            text = text[:at] + rng.choice(tokens) + text[at + rng.choice((0, 0, 1, 2, 9)):]
        elif choice == 6:
            text = text[:at] + text[at + rng.randrange(1, 9):]
        else:
            text = text[:at] + text[rng.randrange(len(text) + 1):][:rng.randrange(40)] + text[at:]
    return text


def encoded(rng, text):
    """The bytes of a text, in rare cases not UTF-8."""
    data = text.encode("utf-8", "surrogatepass")
    if data and rng.random() < 0.05:
        at = rng.randrange(len(data))
        data = data[:at] + rng.choice((b"\xff", b"\xed\xa0\x80", b"\xc3", b"\xc0\x80", b"\0")) + data[at:]
    return data


def json_text(rng, value, often=0.15):
    """The JSON of a value, sometimes with a key given twice, and edited."""
    text = json.dumps(value, indent=rng.choice((None, None, 1)), ensure_ascii=rng.random() < 0.5)
    if isinstance(value, dict) and value and rng.random() < 0.05:
        key = rng.choice(list(value))
        text = f"{{{json.dumps(key)}: {json.dumps(rng.choice((value[key], 1)))}, {text[1:]}"
    return encoded(rng, edited(rng, text, TOKENS) if rng.random() < often else text)


def tree(rng, depth=3):
    """A tree of JSON values."""
    kind = rng.randrange(8)
    if depth and kind < 3:
        return [tree(rng, depth - 1) for _ in range(rng.randrange(4))]
    if depth and kind < 6:
        return {rng.choice(("a", "b", "é", "", "k\0")): tree(rng, depth - 1) for _ in range(rng.randrange(4))}
    return rng.choice((*VALUES, rng.random() * 10**rng.randrange(-320, 308), "\U0001f642"))


def json_bytes(rng):
    """A JSON text, some of whose tokens are not what they were."""
    if rng.random() < 0.002:  # about as many values as are allowed
        return b"[" + b"0," * rng.choice((2**18 - 2, 2**18 - 1, 2**18)) + b"0]"
    value = tree(rng)
    for _ in range(rng.randrange(60, 66) if rng.random() < 0.05 else 0):  # about as many levels
        value = rng.choice(([value], {"a": value}))
    text = json.dumps(value, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5)
    return encoded(rng, edited(rng, text, TOKENS, rng.choice((0, 0, 1, 1, 2, 3))))


def config_bytes(rng):
    """A config.json of one of the families, with more keys, changed."""
    values = copy.deepcopy({"model_type": rng.choice(("llama", "mistral", "qwen2", "qwen3")), **HF})
    if rng.random() < 0.3:
        del values[rng.choice(("head_dim", "num_key_value_heads", "rope_theta"))]
    for key in rng.sample(list(MORE), rng.choice((0, 1, 2, 3))):
        values[key] = copy.deepcopy(rng.choice(MORE[key]))
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        change(rng, values)
    return json_text(rng, values)


def settings(rng):
    """The keys of a --config file, changed."""
    values = copy.deepcopy(SETTINGS)
    if rng.random() < 0.3:
        values["model"]["rope_scaling"] = {k: v for k, v in LLAMA3.items() if k != "rope_type"}
    for key in rng.sample(list(values), rng.randrange(4)):
        del values[key]
    for key in rng.sample(list(ALSO), rng.choice((0, 1, 2))):
        values[key] = copy.deepcopy(rng.choice(ALSO[key]))
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        change(rng, values)
    return values


def scalar(rng, value):
    """One of the ways to write a scalar in YAML."""
    text = json.dumps(value)
    if isinstance(value, str) and value.isalpha() and rng.random() < 0.6:
        return rng.choice((value, f"'{value}'"))
    if value is None:
        return rng.choice(("null", "~", ""))
    if type(value) is int and rng.random() < 0.02:
        return f"0{text}"  # a number in octal to YAML 1.1, no number here
    return rng.choice((text, text, f"+{text}", text.upper(), f"{text} # a number")) if type(value) is float else text


def yaml_lines(rng, value, indent=""):
    """A mapping as a block, its sections as blocks or on one line."""
    for key, item in value.items():
        name = key if key.isidentifier() else json.dumps(key)
        if isinstance(item, dict) and item and rng.random() < 0.5:
            yield f"{indent}{name}:"
            yield from yaml_lines(rng, item, indent + "  ")
        else:
            yield f"{indent}{name}: {json.dumps(item) if isinstance(item, dict | list) else scalar(rng, item)}"


def yaml_bytes(rng):
    """A --config file of `apr pretrain`, changed as values and as text."""
    text = "\n".join(yaml_lines(rng, settings(rng))) + "\n"
    return encoded(rng, edited(rng, text, YAML_TOKENS, rng.choice((1, 1, 2))) if rng.random() < 0.25 else text)


def run_bytes(rng):
    """A run.json, changed."""
    train = {"lr": 1e-3, "lr_min": 1e-5, "warmup_steps": 2, "max_steps": 8, "batch_size": 2, "max_seq_len": 16,
             "accumulation_steps": 1, "max_grad_norm": 1.0, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999,
             "adam_eps": 1e-8, "precision": "fp32", "seed": 1}
    config = {**SETTINGS, "train": train, "tokenizer": None, "val_shard": None, "init": None, "force_init_loss": False,
              "parity_every": 500, "loop": {**SETTINGS["loop"], "target_val_loss": 3.0, "min_epochs": 3}}
    values = copy.deepcopy({"config": config, "versions": {"apr": "0.1", "python": "3"}})
    for key in rng.sample(list(ALSO), rng.choice((0, 0, 1))):
        values["config"][key] = copy.deepcopy(rng.choice(ALSO[key]))
    for _ in range(rng.choice((0, 1, 1, 2))):
        change(rng, values)
    return json_text(rng, values)
