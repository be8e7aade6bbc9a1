"""Models and checkpoints whose tensors, configuration and manifest do not fit each other."""

import dataclasses
import functools
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
from hostile import CONFIG, FORMAT, INTEGRITY, NOT_FOUND, Case, put
from hostile_tensors import BAD_JSON, replaced, special_files

from apr.formats.apr_file import write_apr
from apr.formats.model_file import model_metadata
from apr.formats.safetensors import write_safetensors
from apr.hf_config import to_hf
from apr.params import param_specs
from apr.presets import qwen2_0_5b, tiny
from apr.train.checkpoint import write_checkpoint

SIZE = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 32}
MODEL = dataclasses.replace(qwen2_0_5b, **SIZE)  # biases, tied head
UNTIED = dataclasses.replace(tiny, **SIZE)
BIAS, NORM, EMBED = "model.layers.0.self_attn.q_proj.bias", "model.norm.weight", "model.embed_tokens.weight"
STATE = {"step": 1, "parameters_sha256": "", "optimizer_sha256": "", "loop": {}, "data": {}}


def arrays(config=MODEL):
    """Parameters of a model, all 0.5."""
    return {s.name: np.full(s.shape, 0.5, np.float32) for s in param_specs(config)}


def changed(change, config=MODEL):
    """Parameters of a model after `change(arrays)`."""
    out = arrays(config)
    change(out)
    return out


def poked(name, *values, dtype=np.float32):
    """A change that sets the first elements of a tensor."""
    def change(out):
        out[name] = out[name].astype(dtype)
        out[name].reshape(-1)[:len(values)] = values
    return change


def model(change=lambda out: None, config=MODEL, **metadata):
    """A `write` of an .apr file of this model, tensors and metadata changed."""
    def write(folder):
        known = model_metadata(config, "x", None, None)
        write_apr(folder / "model.apr", changed(change, config), {**known, **metadata})
        return folder / "model.apr"
    return write


TENSORS = {  # row, change, configuration, what the message says
    "missing bias": ("B15", lambda a: a.pop(BIAS), MODEL, BIAS),
    "missing norm": ("B15", lambda a: a.pop(NORM), MODEL, NORM),
    "extra tensor": ("B15", lambda a: a.update(extra=np.zeros(3, np.float32)), MODEL, "'extra'"),
    "renamed": ("B15", lambda a: a.update({"model.norm.gamma": a.pop(NORM)}), MODEL, NORM),
    "bias of a model without": ("B15", lambda a: a.update({BIAS: np.zeros(8, np.float32)}), UNTIED, BIAS),
    "tied head given": ("B15", lambda a: a.update({"lm_head.weight": a[EMBED]}), MODEL, "lm_head.weight"),
    "untied head absent": ("B15", lambda a: a.pop("lm_head.weight"), UNTIED, "lm_head.weight"),
    "transposed": ("B6", lambda a: a.update({EMBED: a[EMBED].T.copy()}), MODEL, "shape [16, 8]"),
    "one row more": ("B6", lambda a: a.update({EMBED: np.zeros((17, 8), np.float32)}), MODEL, EMBED),
    "flat": ("B6", lambda a: a.update({EMBED: a[EMBED].reshape(-1)}), MODEL, EMBED),
    "whole numbers": ("B6", lambda a: a.update({NORM: np.ones(8, np.int32)}), MODEL, NORM),
    "NaN": ("B16", poked(NORM, 1, 1, np.nan), MODEL, "nan at element 2"),
    "Inf": ("B16", poked(NORM, np.inf), MODEL, "inf at element 0"),
    "Inf and -Inf": ("B16", poked(NORM, np.inf, -np.inf), MODEL, NORM),
    "1e300": ("B16", poked(NORM, 1e300, dtype=np.float64), MODEL, NORM),
}


