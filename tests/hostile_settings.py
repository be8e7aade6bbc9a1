"""Malformed settings: Hugging Face's config.json, the YAML of `apr pretrain --config`, environment variables."""

import dataclasses
import json

from hostile import CONFIG, FORMAT, Case, put
from hostile_models import MODEL
from hostile_tensors import BAD_JSON, special_files

from apr.hf_config import to_hf

HF = to_hf(MODEL)
HF_TEXT = json.dumps(HF).encode()
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "max_position_embeddings")
NO_NUMBER = (True, "8", None, [], {}, "x")
NO_SIZE = (*NO_NUMBER, 8.5, 1e3, -1, 0, 2**31, 2**70)
SETTINGS = {"model": dataclasses.asdict(MODEL), "train": {"lr": 1e-4, "lr_min": 0.0, "max_steps": 1, "seed": 10},
            "loop": {"steps_per_epoch": 1},
            "synthetic": True}


def config_cases():
    def case(row, what, change, says="", code=CONFIG):
        values = {k: v for k, v in {**HF, **change}.items() if v is not ...} if isinstance(change, dict) else change
        return Case(row, "config", what, put("config.json", json.dumps(values).encode()), code, says)

    for key in (*SIZES, "rope_theta", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "model_type"):
        yield case("H3", f"no {key}", {key: ...}, key)
    for wrong, right in (("rms_norm_epsilon", "rms_norm_eps"), ("rope_tetha", "rope_theta"),
                         ("hiden_size", "hidden_size")):
        yield case("H3", f"{wrong} beside {right}", {wrong: 1e-5}, f"'{right}'")
        yield case("H3", f"{wrong} for {right}", {right: ..., wrong: 1e-5}, f"'{right}'")
    for family in ("bert", "roberta", "distilbert", "modernbert"):
        yield case("H3", family, {"model_type": family}, "ARCH-007")
    for family in ("gpt2", "gemma2", "", 5, None, [], ["llama"], {}):
        yield case("H3", f"model_type {family!r}", {"model_type": family}, "model_type")
    for key in (*SIZES, "head_dim"):
        for value in NO_SIZE:
            if (key, value) != ("head_dim", None):  # which is hidden_size / num_attention_heads
                yield case("B8", f"{key} {value!r}", {key: value})
    yield case("B8", "2^31-1 layers", {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers")
    for key in ("rms_norm_eps", "rope_theta"):
        for value in (*NO_NUMBER, 0, -1.0, 10**400):
            yield case("B8", f"{key} {str(value)[:9]!r}", {key: value})
    for value in ("true", 1, 0, None, []):
        yield case("B8", f"tie_word_embeddings {value!r}", {"tie_word_embeddings": value})
    for change in ({"hidden_act": "gelu"}, {"hidden_act": ["silu"]}, {"attention_bias": True},
                   {"quantization_config": {}}, {"layer_types": 5}, {"layer_types": ["sliding_attention"]},
                   {"layer_types": "full_attention"}, {"use_sliding_window": 1},
                   {"model_type": "mistral", "sliding_window": "x"}, {"model_type": "mistral", "sliding_window": True},
                   {"model_type": "mistral", "sliding_window": 0}, {"num_key_value_heads": 3}, {"head_dim": 3}):
        yield case("B8", f"{change}", change)
    yield case("H3", "two thetas", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "both spellings")
    other = {**LLAMA3, "factor": 4.0, "rope_theta": HF["rope_theta"]}
    yield case("H3", "two scalings", {"rope_scaling": LLAMA3, "rope_parameters": other}, "two that differ")
    for what, change in (("yarn", {"rope_type": "yarn"}), ("a field more", {"beta": 1}),
                         ("factor NaN text", {"factor": "nan"}), ("factor 0.5", {"factor": 0.5}),
                         ("factors crossed", {"low_freq_factor": 8.0}), ("bool", {"factor": True}),
                         ("no type", {"rope_type": None})):
        yield case("H3", f"rope_scaling: {what}", {"rope_scaling": {**LLAMA3, **change}})
    for key in ("rope_scaling", "rope_parameters"):
        for value in ("llama3", [], 5, True):
            yield case("H3", f"{key} {value!r}", {key: value}, key)
    for value in ([], "text", 5, None, True):
        yield case("H3", f"not an object: {value!r}", value)
    yield case("B7", "a key of 8 MB", {"k" * 8_000_000: 1})
    for what, text in BAD_JSON.items():
        data = HF_TEXT[:-1] + b', "rms_norm_eps_": ' + text + b"}"
        yield Case("B8", "config", what, put("config.json", data), FORMAT)
    yield Case("B7", "config", "eps twice", put("config.json", HF_TEXT[:-1] + b', "rms_norm_eps": 1e-5}'), FORMAT,
               "twice")
    for n in range(len(HF_TEXT)):
        yield Case("B1", "config", f"cut to {n} bytes", put("config.json", HF_TEXT[:n]), FORMAT)
    for what, write in special_files("config.json").items():
        yield Case("B13", "config", what, write, FORMAT)


def yaml_text(more="", **sections):
    """The settings, a line of JSON (which is YAML) per section, some changed (`...` drops a key); then more text."""
    values = {**SETTINGS, **sections}
    for key, change in sections.items():
        if isinstance(change, dict):
            values[key] = {k: v for k, v in {**SETTINGS.get(key, {}), **change}.items() if v is not ...}
    return ("\n".join(f"{k}: {json.dumps(v)}" for k, v in values.items()) + "\n" + more).encode()


TAGS = {
    "apply": '!!python/object/apply:os.system ["touch PWNED"]',
    "new": '!!python/object/new:os.system ["touch PWNED"]',
    "name": "!!python/name:os.system",
    "module": "!!python/module:os",
    "tuple": "!!python/tuple [1]",
    "apply in a value": "dataset: !!python/object/apply:pathlib.Path.touch [PWNED]",
    "own tag": "mode: !run x",
    "verbatim tag": "mode: !<tag:yaml.org,2002:python/object/apply:os.system> [touch PWNED]",
}
YAML = {
    "alias bomb": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 20)),
    "alias of itself": "a: &a [*a]", "one alias": "mode: &m x\ndataset: *m", "merge": "a: &a {b: 1}\nc: {<<: *a}",
    "undefined anchor": "a: *b",
    "key twice": "mode: finetune\nmode: from-scratch", "key twice inside": "train: {lr: 1.0, lr: 2.0}",
    "keys 1 and 1.0": "1: a\n1.0: b", "list as key": "? [a]\n: b", "object as key": "? {a: b}\n: c",
    "!!bool": "synthetic: !!bool perhaps", "!!int": 'seed: !!int ""', "!!float": 'seed: !!float ""',
    "!!timestamp": "seed: !!timestamp x", "!!set": "!!set {a, b}", "!!binary": "mode: !!binary aGk=",
    "\\UFFFFFFFF": 'mode: "\\UFFFFFFFF"', "lone surrogate": 'mode: "\\uD800"', "zero byte": "a: \0",
    "1e999": "train: {lr: 1e999}", "5000 digits": "train: {seed: " + "9" * 5000 + "}",
    "two documents": "a: 1\n---\nb: 2", "tab": "train:\n\tlr: 1", "cut": "train: {lr: 1",
    "10k levels": "[" * 10_000, "70 levels": "[" * 70 + "]" * 70, "2000 dashes": "- " * 2000, "2000 keys": "? " * 2000,
    "40 kB of spaces": " " * 40_000,
}
SCALARS = {  # of the section train: what is no number here, or no such number
    "seed": "010 0x10 0o17 1_000 1:30 2026-01-01 1.0 true", "max_steps": "1e3 ~", "warmup_steps": "-1 1.5",
    "lr": '"1e-4" 1e-4x .nan .inf no ~ true [1e-4]', "weight_decay": "-1.0", "beta1": "1.0", "precision": "no",
}


