"""`apr trace` as a person or a script meets it: tables, lines of JSON, exit codes, and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from models import FAMILIES, random_params
from test_trace import Engine, Trainer

import apr.cli.trace as command
import apr.tools.trace as tool
from apr.cli.main import main
from apr.data.tokenizer import Tokenizer
from apr.formats.export import export_gguf, export_hf
from apr.formats.model_file import save_model
from apr.formats.open_model import open_model
from apr.params import parameter_count
from apr.reference.model import loss_and_gradients
from apr.taps import LAYER_STAGES
from apr.tools.device import Choice
from apr.tools.trace import statistics
from apr.tools.trace_file import NAME, open_trace
from apr.tools.trace_points import all_points

IDS = "5,80,3,44,5,96,0"
BIAS = "model.layers.1.self_attn.v_proj.bias"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["What is 2+2? a small text of words, to train on"] * 4, 280)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Models of each family; words (with a tokenizer), wide (another shape), broken (a bias dropped); GGUF, folder."""
    path = tmp_path_factory.mktemp("trace")
    for name, config in FAMILIES.items():
        save_model(path / f"{name}.apr", config, random_params(config, 5), name)
    params = random_params(FAMILIES["qwen2"], 5)
    save_model(path / "broken.apr", FAMILIES["qwen2"], params | {BIAS: 0 * params[BIAS]}, "broken")
    wide = dataclasses.replace(FAMILIES["qwen2"], hidden_size=64)
    save_model(path / "wide.apr", wide, random_params(wide, 5), "wide")
    words = dataclasses.replace(FAMILIES["llama"], vocab_size=tokenizer.vocab_size)
    save_model(path / "words.apr", words, random_params(words, 5), "words", tokenizer.json, None)
    with open_model(path / "qwen2.apr") as source:
        export_gguf(source, path / "qwen2.gguf")
        export_hf(source, path / "hf")
        export_hf(source, path / "rounded", "BF16")
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Call the command in the folder, on the CPU; gives (code, lines of stdout, stderr)."""
    monkeypatch.chdir(folder)

    def call(*arguments, device=True):
        code = main(["trace", *map(str, arguments), *(["--device", "cpu"] if device else [])])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err
    return call


@pytest.fixture
def lines(run):
    """The same as JSON; the summary last."""
    def call(*arguments, code=0, **options):
        found, out, err = run(*arguments, "--json", **options)
        assert found == code, err
        return [json.loads(line) for line in out]
    return call


def test_without_a_run_the_skeleton_is_shown_and_nothing_computed(folder, lines, run):
    for name, c in FAMILIES.items():
        *points, summary = lines(f"{name}.apr", "--backward", device=False)
        assert [p["name"] for p in points] == all_points(c, True)
        assert all(p["statistics"] is None and p["kind"] == "point" and p["meaning"] for p in points)
        assert (summary["kind"], summary["stats_source"]) == ("summary", "metadata-only")
        counts = summary["parameters"]
        assert counts["total"] == parameter_count(c) == (counts["embedding"] + c.L * counts["per_layer"]
                                                        + counts["final_norm"] + counts["head"])
    head = next(p for p in lines("qwen3.apr", device=False) if p["name"] == "L01.q_norm")
    assert (head["shape"], head["symbols"]) == (["B", "T", 4, 8], "B T NH HS")
    assert (head["layer"], head["stage"]) == (1, "q_norm")
    code, out, err = run("qwen2.apr", device=False)
    assert (code, err) == (0, "") and "nothing was computed" in out[1]
    assert all(any(line.split()[0] == s.name and s.meaning in line for line in out) for s in LAYER_STAGES
               if s.name not in ("q_norm", "k_norm"))


def test_statistics_of_every_point_and_the_loss(lines, run):
    c, params, seen = FAMILIES["qwen2"], random_params(FAMILIES["qwen2"], 5), {}
    ids = [int(i) for i in IDS.split(",")]
    total = loss_and_gradients(params, {k: np.zeros_like(v) for k, v in params.items()}, c, np.array([ids]),
                               np.array([[*ids[1:], -100]]), 1 / 6, lambda n, a: seen.__setitem__(n, statistics(a)))
    *points, summary = lines("qwen2.apr", "--tokens", IDS, "--payload", "--backward")
    assert {p["name"]: p["statistics"] for p in points} == {n: dataclasses.asdict(s) for n, s in seen.items()}
    assert summary["loss"] == pytest.approx(total / 6, rel=1e-12) and summary["tokens"] == ids
    assert (summary["device"], summary["precision"], summary["stored"]) == ("cpu", "fp32", ["F32"])
    code, out, err = run("qwen2.apr", "--tokens", IDS, "--payload", "--layers", 1)
    assert (code, err) == (0, "") and out[-1].startswith("every point is of all 7 tokens, from --tokens: 5,80,")
    assert [line.split()[0] for line in out[1:-2]] == [n for n in all_points(c, False) if not n.startswith("L00")]


def test_the_prompt_is_the_models_own_or_random_ids(lines, tokenizer):
    summary = lines("words.apr", "--payload")[-1]
    assert summary["tokens"] == tokenizer.encode("What is 2+2?") and summary["tokens_from"] == "'What is 2+2?'"
    assert lines("words.apr", "--payload", "--prompt", "words")[-1]["tokens"] == tokenizer.encode("words")
    assert "random ids" in lines("qwen2.apr", "--payload")[-1]["tokens_from"]


def test_only_the_stages_asked_for_are_saved(folder, lines, tmp_path):
    out = lines("qwen2.apr", "--tokens", IDS, "--save-tensor", "q_rope,logits,dattn_norm", "--backward", "--layers",
                "0..0", "--output", tmp_path / "t")
    assert out[0] == {"kind": "saved", "path": str(tmp_path / "t" / NAME), "points": 3} and len(out) == 2
    trace = open_trace(tmp_path / "t")
    assert list(trace.arrays) == ["L00.q_rope", "logits", "L00.dattn_norm"] and trace.weights_sha256
    *points, summary = lines(tmp_path / "t", device=False)
    assert [(p["name"], p["statistics"]["std"]) for p in points] == [(n, s.std) for n, s in trace.statistics.items()]
    assert summary["weights_sha256"] == trace.weights_sha256
    assert lines("qwen2.gguf", "--diff", tmp_path / "t")[-1]["points"] == 3  # its tokens and points are taken over


def test_what_is_saved_is_not_what_is_compared(lines, tmp_path):
    saved, *points, summary = lines("qwen2.apr", "--diff", "hf", "--save-tensor", "q_rope", "--layers", 1, "--output",
                                    tmp_path / "t")
    assert saved["points"] == 1 and list(open_trace(tmp_path / "t").arrays) == ["L01.q_rope"]
    assert len(points) == summary["points"] == 22


@pytest.mark.parametrize("other", ["qwen2.gguf", "hf"])
def test_the_same_model_in_another_format_agrees_at_every_point(lines, other):
    *points, summary = lines("qwen2.apr", "--diff", other, "--backward")
    assert [p["name"] for p in points] == all_points(FAMILIES["qwen2"], True)
    assert all(p["relative_l2"] == 0 and p["within"] and p["std"] == p["other_std"] > 0 for p in points)
    assert (summary["first_beyond"], summary["beyond"], summary["against"]["model"]) == (None, 0, other)


def test_a_dropped_bias_is_seen_after_the_bias_and_not_before(run, lines):
    code, out, err = run("broken.apr", "--diff", "qwen2.apr")
    assert code == 5 and err.startswith("apr: TRACE-DIFF L01.v_bias: ") and len(err.splitlines()) == 1
    assert "> 2e-05" in next(line for line in out if line.startswith("L01.v_bias"))
    assert out[-1] == "41 points compared, tolerance 2e-05: beyond from L01.v_bias on"
    summary = lines("broken.apr", "--diff", "qwen2.apr", code=5)[-1]
    assert summary["first_beyond"] == "L01.v_bias" and summary["beyond"] > 10
    assert run("broken.apr", "--diff", "qwen2.apr", "--tolerance", 1)[0] == 0
    assert run("broken.apr", "--diff", "qwen2.apr", "--layers", 0)[0] == 5, "final_norm and logits are there always"


def test_rounded_weights_are_told(run):
    code, out, _ = run("rounded", "--diff", "qwen2.apr")
    assert code == 5 and any(line.startswith("stored as BF16, and as F32") for line in out)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU played by the reference, for `cuda` words."""
    for name, stand_in in (("CudaEngine", Engine), ("CudaTransformerTrainer", Trainer), ("Device", lambda n: n)):
        monkeypatch.setattr(tool, name, stand_in)
    monkeypatch.setattr(command, "choose_device", lambda word: Choice("cpu", 0, "fp32") if word == "cpu"
                        else Choice("cuda", 0, "bf16"))


