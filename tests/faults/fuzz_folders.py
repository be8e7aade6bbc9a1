"""For the fuzzer: token shards, sharded models, checkpoints, tokenizers and kernel cache entries, small and changed.

A folder is a table of file name to bytes, or to the target of a link.
"""

import copy
import functools
import hashlib
import json
import struct

import numpy as np
from fuzz_files import POWERS, TEXTS, number
from fuzz_values import change, json_text
from hf_models import safetensors_bytes
from hostile_models import BIAS, EMBED, MODEL, NORM, listed

from apr.hf_config import to_hf
from apr.params import param_specs

V = 40  # of the shards
INDEX, SINGLE, OUTSIDE = "model.safetensors.index.json", "model.safetensors", "../outside.safetensors"
FILES = [OUTSIDE, "/x.safetensors", "a/../" + OUTSIDE, ".x.safetensors", "", "..", "config.json", "x.safetensors",
         "model-00001-of-00003.SAFETENSORS", "x\0.safetensors", 5, None, [], SINGLE, "n" * 250 + ".safetensors"]
LINKS = [OUTSIDE, "/dev/zero", "model-0.safetensors", "model-1.safetensors", ".", "nowhere", "config.json"]
STATE = {"step": 4, "optimizer_step": 4, "log_bytes": 100, "artifact": None, "trainer": {"device": "cpu"},
         "data": {"fingerprint": "0" * 64, "passes": 1}, "parameters_sha256": "1" * 64, "optimizer_sha256": "2" * 64,
         "loop": {"step": 4, "epoch": 1, "tokens_seen": 256, "initial_val_loss": 2.75, "val_losses": [2.5],
                  "worse_epochs": 0, "losses": [2.75, 2.5, 2.25, 2.0], "epoch_loss_sum": 0.0, "epoch_tokens": 0,
                  "epoch_grad_norm_max": 0.0, "epoch_seconds": 0.0, "wall_seconds": 1.5, "skipped": 1,
                  "passed_over": [[2, 3]]}}
WORDS = ["th", "he", "the", "Ġt", "Ġthe", "in", "12", "ĠĠ"]
EOS = {"id": 0, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
       "special": True}
