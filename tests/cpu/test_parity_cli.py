"""`apr parity` as a person or a script meets it: file against file, against scores, exit codes, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hf_models import safetensors_bytes

from apr.formats.apr_file import write_apr
from apr.formats.export import export_gguf
from apr.formats.model_file import load_model, write_apr_model
from apr.formats.open_model import open_model
from apr.formats.safetensors import open_safetensors, write_safetensors

HF = Path(__file__).parents[1] / "golden" / "hf"
ENV = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def parity(*arguments):
    """Exit code, stdout, stderr."""
    done = subprocess.run([sys.executable, "-m", "apr", "parity", *map(str, arguments)], capture_output=True, text=True,
                          timeout=120, env=ENV, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def objects(*arguments, code=0):
    """The positions, the summary, stderr."""
    found, out, err = parity(*arguments, "--json")
    assert found == code, err
    lines = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]
    return lines[:-1], lines[-1]["summary"], err


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The golden qwen2 as .apr and GGUF; with one weight changed; with another eps; transformers' scores of models."""
    path = tmp_path_factory.mktemp("parity")
    with open_model(HF / "qwen2") as source:
        write_apr_model(path / "same.apr", source)
        export_gguf(source, path / "same.gguf")
    _, params, metadata = load_model(path / "same.apr")
    params["model.layers.1.self_attn.v_proj.bias"][3] += 1
    write_apr(path / "weight.apr", params, metadata)
    for name in ("qwen2", "llama"):
        with open_safetensors(HF / name / "expected.safetensors") as opened:
            ids, logits = (opened.read(f"{what}.0") for what in ("prompt", "logits"))
        write(path / f"{name}.safetensors", ids, logits)
    write(path / "wrong.safetensors", ids, 1.01 * logits)
    write(path / "batch.safetensors", np.stack([ids[:9], ids[:9]]), np.stack([logits[:9], logits[:9]]))
    write(path / "narrow.safetensors", ids, logits.astype(np.float16))
    write(path / "none.safetensors", ids[:0], logits[:0])
    write(path / "short.safetensors", ids[:5], logits)
    write(path / "floats.safetensors", ids.astype(np.float32), logits)
    write(path / "high.safetensors", ids + 400, logits)
    write(path / "negative.safetensors", ids - ids.max() - 1, logits)
    write(path / "long.safetensors", np.resize(ids, 300), np.resize(logits, (300, 307)))
    write(path / "nan.safetensors", ids, np.where(logits == logits.max(), np.nan, logits).astype(np.float32))
    write(path / "other.safetensors", ids, logits, more=ids)
    (path / "cut.safetensors").write_bytes(safetensors_bytes({"ids": ids})[:-1])
    return path


def write(path, ids, logits, **more):
    write_safetensors(path, {"ids": ids, "logits": logits, **more}, {})


def test_one_model_in_three_formats_is_the_same(files):
    for other in (files / "same.apr", files / "same.gguf"):
        positions, summary, _ = objects(HF / "qwen2", "--against", other, "--tokens", 60)
        assert (summary["verdict"], summary["failed"], summary["weight_faults"]) == ("pass", 0, [])
        assert summary["positions"] == len(positions) > 120 and summary["weights_compared"] == 26
        assert {p["way"] for p in positions} == {"prompt", "decoding", "continued"}
        assert {"english", "python", "chinese", "special"} <= {p["prompt"] for p in positions}
        assert {p["verdict"] for p in positions} == {"pass"} and summary["next"] is None


def test_a_weight_that_differs_is_exit_5_with_its_name(files):
    positions, summary, err = objects(HF / "qwen2", "--against", files / "weight.apr", "--tokens", 40, code=5)
    (fault,) = summary["weight_faults"]
    assert (fault["name"], fault["index"], fault["count"]) == ("model.layers.1.self_attn.v_proj.bias", 3, 1)
    assert summary["verdict"] == "fail" and any(p["verdict"] == "fail" for p in positions)
    assert len(err.splitlines()) == 1 and "v_proj.bias' element 3" in err and "apr bisect" in err
    code, out, _ = parity(HF / "qwen2", "--against", files / "weight.apr", "--tokens", 40)
    assert code == 5 and "DIFFERS: model.layers.1.self_attn.v_proj.bias" in out and "\nfail: " in out
    assert "hint: the weights differ" in out and "FAIL '" in out