def model_cases():
    for what, (row, change, config, says) in TENSORS.items():
        yield Case(row, "model", what, model(change, config), FORMAT, says,
                   cli=what in ("missing bias", "NaN", "Inf and -Inf"))
    hf = to_hf(MODEL)
    contradictions = {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "num_layers": 2, "rope_type": 0, "head_dim": 8,
                      "vocab_size": "16",
                      "architecture": "llama", "param_count": 1}
    for key, value in contradictions.items():
        yield Case("B15", "model", f"{key} {value!r} beside another in hf_config", model(**{key: value}), FORMAT, key)
    for what, value, code, says in (
            ("is a text", "llama", CONFIG, "JSON object"), ("true for a size", {**hf, "hidden_size": True}, CONFIG,
                                                            "hidden_size"),
            ("2^31-1 layers", {**hf, "num_hidden_layers": 2**31 - 1}, CONFIG, "num_hidden_layers"),
            ("no theta", {k: v for k, v in hf.items() if k != "rope_theta"}, CONFIG, "rope_theta")):
        yield Case("B8", "model", f"hf_config {what}", model(hf_config=value), code, says, cli=what == "2^31-1 layers")

    def without(folder):
        metadata = {k: v for k, v in model_metadata(MODEL, "x", None, None).items() if k != "hf_config"}
        write_apr(folder / "model.apr", arrays(), metadata)
        return folder / "model.apr"

    yield Case("B15", "model", "no configuration", without, FORMAT, "hf_config")
    for what, value in (("a list", []), ("../x", {"../x": "a"}), ("config.json", {"config.json": "{}"}),
                        ("a number", {"merges.txt": 5}),
                        ("bad eos", {"generation_config.json": '{"eos_token_id": -1}'}),
                        ("deep", {"generation_config.json": "[" * 200_000})):
        yield Case("B8", "model", f"hf_assets: {what}", model(hf_assets=value), FORMAT, cli=what == "../x")
    for value in (5, "", "{}", None):
        yield Case("B8", "apr", f"tokenizer.json {value!r} in the metadata", model(**{"tokenizer.json": value}), FORMAT)


@functools.cache
def checkpoint_files() -> dict[str, bytes]:
    """The files of a good checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        moments = {f"{kind}.{name}": array for kind in "mv" for name, array in arrays().items()}
        path = write_checkpoint(Path(folder), 1, MODEL, arrays(), moments, STATE, None)
        return {p.name: p.read_bytes() for p in path.iterdir()}


def listed(content):
    """The files of a manifest that fits."""
    return {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in content.items() if name != "manifest.json"}


def checkpoint(seal=True, **files):
    """A `write` of a checkpoint with other files (by stem); `seal` makes the manifest fit them."""
    def write(folder):
        path = folder / "step-00000001"
        path.mkdir()
        content = dict(checkpoint_files())
        for stem, value in files.items():
            name = next(n for n in content if n.startswith(stem))
            content[name] = value() if callable(value) else value if isinstance(value,
                                                                                bytes) else json.dumps(value).encode()
        if seal:
            manifest = json.loads(checkpoint_files()["manifest.json"])
            content["manifest.json"] = json.dumps({**manifest, "files": listed(content)}).encode()
        for name, data in content.items():
            (path / name).write_bytes(data)
        return path
    return write


def tensors(change):
    """The bytes of a checkpoint's model.safetensors after a change."""
    def make():
        with tempfile.TemporaryDirectory() as folder:
            write_safetensors(Path(folder) / "x", changed(change), {})
            return (Path(folder) / "x").read_bytes()
    return make