PART = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DOUBLED = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
PARTS = {"normalizer": [{"type": "NFC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "x" * 2000}, DOUBLED,
                        {"type": "Strip"}, {"type": "Sequence", "normalizers": [DOUBLED] * 24},
                        {"type": "Precompiled", "precompiled_charsmap": "AAAA"}],
         "pre_tokenizer": [None, {**PART, "add_prefix_space": True}, {**PART, "use_regex": False}, DOUBLED,
                           {"type": "Whitespace"},
                           {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}],
         "decoder": [None, {"type": "Sequence", "decoders": [PART, *[DOUBLED] * 24]},
                     {"type": "WordPiece", "prefix": "##", "cleanup": True}],
         "post_processor": [PART, {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}],
         "truncation": [{"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}],
         "padding": [{"strategy": {"Fixed": 2**20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                      "pad_type_id": 0, "pad_token": "a"}]}
MERGES = [["h", "e"], ["e", "r"], ["th", "in"], ["a"], "t h", ["t", "h", "e"], 5, ["Ġ", ""]]
MODEL_PARTS = {"dropout": [0.0, 0.5, 2], "unk_token": ["a", "nope"], "continuing_subword_prefix": ["##", "é", ""],
               "end_of_word_suffix": ["</w>", ""], "fuse_unk": [True], "byte_fallback": [True], "ignore_merges": [True]}


def shuffled_bytes(rng, data):
    """Bytes cut, with something after them, or with a bit flipped."""
    at, kind = rng.randrange(len(data) + 1), rng.randrange(3)
    if kind == 0 or not data:
        return data[:at]
    return data + bytes(rng.randrange(1, 5)) if kind == 1 else data[:at - 1] + bytes([data[at - 1] ^ 1]) + data[at:]


def shards(rng):
    """A folder of shards: ids, manifest or bytes changed."""
    dtype = rng.choice(("u16", "u32"))
    form = {"u16": "<u2", "u32": "<u4"}[dtype]
    parts = [[rng.randrange(V) for _ in range(rng.randrange(1, 40))] for _ in range(rng.choice((1, 1, 2, 3)))]
    if rng.random() < 0.2:
        ids = rng.choice(parts)
        ids[rng.randrange(len(ids))] = rng.choice((V - 1, V, V + 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1))
    data = [np.array(ids, np.int64).astype(form).tobytes() for ids in parts]
    if rng.random() < 0.1:
        at = rng.randrange(len(data))
        data[at] = shuffled_bytes(rng, data[at])
    files = {f"shard-{i:04d}.bin": raw for i, raw in enumerate(data)}
    if rng.random() < 0.1:
        return files
    entries = [{"file": name, "tokens": len(ids), "sha256": hashlib.sha256(raw).hexdigest()}
               for (name, raw), ids in zip(files.items(), parts, strict=True)]
    manifest = {"format": "apr-shards", "version": 1, "dtype": dtype, "token_count": sum(map(len, parts)),
                "documents": sum(ids.count(0) for ids in parts), "vocab_size": V, "eos_id": 0,
                "tokenizer_sha256": "0" * 64, "shards": entries}
    if rng.random() < 0.15:
        rng.choice(entries)["file"] = rng.choice([*filter(str, FILES), *files, "shard-0001.bin/", "./shard-0000.bin"])
    if rng.random() < 0.15:
        manifest["vocab_size"] = rng.choice((V - 1, V + 1, 5, 2**20, 2**20 + 1, *POWERS))
    if rng.random() < 0.5:
        change(rng, manifest, ["u16", "u32", "u64", 0, 1, -1, True, 1.0, None, "a" * 64, [], {}, *POWERS[:20]])
    if rng.random() < 0.1:
        name = rng.choice(list(files))
        files[name] = shuffled_bytes(rng, files[name])
    return {**files, "manifest.json": json_text(rng, manifest, 0.05)}


@functools.cache
def parameters():
    """The parameters of a small model, no two alike."""
    return {s.name: (np.arange(np.prod(s.shape)) + 256 * i).astype(np.float32).reshape(s.shape) / 1024
            for i, s in enumerate(param_specs(MODEL))}


def change_arrays(rng, arrays):
    """Drop, add, rename, retype or reshape one of some tensors, or put a number into it that is none."""
    name, choice = rng.choice(list(arrays)), rng.randrange(6)
    if choice == 0:
        del arrays[name]
    elif choice == 1:
        arrays[rng.choice(("x", "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"))] = rng.choice(
            (parameters()[EMBED], parameters()[NORM]))
    elif choice == 2:
        arrays[rng.choice((name + "x", NORM, BIAS))] = arrays.pop(name)
    elif choice == 3:
        arrays[name] = arrays[name].astype(rng.choice((np.float16, np.float64, np.int32)))
    elif choice == 4:
        arrays[name] = arrays[name].T.copy() if rng.random() < 0.5 else arrays[name].reshape(-1)
    else:
        arrays[name] = arrays[name].copy()
        arrays[name].reshape(-1)[-1] = rng.choice((np.nan, np.inf, -0.0))


def sharded(rng):
    """A Hugging Face folder in several files: what lies in them, the index or the files changed."""
    n = rng.randrange(1, 4)
    parts = [{} for _ in range(n)]
    for name, array in parameters().items():
        rng.choice(parts)[name] = array
    names = [f"model-{i}.safetensors" for i in range(n)]
    table = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    part = rng.choice([p for p in parts if p])
    if rng.random() < 0.3:
        change_arrays(rng, part)
    if rng.random() < 0.1:
        name = rng.choice(list(parameters()))
        part[name] = parameters()[name]
    files: dict[str, bytes | str] = {"config.json": json.dumps(to_hf(MODEL)).encode()}
    files |= {name: safetensors_bytes(part) for name, part in zip(names, parts, strict=True) if part}
    for _ in range(rng.choice((0, 0, 1, 2))):
        name = rng.choice([*table, "x", "model.layers.0.self_attn.rotary_emb.inv_freq"])
        table[name] = rng.choice((*FILES, *names))
        if rng.random() < 0.3:
            del table[name]
    if rng.random() < 0.15:  # one of them beside the folder, reached by a link or by its name
        name = rng.choice([name for name in names if name in files])
        files[OUTSIDE] = files.pop(name)
        if rng.random() < 0.5:
            files[name] = OUTSIDE
        else:
            table |= {tensor: OUTSIDE for tensor, file in table.items() if file == name}
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    if rng.random() < 0.1:
        change(rng, index)
    files[INDEX] = json_text(rng, index, 0.05)
    if rng.random() < 0.15:
        files[rng.choice((*names, INDEX, SINGLE))] = rng.choice(LINKS)
    if rng.random() < 0.1:
        files[rng.choice((*names, SINGLE))] = files.pop(rng.choice(list(files)))
    if rng.random() < 0.05:
        files = {"config.json": files.get("config.json", b"{}"), SINGLE: safetensors_bytes(parameters())}
    return files


def checkpoint(rng):
    """A checkpoint: configuration, tensors or state changed before its manifest was made, manifest and bytes after."""
    arrays, values, state = dict(parameters()), copy.deepcopy(to_hf(MODEL)), copy.deepcopy(STATE)
    moments = {f"{kind}.{name}": array for kind in "mv" for name, array in arrays.items()}
    which = rng.randrange(6)
    if which < 2:
        change_arrays(rng, (arrays, moments)[which])
    elif which == 2:
        change(rng, values)
    elif which < 5:
        change(rng, state)
    files = {"config.json": json_text(rng, values, 0.02), SINGLE: safetensors_bytes(arrays),
             "state.json": json_text(rng, state, 0.05), "optimizer.safetensors": safetensors_bytes(moments)}
    if rng.random() < 0.3:
        files[rng.choice(("tokenizer.json", "merges.txt", "notes.txt", "README.md"))] = b"{}"
    if rng.random() < 0.1:
        del files[rng.choice(list(files))]
    manifest = {"format": "apr-checkpoint", "version": 1, "step": 4, "files": listed(files)}
    if rng.random() < 0.25:
        change(rng, manifest)
    if rng.random() < 0.1:
        name = rng.choice(list(files))
        files[name] = shuffled_bytes(rng, files[name])
    if rng.random() < 0.05 and files:
        del files[rng.choice(list(files))]
    return {**files, "manifest.json": json_text(rng, manifest, 0.05)}


def alphabet():
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) if b in plain else chr(256 + rest.index(b)) for b in range(256)}


@functools.cache
def tokenizer_values():
    """A byte-level tokenizer as the `tokenizers` library writes it, put together by hand."""
    tokens = ["<|endoftext|>", *alphabet().values(), *WORDS]
    merges = [["t", "h"], ["h", "e"], ["th", "e"], ["Ġ", "t"], ["Ġ", "the"], ["i", "n"], ["1", "2"], ["Ġ", "Ġ"]]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [dict(EOS)], "normalizer": None,
            "pre_tokenizer": PART, "post_processor": None, "decoder": PART,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": False, "vocab": {token: i for i, token in enumerate(tokens)},
                      "merges": merges}}