def test_scores_of_transformers(files):
    for model, scores, count in (("qwen2", "qwen2", 103), ("llama", "llama", 103), ("llama", "batch", 46),
                                 ("llama", "narrow", 103)):
        positions, summary, _ = objects(HF / model, "--logits", files / f"{scores}.safetensors")
        assert (summary["verdict"], len(positions), summary["weights_compared"]) == ("pass", count, 0)
    code, out, err = parity(HF / "llama", "--logits", files / "wrong.safetensors")
    assert code == 5 and "position 0" in err and "hint: the direction holds and the scale is 0.9901" in out


def test_own_prompts(files):
    positions, summary, _ = objects(HF / "qwen2", "--against", files / "same.apr", "--prompt", "def f(x):", "--prompt",
                                    "the cat")
    assert {p["prompt"] for p in positions} == {"prompt 1", "prompt 2"} and summary["verdict"] == "pass"
    code, out, err = parity(HF / "qwen2", "--against", files / "same.apr", "--prompt", "the cat")
    assert code == 0 and err == "" and out.splitlines()[-1].startswith("pass: ")
    _, _, err = objects(HF / "llama", "--against", HF / "llama", "--tokens", 3)
    assert err == "the model has no tokenizer: the prompts are token ids, without texts\n"


@pytest.mark.parametrize(("arguments", "code", "says"), [
    pytest.param([HF / "qwen2"], 12, "a GPU to hold against the reference", id="no GPU"),
    ([HF / "qwen2", "--device", "cpu"], 12, "a GPU to hold against the reference"),
    ([HF / "qwen2", "--device", "cuda"], 9, "GATE-GPUTRAIN-002"),
    ([HF / "qwen2", "--against", HF / "qwen2", "--device", "cuda"], 9, "GATE-GPUTRAIN-002"),
    ([HF / "qwen2", "--against", HF / "qwen2", "--precision", "bf16"], 9, "fp32 on the CPU"),
    ([HF / "qwen2", "--against", HF / "llama"], 2, "two models of one shape, found hidden_size 112 and 60"),
    ([HF / "qwen2", "--against", "nowhere.apr"], 3, "nowhere.apr"),
    ([HF / "nowhere", "--logits", "llama.safetensors"], 3, "nowhere"),
    ([HF / "llama", "--logits", "nowhere.safetensors"], 3, "nowhere.safetensors"),
    ([HF / "llama", "--logits", "none.safetensors"], 12, "at least one position"),
    ([HF / "llama", "--logits", "short.safetensors"], 4, "[5, 307]"),
    ([HF / "llama", "--logits", "floats.safetensors"], 4, "I32 or I64"),
    ([HF / "llama", "--logits", "high.safetensors"], 4, "ids in [0, 307)"),
    ([HF / "llama", "--logits", "negative.safetensors"], 4, "ids in [0, 307)"),
    ([HF / "llama", "--logits", "long.safetensors"], 4, "at most 256 positions"),
    pytest.param([HF / "llama", "--logits", "nan.safetensors"], 4, "finite scores", id="NaN"),
    ([HF / "llama", "--logits", "other.safetensors"], 4, "'ids' and 'logits'"),
    ([HF / "llama", "--logits", "cut.safetensors"], 4, "cut.safetensors"),
    ([HF / "llama", "--logits", "same.apr"], 4, "same.apr"),
    ([HF / "llama", "--against", HF / "llama", "--logits", "llama.safetensors"], 2, "--against or --logits"),
    ([HF / "llama", "--logits", "llama.safetensors", "--prompt", "x"], 2, "--prompt"),
    ([HF / "llama", "--against", HF / "llama", "--prompt", "x"], 4, "tokenizer"),
    ([HF / "qwen2", "--against", HF / "qwen2", "--prompt", ""], 2, "--prompt"),
    ([HF / "qwen2", "--against", HF / "qwen2", "--prompt", "a b", "--prompt", "x", "--tokens", "1"], 12, "--tokens"),
    ([HF / "qwen2", "--against", HF / "qwen2", "--tokens", "0"], 2, "--tokens"),
    ([HF / "qwen2", "--against", HF / "qwen2", "--tokens", "5000"], 2, "--tokens"),
    ([HF / "qwen2", "--against", HF / "qwen2", "--batch-size", "9"], 2, "--batch-size")])
def test_refusals_are_one_line_with_the_right_code(files, arguments, code, says):
    named = [files / a if isinstance(a, str) and a.endswith((".safetensors", ".apr")) else a for a in arguments]
    found, out, err = parity(*named)
    lines = [line for line in err.splitlines() if not line.startswith("device: ")]
    assert (found, out, len(lines)) == (code, "", 1) and lines[0].startswith("apr: ") and says in lines[0]