@pytest.mark.parametrize(("model", "arguments", "sides"), [
    ("qwen2.apr", ["--device", "cpu", "--diff", "cuda"], ["cpu fp32", "cuda:0 bf16"]),
    ("qwen2.apr", ["--device", "cpu", "--diff", "cuda:fp32", "--backward"], ["cpu fp32", "cuda:0 fp32"]),
    ("qwen3.apr", ["--device", "cuda", "--diff", "cpu"], ["cuda:0 bf16", "cpu fp32"]),
    ("qwen2.apr", ["--device", "cuda", "--precision", "fp32", "--diff", "cuda:0"], ["cuda:0 fp32", "cuda:0 bf16"]),
    ("qwen2.apr", ["--device", "cuda", "--precision", "fp32", "--diff", "qwen2.gguf"], ["cuda:0 fp32"] * 2)])
def test_sides_of_a_comparison_with_a_gpu(gpu, lines, model, arguments, sides):
    *points, summary = lines(model, "--tokens", IDS, *arguments, device=False)
    assert [f"{summary[s]['device']} {summary[s]['precision']}" for s in ("of", "against")] == sides
    rounded, same = any("bf16" in s for s in sides), sides[0] == sides[1]
    assert {p["tolerance"] for p in points} >= {0.04 * 2**0.5 if rounded else 2e-5}
    assert any(p["relative_l2"] > 1e-4 for p in points) == rounded and summary["beyond"] == 0
    assert not same or all(p["relative_l2"] == 0 for p in points)


