"""For the fuzzer: what valid shards, sharded models, checkpoints, tokenizers and kernel cache entries are and mean.

As in fuzz_rules: what the files mean, or an exception; None where these rules cannot say (tokenizers of other kinds).
"""

import hashlib
import json
import re
import struct
from itertools import pairwise

import numpy as np
from fuzz_folders import EOS, INDEX, SINGLE, STATE, V, alphabet, tokenizer_values
from fuzz_rules import config, json_value, real, strict, whole
from oracles import require, safetensors_tensors

FLOATS = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
TEXT_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
              "merges.txt", "generation_config.json", "chat_template.jinja"}
BARE = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)
BUFFER = re.compile(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq")
LATER = {"skipped", "passed_over"}  # of the loop: what the first version did not write
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")
PROBES = ("the thin  12 then\n", "\tHe's in \u65e5\u672c, na\u00efve_9 \U0001f642 \x7f", "")
PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def shards(files):
    """Token ids of a folder of shards, and where its documents begin."""
    if "manifest.json" not in files:
        names, form, vocab, eos = sorted(files), "<u4", V, None
        require(all(len(files[name]) > 0 and len(files[name]) % 4 == 0 for name in names), "size")
    else:
        m = json_value(files["manifest.json"])
        require(m["format"] == "apr-shards" and whole(m["version"], 1, 1), "format")
        form, vocab = {"u16": "<u2", "u32": "<u4"}[m["dtype"]], min(V, whole(m["vocab_size"], 1, 2**20))
        eos = whole(m["eos_id"], 0, m["vocab_size"] - 1)
        strict(m["tokenizer_sha256"], str)
        whole(m["documents"], 0)
        names = [s["file"] for s in m["shards"]]
        require(names and len(set(names)) == len(names), "names")
        require(whole(m["token_count"]) == sum(whole(s["tokens"]) for s in m["shards"]), "sum")
        for s in m["shards"]:
            require(re.fullmatch(r"\w[\w.-]*", s["file"], re.ASCII) and len(s["file"]) <= 128, "a bare name")
            require(len(files[s["file"]]) == s["tokens"] * int(form[-1]), "tokens")
            require(hashlib.sha256(files[s["file"]]).hexdigest() == s["sha256"], "hash")
    ids = [i for name in names for i, in struct.iter_unpack("<H" if form == "<u2" else "<I", files[name])]
    require(max(ids) < vocab, "an id")
    starts = {0, *(at + 1 for at, i in enumerate(ids) if i == eos)} - {len(ids)}
    return ids, sorted(starts)


def shapes(c):
    """The shapes of a model's parameters."""
    C, F, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    rows = {"q": c["num_attention_heads"] * d, "k": c["num_key_value_heads"] * d, "v": c["num_key_value_heads"] * d}
    require(c["num_hidden_layers"] < 100, "many layers")
    out = {"model.embed_tokens.weight": (c["vocab_size"], C), "model.norm.weight": (C,)}
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"{at}{name}.weight"] = C,
        for name, n in rows.items():
            out[f"{at}self_attn.{name}_proj.weight"] = n, C
            out |= {f"{at}self_attn.{name}_proj.bias": (n,)} if c["use_bias"] else {}
            out |= {f"{at}self_attn.{name}_norm.weight": (d,)} if c["qk_norm"] and name != "v" else {}
        out[f"{at}self_attn.o_proj.weight"] = C, rows["q"]
        out |= {f"{at}mlp.{name}_proj.weight": (F, C) for name in ("gate", "up")}
        out[f"{at}mlp.down_proj.weight"] = C, F
    return out if c["tie_word_embeddings"] else {**out, "lm_head.weight": (c["vocab_size"], C)}


def stored(data):
    """Type, shape and bytes of every tensor of a safetensors file."""
    header = json.loads(data[8:8 + struct.unpack_from("<Q", data)[0]])
    return {name: (header[name]["dtype"], tuple(header[name]["shape"]), raw)
            for name, raw in safetensors_tensors(data).items()}


def sharded(files):
    """The bytes of every parameter of a Hugging Face folder whose files are its own."""
    def content(name, hops=4):
        require(hops and "/" not in name, "a loop of links, a file elsewhere")
        return files[name] if isinstance(files[name], bytes) else content(files[name], hops - 1)

    expected, found, table = shapes(config(content("config.json"))), {}, None
    if INDEX in files:
        table = json_value(content(INDEX))["weight_map"]
        require(table and all(BARE.fullmatch(file) for file in table.values()), "files")
        require(SINGLE not in files or SINGLE in table.values(), "both kinds")
    for file in sorted(set(table.values())) if table is not None else [SINGLE]:
        inside = stored(content(file))
        require(table is None or inside.keys() == {n for n, f in table.items() if f == file}, "listed")
        require(not inside.keys() & found.keys(), "in two files")
        found |= inside
    found = {n: t for n, t in found.items() if not BUFFER.fullmatch(n)}
    if "lm_head.weight" not in expected and "lm_head.weight" in found:
        require(found.pop("lm_head.weight") == found["model.embed_tokens.weight"], "a head that is tied")
    require({n: s for n, (_, s, _) in found.items()} == expected, "shapes")
    for dtype, _, raw in found.values():
        require(dtype in ("F32", "F16") and np.isfinite(np.frombuffer(raw, FLOATS[dtype])).all(), "finite")
    return {n: raw for n, (_, _, raw) in found.items()}


