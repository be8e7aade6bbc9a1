"""For the fuzzer: models in GGUF whose metadata and tensors are changed, and what must hold of one that is taken."""

import dataclasses

import numpy as np
from gguf_files import model_source
from hostile_models import MODEL, UNTIED, arrays
from tokenizers import Tokenizer

from apr.formats.gguf_file import open_gguf
from apr.formats.gguf_keys import config_keys
from apr.formats.gguf_model import open_gguf_model
from apr.formats.gguf_names import gguf_name, shortest
from apr.formats.gguf_write import encode_header
from apr.params import param_specs

TOKENS = [*"abcdefgh", "ab", "cd", "abcd", "gh", "<eos>", "<tool>", "<0x41>", "<unk>"]
VALUES = [0, 1, 2, 3, 4, 8, 15, 16, 17, 255, 10_000, 2**31 - 1, 2**31, 2**32 - 1, 0.0, 0.5, 1.0, 2.0, 1e4, 1e30, True,
          False, "", "llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt-2", "none", "linear", "x\0y", "\u2581", [],
          ["a"], ["a b", "a b"], ["a  b"], TOKENS[::-1], np.zeros(0, np.int32), np.full(16, 2, np.int32),
          np.full(16, -1, np.int32), np.arange(16, dtype=np.float32), np.float32([1e30] * 16)]
MORE = ["rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "expert_count",
        "attention.sliding_window", "logit_scale", "attention.causal", "unheard_of"]
OTHER = ["tokenizer.ggml.bos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.padding_token_id",
         "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.chat_template", "split.count",
         "general.type", "apr.model_type", "general.alignment"]
NAMES = ["rope_freqs.weight", "output.weight", "blk.0.attn_q.bias", "blk.0.attn_q_norm.weight", "blk.9.ffn_up.weight",
         "blk.00000.attn_q.weight", "x"]


def tokenizer_keys(kind):
    """The metadata of a small tokenizer."""
    types = np.array([1] * 12 + [3, 4, 6 if kind == "llama" else 1, 2 if kind == "llama" else 5], np.int32)
    out = {"tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": list(TOKENS), "tokenizer.ggml.token_type": types,
           "tokenizer.ggml.eos_token_id": 12}
    if kind == "llama":
        return out | {"tokenizer.ggml.scores": -np.arange(16, dtype=np.float32), "tokenizer.ggml.bos_token_id": 15}
    return out | {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["a b", "c d", "ab cd", "g h"]}


def change_keys(rng, keys, arch):
    """Change a key: drop it, give it another value, or change a part of it; or add one."""
    name = rng.choice([*keys, *(f"{arch}.{m}" for m in MORE), *OTHER])
    old = keys.get(name)
    choice = rng.randrange(6)
    if choice == 0:
        keys.pop(name, None)
    elif choice < 3 or old is None:
        keys[name] = rng.choice(VALUES)
    elif isinstance(old, list):
        at, new = rng.randrange(len(old) + 1), rng.choice([*TOKENS, "", " ", "a", "a b c", "é", "x" * 300])
        keys[name] = [*old[:at], new, *old[at + rng.randrange(2):]]
    elif isinstance(old, np.ndarray):
        keys[name] = old.copy()
        keys[name][rng.randrange(max(len(old), 1))::20] = rng.choice((0, 1, 3, 4, 5, 6, 7, -1))
    elif isinstance(old, bool | str):
        keys[name] = rng.choice(VALUES)
    elif isinstance(old, int):
        keys[name] = min(max(0, rng.choice((old - 1, old + 1, old * 2, old // 2))), 2**32 - 1)
    else:
        keys[name] = shortest(float(np.float32(old * rng.choice((0.5, 2.0, -1.0, 1e-9)))))


def change_tensors(rng, tensors):
    """Drop, add, rename or reshape a tensor."""
    name, choice = rng.choice(list(tensors)), rng.randrange(4)
    if choice == 0:
        del tensors[name]
    elif choice == 1:
        tensors[rng.choice(NAMES)] = np.full(rng.choice((1, 2, 4, 8, (16, 8), (8, 8))), rng.choice((0.5, 1.0, np.nan)),
                                             np.float32)
    elif choice == 2:
        tensors[rng.choice([*NAMES, *tensors])] = tensors.pop(name)
    else:
        tensors[name] = tensors[name].T.copy() if rng.random() < 0.5 else tensors[name].reshape(-1)


def model_bytes(rng):
    """A small model, changed."""
    config = rng.choice((MODEL, UNTIED))
    if rng.random() < 0.2:
        config = dataclasses.replace(UNTIED, hf_model_type="qwen3", hf_architecture="Qwen3ForCausalLM", qk_norm=True)
    source = model_source(config, arrays(config))
    tensors = {gguf_name(name): source.read(name) for name in source.shapes}
    keys = {**config_keys(config, "x"), **tokenizer_keys(rng.choice(("gpt2", "llama")))}
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        change_keys(rng, keys, keys.get("general.architecture", "llama"))
    if rng.random() < 0.3:
        change_tensors(rng, tensors)
    head = encode_header(keys, {n: ("F32", a.shape) for n, a in tensors.items()}, "x")
    return head + b"".join(a.tobytes().ljust(a.nbytes + -a.nbytes % 32, b"\0") for a in tensors.values())


def read_model(path):
    """The bytes of every parameter; AssertionError for a model that should not have been taken."""
    with open_gguf(path) as raw, open_gguf_model(path) as source:
        config, meta = source.config, raw.metadata
        arch = meta["general.architecture"]
        assert {s.name: s.shape for s in param_specs(config)} == dict(source.shapes)
        assert len(raw.entries) == len(source.shapes) + (config.rope_scaling is not None)
        for key, value in (("block_count", config.L), ("embedding_length", config.C), ("feed_forward_length", config.F),
                           ("attention.head_count", config.NH), ("rope.freq_base", np.float32(config.rope_theta)),
                           ("attention.layer_norm_rms_epsilon", np.float32(config.rms_norm_eps))):
            assert meta[f"{arch}.{key}"] == value, key
        assert not any(key.endswith("unheard_of") and key.startswith(arch) for key in meta)
        if "tokenizer.json" in source.assets:
            inner, types = Tokenizer.from_str(source.assets["tokenizer.json"]), meta.get("tokenizer.ggml.token_type")
            assert len(meta["tokenizer.ggml.tokens"]) == config.V
            for i, token in enumerate(meta["tokenizer.ggml.tokens"]):
                assert inner.token_to_id(token) == (i if types is None or types[i] != 5 else None), token
        values = {name: source.read(name) for name in source.shapes}
        assert all(np.isfinite(a).all() for a in values.values())
        return {name: a.tobytes() for name, a in values.items()}