def test_what_agrees_with_itself_is_refused(gpu, run, tmp_path):
    run("qwen2.apr", "--save-tensor", "all", "--output", tmp_path / "t")
    for arguments in (["qwen2.apr", "--device", "cpu", "--diff", "cpu"], ["qwen2.apr", "--diff", "./qwen2.apr"],
                      ["qwen2.apr", "--device", "cuda", "--diff", "cuda:bf16"],
                      [tmp_path / "t", "--diff", tmp_path / "t" / NAME]):
        code, out, err = run(*arguments, device=False)
        assert (code, out) == (2, []) and "what is traced already" in err


def test_a_weak_prompt_is_told(lines):
    assert "equal tokens" in lines("qwen2.apr", "--diff", "hf", "--tokens", "7,7,7")[-1]["weak"]
    assert lines("qwen2.apr", "--diff", "hf")[-1]["weak"] is None


REFUSED = [
    (["none.apr"], 3, "none.apr"), (["qwen2.apr", "--payload", "--tokens", "1,x"], 2, "--tokens"),
    (["qwen2.apr", "--payload", "--tokens", ""], 2, "--tokens"),
    (["qwen2.apr", "--payload", "--tokens", "97"], 2, "ids in [0, 97)"),
    (["qwen2.apr", "--payload", "--tokens", "1", "--prompt", "x"], 2, "--prompt or --tokens"),
    (["qwen2.apr", "--payload", "--prompt", "x"], 4, "tokenizer"),
    (["words.apr", "--payload", "--prompt", ""], 2, "empty"),
    (["qwen2.apr", "--payload", "--tokens", "1,2", "--backward"], 2, "for a backward pass"),
    (["qwen2.apr", "--payload", "--precision", "bf16"], 9, "fp32 on the CPU"),
    (["qwen2.apr", "--layers", "0..2"], 2, "--layers"), (["qwen2.apr", "--tolerance", "1e-3"], 2, "with --diff"),
    (["qwen2.apr", "--diff", "hf", "--tolerance", "nan"], 2, "--tolerance"),
    (["qwen2.apr", "--save-tensor", "all"], 2, "--output"), (["qwen2.apr", "--output", "o"], 2, "--save-tensor"),
    (["qwen2.apr", "--save-tensor", "q_ropes", "--output", "o"], 2, "did you mean 'q_rope'?"),
    (["qwen2.apr", "--save-tensor", "all", "--output", "hf/config.json"], 2, "hf/config.json"),
    (["qwen2.apr", "--tokens", "97", "--diff", "wide.apr"], 2, "hidden_size 32 and"),  # before a look at tokens
    (["qwen2.apr", "--diff", "qwen3.apr"], 2, "qk_norm"),
    (["qwen2.apr", "--diff", "cpu:bf16"], 9, "fp32 on the CPU"), (["qwen2.apr", "--diff", "cuda:99"], 2, "cuda:15"),
    (["qwen2.apr", "--diff", "none"], 3, "none"), (["qwen2.apr", "--diff", "cuda:fp8"], 3, "cuda:fp8"),
    (["qwen2.apr", "--diff", "hf/model.safetensors"], 4, "a safetensors file of something else"),
    (["saved", "--payload", "--backward"], 2, "--backward"),
    (["saved", "--diff", "cpu"], 2, "a saved trace"), (["saved", "--tokens", "1"], 2, "--tokens"),
    (["qwen2.apr", "--diff", "saved", "--tokens", "1,2,3"], 4, "tokens"),
    (["qwen2.apr", "--diff", "saved", "--layers", "0"], 4, "only in the first"),
    (["qwen2.apr", "--diff", "saved", "--backward"], 4, "only in the first"), (["cut", "--payload"], 4, NAME)]


