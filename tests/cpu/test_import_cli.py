"""`apr import` and `apr export` as a person or script meets them, and the hub behind a fake that raises its errors."""

import importlib
import json
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hf_models import BF16, LLAMA, QWEN2, TEXTS, bits, random_arrays, read_all, write_folder
from huggingface_hub import errors

from apr.cli import hub
from apr.cli.main import main
from apr.formats.apr_file import open_apr
from apr.formats.open_model import open_model
from apr.params import EMBED, param_specs

try:  # the library that the package sends its requests by has changed its name
    http = importlib.import_module("httpx2")
except ImportError:
    http = importlib.import_module("httpx")

GOLDEN = Path(__file__).parents[1] / "golden" / "hf" / "qwen2"


@pytest.fixture
def model(tmp_path):
    """A Hugging Face folder m and its tensors."""
    arrays = random_arrays(QWEN2, BF16)
    return write_folder(tmp_path / "m", QWEN2, arrays, 3, assets=TEXTS), arrays


def apr(capsys, *arguments):
    """Run a command in this process; returns (exit code, stdout, stderr)."""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_import_prints_what_it_understood(model, tmp_path, capsys):
    code, out, err = apr(capsys, "import", model[0], "-o", tmp_path / "m.apr")
    assert (code, err) == (0, "")
    for line in ("rope_theta 1000000 from config.json", "rms_norm_eps 1e-06 from config.json", "qkv bias: 6 tensors",
                 f"tied head: lm_head is {EMBED}", "eos ids [5, 3] from generation_config.json",
                 f"stored as BF16: {len(param_specs(QWEN2))} tensors"):
        assert f"{line}\n" in out
    assert f"wrote {tmp_path / 'm.apr'}: 26 of 26 tensors" in out
    with open_model(tmp_path / "m.apr") as source:
        assert read_all(source) == {name: bits(array) for name, array in model[1].items()}


def test_there_and_back_in_json(model, tmp_path, capsys):
    code, out, _ = apr(capsys, "import", model[0], "-o", tmp_path / "m.apr", "--dtype", "f32", "--json")
    told = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert (told["source_format"], told["format"], told["dtype"], told["tensors"]) == ("hf", "apr", "F32", 26)
    assert told["output"] == str(tmp_path / "m.apr") and "qkv bias: 6 tensors" in told["facts"]
    code, out, _ = apr(capsys, "export", tmp_path / "m.apr", "--format", "hf", "-o", tmp_path / "b", "--dtype", "bf16",
                       "--json")
    assert code == 0
    assert json.loads(out)["files"] == sorted([*TEXTS, "config.json", "model.safetensors"])
    with open_model(tmp_path / "b") as source:
        assert read_all(source) == {name: bits(array) for name, array in model[1].items()}
    code, out, _ = apr(capsys, "export", tmp_path / "b", "--format", "safetensors", "-o", tmp_path / "w.safetensors")
    assert code == 0 and "as stored" in out and (tmp_path / "w.safetensors").is_file()


def test_inspect_shows_a_folder(model, capsys):
    code, out, _ = apr(capsys, "inspect", model[0])
    assert code == 0 and "  qkv bias: 6 tensors\n" in out and f"BF16  97x32            {EMBED}\n" in out
    found = json.loads(apr(capsys, "inspect", model[0], "--json")[1])
    assert found["kind"] == "model" and sum(t["bytes"] for t in found["tensors"]) == 2 * found["parameters"]


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["import", "nowhere", "-o", "x.apr"], 3, "nowhere"), (["import", "m", "-o", "m"], 2, "choose another --output"),
    (["import", "m"], 2, "--output"), (["import", "m", "-o", "x.apr", "--revision", "main"], 2, "--revision"),
    (["import", "m", "-o", "x.apr", "--dtype", "q8_0"], 2, "q8_0"), (["import", "e", "-o", "x.apr"], 2, "ARCH-007"),
    (["import", "text", "-o", "x.apr"], 4, "text: expected an .apr or GGUF file"),
    (["import", "a/b.apr", "-o", "x.apr"], 3, "a/b.apr"), (["import", "m", "-o", "no/x.apr"], 3, "no/x.apr"),
    (["export", "m", "--format", "hf", "-o", "m"], 2, "a path that does not exist yet"),
    (["export", "m", "--format", "hf", "-o", "x", "--dtype", "q8_0"], 2, "--format gguf"),
    (["export", "m", "--format", "onnx", "-o", "x"], 2, "onnx"), (["export", "m", "-o", "x"], 2, "--format"),
    (["export", "big", "--format", "hf", "-o", "x", "--dtype", "f16"], 4, EMBED),
    (["export", "nan", "--format", "hf", "-o", "x"], 4, "finite")])
def test_refusals_are_one_line_with_the_right_code(arguments, code, says, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "e", LLAMA, {}, values={"model_type": "bert"})
    for name, value in (("big", 1e5), ("nan", np.nan)):
        arrays = random_arrays(LLAMA)
        arrays[EMBED][1, 1] = value
        write_folder(tmp_path / name, LLAMA, arrays)
    (tmp_path / "text").write_text("hello")
    before = sorted(p.name for p in tmp_path.iterdir())
    found, out, err = apr(capsys, *arguments)
    assert (found, out) == (code, "") and says in err
    assert err.startswith("apr: ") and err.count("\n") == 1 and "internal error" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def response(status):
    """What the hub answered."""
    return http.Response(status, request=http.Request("GET", "https://huggingface.co/api/models/a/b"))