def tokenizer_bytes(rng):
    """A tokenizer.json: vocabulary, merges, added tokens or parts changed."""
    values = copy.deepcopy(tokenizer_values())
    model = values["model"]
    vocab, added, merges = model["vocab"], values["added_tokens"], model["merges"]
    for _ in range(rng.choice((0, 1, 1, 2))):
        choice, token = rng.randrange(8), rng.choice((*WORDS, "a", "Q", "é", "new", "<|endoftext|>", "</s>"))
        if choice == 0:
            vocab[token] = rng.choice((0, 1, 5, 264, 265, 266, 1000, 2**20 - 1, 2**20, 2**32 - 1, -1, 1.0, None, "1"))
        elif choice == 1:
            vocab.pop(token, None)
        elif choice == 2:
            merges.insert(rng.randrange(9), rng.choice(MERGES))
        elif choice == 3:
            added.append({**EOS, "id": rng.choice((0, 5, 264, 265, 266, 5000, -1)), "content": token,
                          "special": rng.random() < 0.7})
        elif choice == 4:
            change(rng, added)
        elif choice == 5:
            part = rng.choice(list(PARTS))
            values[part] = copy.deepcopy(rng.choice(PARTS[part]))
        elif choice == 6:
            part = rng.choice(list(MODEL_PARTS))
            model[part] = rng.choice(MODEL_PARTS[part])
        else:
            change(rng, rng.choice((values, merges, values["pre_tokenizer"], values["decoder"])))
    text = json_text(rng, values, 0.05)
    if rng.random() < 0.05:  # a token twice
        text = text.replace(b'"vocab": {', b'"vocab": {' + rng.choice((b'"th": 257,', b'"a": 5,', b'"new": 265,')), 1)
    return text


def kernel_bytes(rng):
    """An entry of the kernel cache: head, JSON or code changed, the hash made to fit again in most cases."""
    header = {"key": "rmsnorm-" + "0" * rng.randrange(9), "meta": rng.choice(({}, {"arch": "sm_90", "n": [1, 2.5]}))}
    if rng.random() < 0.4:
        change(rng, header)
    text = json_text(rng, header)
    fields = [b"APRKERN1", struct.pack("<Q", len(text)), text, rng.randbytes(rng.choice((0, 1, 5, 40)))]
    if rng.random() < 0.3:
        fields[1] = number(rng, len(text), 8, 80)
    if rng.random() < 0.2:
        at = rng.randrange(4)
        fields[at] = rng.choice((*TEXTS, b"APRKERN2", fields[at][:-1], fields[at] + b"\0"))
    body = b"".join(fields)
    data = body + hashlib.sha256(body).digest()
    return shuffled_bytes(rng, data) if rng.random() < 0.15 else data