def test_refusals_are_one_line_with_the_right_code(folder, run):
    run("qwen2.apr", "--save-tensor", "q_rope", "--output", "saved", "--tokens", IDS)
    (folder / "cut").mkdir()
    (folder / "cut" / NAME).write_bytes((folder / "saved" / NAME).read_bytes()[:-9])
    for arguments, code, says in REFUSED:
        found, out, err = run(*arguments, device=arguments[0] not in ("saved", "cut"))
        assert (found, out) == (code, []), (arguments, err)
        assert len(err.splitlines()) == 1 and err.startswith("apr: ") and says in err, (arguments, err)


def test_the_real_command_prints_json_alone_on_stdout_and_never_replaces_a_gpu(folder):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

    def apr(*arguments):
        return subprocess.run([sys.executable, "-m", "apr", "trace", "qwen2.apr", *arguments], cwd=folder, env=env,
                              capture_output=True, text=True, timeout=120, check=False)
    done = apr("--payload", "--json")
    assert done.returncode == 0 and done.stderr.startswith("device: cpu (reason: ")
    assert [json.loads(line)["kind"] for line in done.stdout.splitlines()] == ["point"] * 41 + ["summary"]
    done = apr("--device", "cpu", "--diff", "cuda")
    assert (done.returncode, done.stdout) == (9, "") and done.stderr.startswith("apr: GATE-GPUTRAIN-002 --device")
