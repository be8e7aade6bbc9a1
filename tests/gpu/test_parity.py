"""`apr parity` on a GPU: sound engines pass, planted faults are named, and Qwen2-0.5B's shape takes seconds."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import random_params, source_of
from parity_engines import FAULTS, MODELS, broken, sound

from apr.errors import GateError
from apr.formats.model_file import write_apr_model
from apr.infer.cuda_engine import CudaEngine
from apr.presets import qwen2_0_5b
from apr.tools.parity import against_model, against_reference, against_scores
from apr.tools.parity_prompts import built_in
from apr.tools.parity_truth import reference_scores
from apr.tools.weights import byte_faults

HF = Path(__file__).parents[1] / "golden" / "hf"
PRECISIONS = ["fp32", "bf16"]
SECONDS = 15.0  # of the whole command with Qwen2-0.5B's shape, its kernels being in the cache


def engine_of(dev, source, precision, b=1):
    """An engine that may compile."""
    dev.cache.frozen = False
    return CudaEngine(source, dev, precision, b, 128)


def compare(engine, source, bytes_too=False):
    """The report; of the weights' bytes nothing, unless they are asked for, so that the scores have to show a fault."""
    weights = byte_faults(engine.net, source) if bytes_too else ()
    return against_reference(engine, source, built_in(source.config, None), weights)


@pytest.mark.parametrize("b", [1, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", list(MODELS))
def test_a_sound_engine_passes(dev, name, precision, b):
    for seed in range(3):
        source = sound(name, precision, seed)
        report = compare(engine_of(dev, source, precision, b), source, bytes_too=True)
        report.require()
        share = max(p.measured.relative_l2 / p.limit.relative_l2 for p in report.positions)
        together = max(t.relative_l2 / t.limit.relative_l2 for t in report.together)
        assert report.weights_compared == len(source.shapes) and 0 < max(share, together) < 0.9, (share, together)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fault", list(FAULTS))
def test_scores_show_a_broken_reader(dev, fault, precision):
    source, wrong = broken(fault, precision)
    with pytest.raises(GateError, match=r"FALSIFY-CPU-GPU-006 (prompt '\w+' \(\w+\) position|all \d+ positions)") as e:
        compare(engine_of(dev, wrong, precision), source).require()
    assert e.value.exit_code == 5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_wrong_element_of_an_upload_is_named_by_its_bytes(dev, precision):
    source = sound("qwen2", precision)
    engine = engine_of(dev, source, precision)
    spec = next(s for s in engine.net.layout.specs if s.name == "model.layers.1.mlp.up_proj.weight")
    place = engine.arena.part("params", engine.net.layout.offset(spec.name), spec.shape)
    host = dev.download(place)
    host.view(f"u{host.itemsize}").reshape(-1)[77] ^= 1
    dev.upload(place, host)
    report = compare(engine, source, bytes_too=True)
    assert [(f.name, f.index, f.count) for f in report.weight_faults] == [(spec.name, 77, 1)]
    with pytest.raises(GateError, match=r"weight 'model.layers.1.mlp.up_proj.weight' element 77"):
        report.require()
    assert report.positions and not report.failed  # the last bit of one weight shows in no score


@pytest.mark.parametrize("precision", PRECISIONS)
def test_old_keys_are_seen_after_a_prompt_whose_last_key_was_not_written(dev, precision, monkeypatch):
    source = sound("llama", precision)
    engine = engine_of(dev, source, precision)
    right, cache = engine._prefill, engine.arena["k_cache"]

    def forgetful(slot, prompt, tap=None):
        before = dev.download(cache)
        batch = right(slot, prompt, tap)
        if len(prompt):
            now = dev.download(cache)
            now[:, slot, :, len(prompt) - 1] = before[:, slot, :, len(prompt) - 1]
            dev.upload(cache, now)
        return batch

    monkeypatch.setattr(engine, "_prefill", forgetful)
    report = compare(engine, source)
    assert {p.way for p in report.failed} == {"continued"}
    assert any("what the prompt leaves in the cache" in hint for hint in report.summary()["hints"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cache_slot_off_by_one_is_seen_in_decoding_alone(dev, precision, monkeypatch):
    source = sound("qwen2", precision)
    engine = engine_of(dev, source, precision)
    right = engine._state
    monkeypatch.setattr(engine, "_state", lambda ids, at, *rest: right(ids, [min(i + 1, 127) for i in at], *rest))
    ways = {p.way for p in compare(engine, source).failed}
    assert "decoding" in ways and "prompt" not in ways


@pytest.mark.parametrize("precision", PRECISIONS)
def test_given_scores_and_another_file(dev, precision):
    source, prompts = sound("qwen3", precision), built_in(MODELS["qwen3"], None, 60)
    truth = reference_scores(source, [p.ids for p in prompts], "fp32")
    against_scores(engine_of(dev, source, precision), source, prompts, truth, 0.0).require()
    same = against_model(source, sound("qwen3", precision), lambda s: engine_of(dev, s, precision), prompts)
    same.require()
    assert max(p.measured.relative_l2 for p in same.positions) == 0.0  # the same kernels on the same bytes


def command(cache, *arguments, code=0):
    """The objects on stdout, the lines on stderr, the seconds."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "APR_CACHE_DIR": str(cache)}
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "apr", "parity", *map(str, arguments), "--json"], capture_output=True,
                          text=True, timeout=300, env=env, check=False)
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr, time.monotonic() - begin


@pytest.fixture(scope="module")
def cache(tmp_path_factory, dev):
    """A kernel cache for these processes; `dev` so that the test is skipped without a GPU."""
    return tmp_path_factory.mktemp("parity") / "cache"


def test_the_command(cache, tmp_path):
    lines, _, _ = command(cache, HF / "qwen2", "--device", "cuda", "--precision", "fp32")
    assert lines[-1]["summary"]["verdict"] == "pass" and lines[-1]["summary"]["weights_compared"] == 26
    assert {"english", "chinese", "long", "special"} <= {line["prompt"] for line in lines[:-1]}
    write_apr_model(tmp_path / "llama.apr", sound("llama", "bf16"))
    lines, err, _ = command(cache, tmp_path / "llama.apr", "--device", "cuda")
    assert (lines[-1]["summary"]["verdict"], lines[-1]["summary"]["precision"]) == ("pass", "bf16")
    assert "no tokenizer" in err
    lines, err, _ = command(cache, HF / "qwen2", "--device", "cuda", "--precision", "bf16", code=9)
    assert lines == [] and "--precision fp32" in err


@pytest.fixture(scope="module")
def qwen2_file(tmp_path_factory, dev):
    """Qwen2-0.5B's shape, random weights in bf16."""
    path = tmp_path_factory.mktemp("qwen2") / "model.apr"
    write_apr_model(path, source_of(qwen2_0_5b, random_params(qwen2_0_5b, 5, "BF16")))
    return path


@pytest.mark.parametrize("precision", PRECISIONS)
def test_qwen2_0_5b_passes_in_time(cache, qwen2_file, precision):
    command(cache, qwen2_file, "--device", "cuda", "--precision", precision, "--tokens", 20)  # compiles
    lines, _, seconds = command(cache, qwen2_file, "--device", "cuda", "--precision", precision)
    summary = lines[-1]["summary"]
    print(f"{precision}: {seconds:.1f} s, worst {summary['worst']['relative_l2']}, together {summary['together']}")
    assert summary["verdict"] == "pass" and summary["positions"] > 300
    assert seconds < SECONDS or "APR_CACHE_DIR" in os.environ  # in a copy, beside all the mutants, time says nothing
