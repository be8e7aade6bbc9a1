"""Hugging Face folders whose index, configuration, tensors and text files do not fit each other, or lead elsewhere."""

import json

import numpy as np
from hf_models import safetensors_bytes, write_folder, write_index
from hostile import CONFIG, FORMAT, NOT_FOUND, Case
from hostile_models import BIAS, EMBED, MODEL, NORM, TENSORS, arrays, poked
from hostile_tensors import BAD_JSON, replaced, special_files

from apr.hf_config import to_hf

INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00003.safetensors"


def folder(change=lambda out: None, shards=1, after=lambda path: None, config=MODEL, **values):
    """A `write` of a folder: tensors and configuration changed, then `after(path)`."""
    def write(parent):
        given = arrays(config)
        change(given)
        path = write_folder(parent / "hf-model", config, given, shards, {**to_hf(config), **values},
                            {"generation_config.json": '{"eos_token_id": [1, 2]}', "merges.txt": "a b\n"})
        after(path)
        return path
    return write


def remap(change):
    """A folder of three shards whose weight_map is changed."""
    def after(path):
        table = json.loads((path / INDEX).read_text())["weight_map"]
        change(table)
        write_index(path, table)
    return folder(shards=3, after=after)


def text(name, data):
    """A folder of three shards with another file in the place of one."""
    return folder(shards=3, after=lambda path: (path / name).write_bytes(data))


def link(name, target):
    """A folder with a link in the place of one of its files."""
    def after(path):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(target)
    return folder(shards=3, after=after)


def index_cases():
    def case(what, write, code=FORMAT, says=INDEX, cli=False):
        return Case("B10", "hf", what, write, code, says, cli)

    for name in ("../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "a/x.safetensors", ".x.safetensors",
                 "..", "", "config.json", "x\0.safetensors", "x\n.safetensors", "n" * 300 + ".safetensors",
                 "\\x.safetensors", "~.safetensors", "é.safetensors", "C:x.safetensors"):
        yield case(f"a tensor in {name[:24]!r}", remap(lambda t, name=name: t.update({NORM: name})),
                   cli=name.startswith("../"))
    for value in (None, 5, True, [], {}, ["x.safetensors"]):
        yield case(f"a tensor in {value!r}", remap(lambda t, value=value: t.update({NORM: value})))
    million = '{"weight_map": {' + ",".join(f'"t{i}": "{i}.safetensors"' for i in range(10**5)) + "}}"
    yield case("100,000 files", text(INDEX, million.encode()), cli=True)
    yield case("1,000,000 files", lambda parent: text(INDEX, b'{"weight_map": {' + b",".join(
        b'"%d": "%d.safetensors"' % (i, i) for i in range(10**6)) + b"}}")(parent), cli=True)
    yield case("listed, not in its file", remap(lambda t: t.update(extra=SHARD)), says="'extra'")
    yield case("in a file, not listed", remap(lambda t: t.pop(NORM)), says=NORM)
    yield case("listed for another file", remap(lambda t: t.update({NORM: next(v for v in sorted(set(t.values()))
                                                                               if v != t[NORM])})), says="listed")
    yield case("a file that is not there", remap(lambda t: t.update(x="x.safetensors")), NOT_FOUND, "x.safetensors")
    yield case("the same tensors in two files", folder(shards=3, after=lambda path: (path / SHARD).write_bytes(
        (path / "model-00001-of-00003.safetensors").read_bytes())), says="too")
    yield case("both kinds", folder(shards=3, after=lambda path: (path / "model.safetensors").write_bytes(
        safetensors_bytes(arrays()))), says="one of")
    for what, value in (("a list", []), ("no table", {}), ("an empty table", {"weight_map": {}}),
                        ("a text", {"weight_map": "x"})):
        yield case(f"index is {what}", text(INDEX, json.dumps(value).encode()))
    for name in (INDEX, SHARD, "config.json", "merges.txt", "generation_config.json"):
        for target in ("/etc/passwd", "../secret", "/dev/zero", "/proc/self/environ", "/proc/self/mem", "."):
            yield case(f"{name} is a link to {target}", link(name, target), says=name,
                       cli=(name, target) == ("merges.txt", "/etc/passwd"))


def file_cases():
    def case(row, what, write, code=FORMAT, says="", cli=False):
        return Case(row, "hf", what, write, code, says, cli)

    whole = safetensors_bytes(arrays())
    for n in range(0, len(whole), max(1, len(whole) // 100)):
        yield case("B1", f"weights cut to {n} bytes", folder(after=lambda path, n=n: (
            path / "model.safetensors").write_bytes(whole[:n])), says="model.safetensors")
    for name in ("config.json", INDEX, "generation_config.json"):
        for what, value in BAD_JSON.items():
            yield case("B8", f"{name}: {what}", text(name, b'{"k": ' + value + b"}"), says=name,
                       cli=what == "200k levels")
        yield case("B8", f"{name}: 17 MB of spaces", text(name, b"{" + b" " * (17 * 2**20) + b"}"), says=name)
    for eos in (True, -1, "2", [1, None], 2.0, {}, [[1]]):
        yield case("B8", f"eos {eos!r}", text("generation_config.json", json.dumps({"eos_token_id": eos}).encode()),
                   says="eos_token_id")
    yield case("B8", "a text file that is none", text("merges.txt", b"a\xff"), says="merges.txt", cli=True)
    for name in ("config.json", "model.safetensors"):
        for what, write in special_files(name).items():
            yield case("B13", f"{name} is {what}", replaced(folder(), name, write), says=name, cli=what == "FIFO")
    for what, write in special_files("merges.txt").items():
        if what in ("FIFO", "/dev/zero", "folder", "socket", "pickle"):
            yield case("B13", f"merges.txt is {what}", replaced(folder(), "merges.txt", write), says="merges.txt")
    yield case("B13", "only a pickle", folder(after=lambda path: (path / "model.safetensors").rename(
        path / "pytorch_model.bin")), NOT_FOUND, "pickled")


def tensor_cases():
    for what, (row, change, config, says) in TENSORS.items():
        if what != "tied head given":  # which is allowed where it is the embedding
            yield Case(row, "hf", what, folder(change, config=config), FORMAT, says, cli=what == "missing bias")
            yield Case(row, "hf", f"{what}, three files", folder(change, 3, config=config), FORMAT, says)
    head = np.full((16, 8), 0.5, np.float32)
    head[15, 7] = 0.25
    yield Case("B15", "hf", "tied head that is another", folder(lambda a: a.update({"lm_head.weight": head})), FORMAT,
               "lm_head.weight", cli=True)
    yield Case("B16", "hf", "the last element NaN", folder(poked(BIAS, *[0.5] * 7, np.nan)), FORMAT, BIAS)
    for what, change, code, says in (
            ("no theta", {"rope_theta": None}, CONFIG, "rope_theta"),
            ("encoder", {"model_type": "bert"}, CONFIG, "ARCH-007"),
            ("quantised", {"quantization_config": {}}, CONFIG, "quantization_config"),
            ("2^31-1 layers", {"num_hidden_layers": 2**31 - 1}, CONFIG, "num_hidden_layers"),
            ("another family", {"model_type": "llama"}, FORMAT, BIAS),
            ("untied", {"tie_word_embeddings": False}, FORMAT, "lm_head.weight"),
            ("another width", {"hidden_size": 16}, FORMAT, EMBED)):
        yield Case("H3", "hf", f"config.json: {what}", folder(**change), code, says, cli=what == "2^31-1 layers")


def cases():
    return [*index_cases(), *file_cases(), *tensor_cases()]