def checkpoint_cases():
    def case(row, what, write, code=FORMAT, says="", cli=False):
        return Case(row, "checkpoint", what, write, code, says, cli)

    hf, manifest = to_hf(MODEL), {"format": "apr-checkpoint", "version": 1, "step": 1}
    for what, change, code, says in (
            ("no theta", {"rope_theta": None}, CONFIG, "rope_theta"),
            ("no eps", {"rms_norm_eps": None}, CONFIG, "rms_norm_eps"),
            ("encoder", {"model_type": "bert"}, CONFIG, "ARCH-007"),
            ("misspelt eps", {"rms_norm_epsilon": 1e-5}, CONFIG, "'rms_norm_eps'"),
            ("another size", {"hidden_size": 4, "head_dim": 2}, FORMAT, "shape [16, 4]"),
            ("another family", {"model_type": "llama"}, FORMAT, BIAS)):
        yield case("H3", f"config.json: {what}", checkpoint(config={**hf, **change}), code, says,
                   cli=what in ("encoder", "misspelt eps"))
    nan = json.dumps({**hf, "rms_norm_eps": float("nan")}).encode()
    yield case("B8", "config.json: NaN eps", checkpoint(config=nan), says="config.json", cli=True)
    yield case("B8", "config.json: true for a size", checkpoint(config={**hf, "hidden_size": True}), CONFIG,
               "hidden_size")
    yield case("B16", "NaN weight", checkpoint(model=tensors(poked(NORM, np.nan))), says=NORM, cli=True)
    yield case("B15", "missing bias", checkpoint(model=tensors(lambda a: a.pop(BIAS))), says=BIAS)
    yield case("B15", "moments of another model", checkpoint(optimizer=tensors(lambda a: None)),
               says="optimizer.safetensors")
    for name in ("config", "model", "optimizer", "state"):
        whole = checkpoint_files()[next(n for n in checkpoint_files() if n.startswith(name))]
        cut, flipped = whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])
        yield case("A8", f"{name}, a bit flipped", checkpoint(False, **{name: flipped}), INTEGRITY, "SHA-256")
        yield case("A8", f"{name} cut, manifest not", checkpoint(False, **{name: cut}), INTEGRITY, name,
                   cli=name == "model")
        yield case("B1", f"{name} cut, manifest too", checkpoint(**{name: cut}), says=name)
        yield case("B1", f"{name} empty, manifest too", checkpoint(**{name: b""}), says=name)
    for key in STATE:
        yield case("B15", f"state.json without {key}", checkpoint(state={k: v for k, v in STATE.items() if k != key}),
                   says="state.json")
    yield case("B15", "state.json of another step", checkpoint(state={**STATE, "step": 2}), says="state.json")
    for what, text in BAD_JSON.items():
        for name in ("state", "config"):
            yield case("B8", f"{name}.json: {what}", checkpoint(**{name: b'{"step": ' + text + b"}"}), says=name)
    files = listed(checkpoint_files())
    for name in ("../x", "/etc/passwd", "a/../../b", "..", "", "a\0", "n" * 300):
        more = {**files, name: {"size": 1, "sha256": ""}}
        yield case("B10", f"manifest lists {name[:20]!r}", checkpoint(False, manifest={**manifest, "files": more}),
                   cli=name == "../x")
    for what, value in (("no files", {}), ("files a list", []), ("entries are numbers", dict.fromkeys(files, 5)),
                        ("sizes true", {name: {"size": True} for name in files})):
        code = FORMAT if what in ("no files", "files a list") else INTEGRITY
        yield case("B4", f"manifest: {what}", checkpoint(False, manifest={**manifest, "files": value}), code)
    for change in ({"format": "x"}, {"version": 2}, {"step": 2}):
        yield case("B6", f"manifest: {change}", checkpoint(False, manifest={**manifest, "files": files, **change}))
    for what, write in special_files("manifest.json").items():
        regular = what not in ("FIFO", "/dev/zero", "folder", "socket")
        yield case("B13", f"manifest is {what}", replaced(checkpoint(), "manifest.json", write),
                   FORMAT if regular else NOT_FOUND, "manifest.json")


def run_folder(lines):
    """A `write` of a run whose log goes on with these lines."""
    def write(folder):
        (folder / "run").mkdir()
        (folder / "run" / "run.json").write_bytes(b"{}")
        put("train.jsonl", b'{"event": "start"}\n' + lines)(folder / "run")
        return folder / "run"
    return write


def log_cases():
    for what, text in {**BAD_JSON, "a number": b"5", "a list": b"[]", "blank": b" "}.items():
        yield Case("B8", "log", f"line 2: {what}", run_folder(text + b"\n"), FORMAT, "train.jsonl line 2")


def cases():
    return [*model_cases(), *checkpoint_cases(), *log_cases()]