def yaml_cases():
    def case(row, what, data, code=FORMAT, says="", cli=False):
        return Case(row, "yaml", what, put("run.yaml", data), code, says, cli)

    def attack(text):
        return lambda folder: put("run.yaml", text.replace("PWNED", str(folder / "pwned")).encode())(folder)

    for what, text in TAGS.items():
        yield Case("H1", "yaml", what, attack(text), FORMAT, "tags", cli=what == "apply")
    for what, text in YAML.items():
        yield case("H2", what, text.encode(), cli=what in ("alias bomb", "key twice"))
    yield case("H2", "key twice, by name", b"mode: finetune\nmode: from-scratch", says="'mode' twice")
    yield case("H2", "not UTF-8", b"mode: \xff")
    yield case("H2", "surrogate bytes", b"mode: \xed\xa0\x80")
    for key, texts in SCALARS.items():
        for text in texts.split():
            others = json.dumps({k: v for k, v in SETTINGS["train"].items() if k != key})
            data = f"model: {json.dumps(SETTINGS['model'])}\nsynthetic: true\ntrain: {others[:-1]}, {key}: {text}}}\n"
            yield case("H2", f"train.{key} {text}", data.encode(), CONFIG, key, cli=text == "010")
    for text in ("no", "yes", "off", "1", '"true"'):
        yield case("H2", f"allow_shard_cycle {text}", yaml_text(f"allow_shard_cycle: {text}\n"), CONFIG,
                   "allow_shard_cycle")
    for what, more, says in (("top", "datset: x", "'dataset'"), ("section", "trian: {}", "'train'"),
                             ("number", "5: x", "'5'")):
        yield case("H3", f"misspelt {what}", yaml_text(more), CONFIG, says)
    for section, wrong, right in (("model", "rms_norm_epsilon", "rms_norm_eps"), ("model", "rope_tetha", "rope_theta"),
                                  ("train", "weight_decays", "weight_decay"), ("train", "learning_rate", "known"),
                                  ("loop", "patiance", "patience")):
        yield case("H3", f"{section}.{wrong}", yaml_text(**{section: {wrong: 1e-5}}), CONFIG, right,
                   cli=wrong == "rms_norm_epsilon")
    for key in SETTINGS["model"]:
        yield case("H3", f"no model.{key}", yaml_text(model={key: ...}), CONFIG, key, cli=key == "rope_theta")
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "rms_norm_eps",
                "rope_theta"):
        for value in (True, "8", None, [], {}, -1, 2**70):
            if (key, value) != ("rope_theta", 2**70):
                yield case("B8", f"model.{key} {value!r}", yaml_text(model={key: value}), CONFIG, key)
    for change in ({"architecture": "encoder"}, {"hf_model_type": "bert"}, {"hf_model_type": []}, {"use_bias": False},
                   {"rope_scaling": 5}, {"rope_scaling": {"factor": 1}},
                   {"rope_scaling": {**{k: v for k, v in LLAMA3.items() if k != "rope_type"}, "factr": 1}}):
        yield case("H3", f"model: {change}", yaml_text(model=change), CONFIG)
    for key, value in (("mode", []), ("mode", "fine"), ("dataset", 5), ("tokenizer", []), ("val_batches", 0),
                       ("val_batches", "2"), ("model", []), ("train", 5), ("loop", "x"), ("synthetic", "x")):
        yield case("H2", f"{key} {value!r}", yaml_text(**{key: value}), CONFIG, key)
    no_model = {k: v for k, v in SETTINGS.items() if k != "model"}
    yield case("H3", "misspelt preset", json.dumps({**no_model, "preset": "tinny"}).encode(), CONFIG, "'tiny'")
    for change in ({"preset": []}, {"preset": ["tiny"]}, {"init": 5}, {"init": []},
                   {"preset": "tiny", "mode": ["finetune"]}, {"preset": "tiny", "train": {"lr": "x"}}):
        yield case("H2", f"{change}", json.dumps({**no_model, **change}).encode(), CONFIG, list(change)[-1])
    for loop in ({"steps_per_epoch": 0}, {"steps_per_epoch": True}, {"patience": -1}, {"target_val_loss": 0.0},
                 {"target_val_loss": "x"}):
        yield case("H2", f"loop {loop}", yaml_text(loop=loop), CONFIG)
    for what, write in special_files("run.yaml").items():
        code = CONFIG if what in ("LFS pointer", "empty", "HTML") else FORMAT
        yield Case("B13", "yaml", what, write, code)


def env_cases():
    for line, says in (("APR_DEVCE=cpu", "APR_DEVICE"), ("APR_SKIP_PARITY_GATE=1", "APR_SKIP_PARITY_GATE"),
                       ("APR_=1", "APR_"), ("APR_device=cpu", "APR_device")):
        yield Case("H4", "env", line, put("environment", line.encode()), CONFIG, says,
                   cli=line == "APR_SKIP_PARITY_GATE=1")


def cases():
    return [*config_cases(), *yaml_cases(), *env_cases()]