FAILURES = {  # what the package raises: exit code, what the line says
    "gated": (errors.GatedRepoError("403 Client Error.\nAccess is restricted", response=response(403)), 9,
              "accept the terms at https://huggingface.co/a/b, then run 'hf auth login'"),
    "missing": (errors.RepositoryNotFoundError("404 Client Error.\nmore", response=response(404)), 3,
                "a path here, or a model of the hub"),
    "revision": (errors.RevisionNotFoundError("404 Client Error.", response=response(404)), 3, "check --revision"),
    "offline": (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE=1\nis set"), 9, "OfflineModeIsEnabled: HF_HUB_OFFLINE=1"),
    "not cached": (errors.LocalEntryNotFoundError("Got: ConnectError: no route\nAn error happened"), 9,
                   "LocalEntryNotFoundError: Got: ConnectError: no route"),
    "server": (errors.HfHubHTTPError("500 Server Error", response=response(500)), 9, "HfHubHTTPError: 500 Server"),
    "proxy": (http.ProxyError("no proxy"), 9, "ProxyError: no proxy"),
    "name": (errors.HFValidationError("Repo id must not have --"), 2, "OWNER/NAME of a model"),
    "disk": (OSError(28, "No space left on device"), 7, "room to write"),
}


@pytest.mark.parametrize(("error", "code", "says"), FAILURES.values(), ids=FAILURES)
def test_what_the_hub_answers_is_one_line(error, code, says, tmp_path, capsys, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    found, out, err = apr(capsys, "import", "a/b", "-o", "x.apr")
    assert (found, out) == (code, "") and says in err
    assert err.startswith("apr: a/b") and err.count("\n") == 1


def test_a_model_of_the_hub(model, tmp_path, capsys, monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(model[0])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    code, out, err = apr(capsys, "import", "Qwen/Qwen2.5-0.5B", "--revision", "v1", "-o", "x.apr")
    assert (code, err) == (0, "") and out.startswith("Qwen/Qwen2.5-0.5B from the hub, revision m\n")
    assert asked == [("Qwen/Qwen2.5-0.5B", {"revision": "v1", "allow_patterns": hub.PATTERNS})]
    with open_apr(tmp_path / "x.apr") as opened:
        assert opened.metadata["name"] == "Qwen/Qwen2.5-0.5B"


def test_inspect_names_the_text_files(model, tmp_path, capsys):
    (model[0] / "tokenizer.json").unlink()
    apr(capsys, "import", model[0], "-o", tmp_path / "m.apr")
    code, out, _ = apr(capsys, "inspect", tmp_path / "m.apr", "--json")
    found = json.loads(out)
    assert code == 0 and found["text_files"] == sorted(TEXTS.keys() - {"tokenizer.json"})
    assert "hf_assets" not in found["metadata"]


def test_without_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = apr(capsys, "import", "a/b", "-o", "x.apr")
    assert code == 9 and "pip install 'apr[hub]'" in err and err.count("\n") == 1


def test_a_path_that_is_here_is_never_asked_for(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (tmp_path / "a").mkdir()
    model[0].rename(tmp_path / "a" / "b")
    assert apr(capsys, "import", "a/b", "-o", "x.apr")[0] == 0


def test_only_what_is_read_is_downloaded():
    from huggingface_hub.utils import filter_repo_objects
    there = ["config.json", "model-00001-of-00003.safetensors", "model.safetensors", "model.safetensors.index.json",
             *TEXTS, "vocab.json"]
    others = ["consolidated.safetensors", "pytorch_model.bin", "original/model.safetensors", "README.md", "model.py"]
    assert set(filter_repo_objects([*there, *others], allow_patterns=hub.PATTERNS)) == set(there)


@pytest.mark.parametrize(("text", "is_one"), [
    ("Qwen/Qwen2.5-0.5B", True), ("a/b", True), ("a", False), ("a/b/c", False), ("./a", False), ("../a", False),
    ("/a/b", False), ("a/b.apr", False), ("a/.b", False), ("a/b c", False), ("a/b\n", False), ("ä/b", False)])
def test_names_of_the_hub(text, is_one):
    assert hub.looks_like_a_name(text) is is_one


@pytest.mark.parametrize("dtype", [None, "f32", "f16", "q8_0"])
def test_there_and_back_by_gguf(tmp_path, capsys, dtype):
    with open_model(GOLDEN) as source:
        count = len(source.shapes)
    assert apr(capsys, "import", GOLDEN, "-o", tmp_path / "m.apr")[0] == 0
    chosen = [] if dtype is None else ["--dtype", dtype]
    code, out, err = apr(capsys, "export", tmp_path / "m.apr", "--format", "gguf", "-o", tmp_path / "m.gguf", *chosen)
    assert (code, err) == (0, "") and f"{count} of {count} tensors equal\n" in out
    code, out, _ = apr(capsys, "inspect", tmp_path / "m.gguf", "--json")
    told = json.loads(out)
    assert code == 0 and told["kind"] == "gguf" and len(told["tensors"]) == count
    code, out, err = apr(capsys, "import", tmp_path / "m.gguf", "-o", tmp_path / "back.apr")
    assert (code, err) == (0, "") and " from qwen2.rope.freq_base\n" in out
    with open_model(tmp_path / "m.apr") as before, open_model(tmp_path / "back.apr") as after:
        assert after.config == before.config
        if dtype in (None, "f32"):
            for name in before.shapes:
                assert (after.read(name).astype(np.float32) == before.read(name).astype(np.float32)).all(), name