def checkpoint(files):
    """Configuration, parameters, moments and state of a checkpoint."""
    m = json_value(files["manifest.json"])
    needed = {"config.json", SINGLE, "optimizer.safetensors", "state.json"}
    require(m["format"] == "apr-checkpoint" and whole(m["version"], 1, 1), "format")
    require(m["files"].keys() - TEXT_FILES == needed, "files")
    for name, entry in m["files"].items():
        require(whole(entry["size"], 0) == len(files[name]), "size")
        require(entry["sha256"] == hashlib.sha256(files[name]).hexdigest(), "hash")
    model, found = config(files["config.json"]), stored(files[SINGLE])
    expected = shapes(model)
    require({n: s for n, (_, s, _) in found.items()} == expected, "parameters")
    with np.errstate(over="ignore"):
        params = {n: np.frombuffer(raw, FLOATS[dtype]).astype("<f4") for n, (dtype, _, raw) in found.items()}
    require(all(np.isfinite(a).all() for a in params.values()), "finite")
    moments = stored(files["optimizer.safetensors"])
    require({name: t[:2] for name, t in moments.items()}
            == {f"{kind}.{name}": ("F32", shape) for kind in "mv" for name, shape in expected.items()}, "moments")
    state = run_state(json_value(files["state.json"]))
    require(state["step"] == whole(m["step"], 0), "step")
    return model, {n: a.tobytes() for n, a in params.items()}, {n: t[2] for n, t in moments.items()}, state


def run_state(s):
    """A state.json: every field that has been there from the first, numbers from 0, and the loop at the same step."""
    require(s.keys() | {"trainer"} == STATE.keys() and s["data"].keys() == STATE["data"].keys(), "keys")
    loop = {"skipped": 0, "passed_over": [], **s["loop"]}
    require(s["loop"].keys() | LATER == STATE["loop"].keys() and loop["step"] == s["step"], "the loop")
    for value in (s["step"], s["optimizer_step"], s["log_bytes"],
                  *(loop[key] for key, known in STATE["loop"].items() if type(known) is int)):
        whole(value, 0)
    loop["passed_over"] = [(whole(first, 0), whole(last, first)) for first, last in strict(loop["passed_over"], list)]
    whole(s["data"]["passes"])
    for value in (s["data"]["fingerprint"], s["parameters_sha256"], s["optimizer_sha256"]):
        strict(value, str)
    strict(s.get("trainer", {}), dict)
    require(s["artifact"] is None or type(s["artifact"]) is dict, "artifact")
    for key in ("val_losses", "losses"):
        loop[key] = [real(x) for x in strict(loop[key], list)]
    for key, known in STATE["loop"].items():
        if type(known) is float and (key, loop[key]) != ("initial_val_loss", None):
            loop[key] = real(loop[key])
    return {"trainer": {}, **s, "loop": loop}


def tokenizer(data):
    """Vocabulary, end of text and the ids of some probes, of a byte-level BPE of the ordinary kind; else None."""
    values, ordinary = json_value(data), tokenizer_values()
    model, added = values["model"], values["added_tokens"]

    def flags(token):
        return json.dumps({**token, "id": 0, "content": ""}, sort_keys=True)

    def parts(of):
        """All but what differs from one ordinary tokenizer to the next, so that 0 is not False."""
        model = {k: v for k, v in of["model"].items() if k not in ("vocab", "merges")}
        return json.dumps({**of, "added_tokens": [], "model": model}, sort_keys=True)

    if parts(values) != parts(ordinary) or any(flags(token) != flags(EOS) for token in added):
        return None
    vocab, merges = {t: whole(i, 0, 2**32 - 1) for t, i in model["vocab"].items()}, [tuple(p) for p in model["merges"]]
    if len(set(merges)) != len(merges) or len({t["content"] for t in added}) != len(added):
        return None
    for a, b in merges:
        require(a in vocab and b in vocab and a + b in vocab, "a merge of no tokens")
    for token in added:  # one beyond the vocabulary has the next id, or the library gives it that
        require(vocab.setdefault(strict(token["content"], str), len(vocab)) == whole(token["id"], 0), "another id")
    require(len(set(vocab.values())) == len(vocab) and max(vocab.values()) < 2**20, "ids")
    require(set(alphabet().values()) <= vocab.keys(), "bytes")
    end = next(vocab[t] for t in (*ENDS, None) if t in vocab or require(t, "an end of text"))
    ranks, byte_of = {pair: i for i, pair in enumerate(merges)}, {letter: byte for byte, letter in alphabet().items()}
    for token in [t["content"] for t in added if set(t["content"]) <= byte_of.keys()]:  # left out when ids become text
        text = bytes(byte_of[letter] for letter in token).decode("utf-8", "replace")
        require(vocab[token] not in bpe(text, vocab, ranks), "a special token that a text gives")
    return vocab, end, [bpe(probe, vocab, ranks) for probe in PROBES]


def bpe(text, vocab, ranks):
    """The ids of a text: GPT-2's pieces, in each the pair of lowest rank joined first."""
    ids, letters = [], alphabet()
    for piece in PIECES.findall(text):
        parts = [letters[b] for b in piece.encode()]
        while pairs := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
            _, at = min(pairs)
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        ids += [vocab[p] for p in parts]
    return ids


def kernel(data):
    """Key, metadata and code of an entry of the kernel cache."""
    magic, length = struct.unpack_from("<8sQ", data)
    body, code = data[:-32], data[16 + length:-32]
    require(magic == b"APRKERN1" and hashlib.sha256(body).digest() == data[-32:] and code, "entry")
    header = json_value(body[16:16 + length])
    require(header.keys() == {"key", "meta"}, "header")
    return strict(header["key"], str), strict(header["meta"], dict), code
