"""`apr qa`: each gate passes on a sound stand-in and fails on a planted fault; what did not run is never a pass."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from models import FAMILIES, random_params, source_of
from parity_engines import Exact, Stale, broken, params_with, sound

from apr.cli.main import main
from apr.errors import DeviceFault, FormatError, GateError, MeasureError, UnavailableError
from apr.formats.open_model import open_model
from apr.infer.prompt import open_prompter
from apr.tools.parity_prompts import Prompt
from apr.tools.parity_truth import reference_scores
from apr.tools.qa import NOT_APPLICABLE, NOT_RUN, Finding, previous_throughput, run_gates, system_info
from apr.tools.qa_gates import NAMES, Gates, Subject, anomalies, odd_metadata
from apr.tools.weights import TensorFault

HF = Path(__file__).parents[1] / "golden" / "hf"
SOURCE = sound("llama")
PROMPTS = [Prompt("row 0", [5, 9, 200, 4])]
SCORES = reference_scores(SOURCE, [p.ids for p in PROMPTS], "fp32")
NEEDS = {"golden_output": "--golden", "format_parity": "--against", "performance_regression": "--previous-report"}
ON_GPU = {"parity", "gpu_speedup", "gpu_state_isolation"}


class Slow(Exact):
    """A few milliseconds for each token."""

    def generate(self, prompts, sampling, limit):
        """As Engine.generate."""
        for token in super().generate(prompts, sampling, limit):
            time.sleep(5e-3)
            yield token


def subject(kind="cuda", source=SOURCE, engine=Exact, cpu=Slow, uploads=(), **more):
    """A model whose engines are stand-ins."""
    return Subject(source, None, kind, "fp32", lambda s, k: (engine if k == kind else cpu)(s), lambda _: list(uploads),
                   **more)


def status(name, s):
    """How one gate ends: (status, message, value)."""
    everything = {other for other in NAMES if other != name}
    report = run_gates("m", s.kind, s.precision, Gates(s).by_name, sorted(everything), 1)
    (found,) = [g for g in report.gates if g.name == name]
    return found.status, found.message, found.value


def previous(rate, **changes):
    return {"device": "cuda", "precision": "fp32", "value": rate, "system_info": system_info(), **changes}


def test_a_sound_model_passes_every_gate_that_can_run(tmp_path, monkeypatch):
    monkeypatch.setenv("APR_CACHE_DIR", str(tmp_path / "cache"))
    s = subject(other=sound("llama"), golden=(PROMPTS, SCORES, 0.0), previous=previous(1.0), tokens_per_second=1.0,
                gpu_speedup=0.1)
    report = run_gates("m", "cuda", "fp32", Gates(s).by_name, [], 10)
    assert {g.name: g.status for g in report.gates if g.status != "passed"} == {
        "state_isolation": NOT_RUN, "ptx_parity": NOT_RUN, "ollama_parity": NOT_RUN, "classifier_head": NOT_RUN}
    report.require()
    plain = report.plain()
    assert plain["passed"] and (plain["gates_executed"], plain["gates_not_run"]) == (10, 4)
    assert [g["name"] for g in plain["gates"]] == [*NAMES, *NOT_APPLICABLE]
    assert all(set(g) == {"name", "status", "message", "value", "threshold", "duration_ms"} for g in plain["gates"])
    assert plain["timestamp"].endswith("+00:00") and plain["system_info"]["cpu_model"]
    assert plain["total_duration_ms"] >= sum(g["duration_ms"] for g in plain["gates"])


def test_on_the_cpu_what_needs_a_gpu_or_a_file_does_not_run():
    report = run_gates("m", "cpu", "fp32", Gates(subject("cpu")).by_name, ["throughput"], 1)
    by_name = {g.name: g for g in report.gates}
    assert all("GPU" in by_name[n].message and by_name[n].status == NOT_RUN for n in ON_GPU)
    assert all(by_name[n].message == f"no {flag} {by_name[n].message.split()[-1]}" for n, flag in NEEDS.items())
    assert by_name["throughput"].message == "skipped on request" and by_name["state_isolation"].status == "passed"


def changed(**changes):
    return source_of(dataclasses.replace(SOURCE.config, **changes), {n: SOURCE.read(n) for n in SOURCE.shapes})


def with_param(name, change):
    return source_of(*params_with(name, change=change)(SOURCE.config, {n: SOURCE.read(n) for n in SOURCE.shapes}))


FAULT = TensorFault("lm_head.weight", 7, 1, 9, 1.0, 2.0)
SMALL = source_of(FAMILIES["llama"], random_params(FAMILIES["llama"], 0))  # head_dim 8, which bf16 attention lacks
BROKEN = broken("O transposed")[1]
PLANTED = {
    "capability_match": (lambda: dataclasses.replace(subject(source=SMALL), precision="bf16"), "head_dim"),
    "tensor_contract": (lambda: subject(source=with_param("lm_head.weight", lambda w: w * 0)), "standard deviation 0"),
    "metadata_plausibility": (lambda: subject(source=changed(rope_theta=10.0)), "rope_theta 10"),
    "golden_output": (lambda: subject(golden=(PROMPTS, [1.01 * x for x in SCORES], 0.0)), "relative L2 0.0099"),
    "parity": (lambda: subject(engine=lambda _: Exact(BROKEN)), "FALSIFY-CPU-GPU-006 prompt 'long'"),
    "format_parity": (lambda: subject(other=BROKEN), "weight 'model.layers.1.self_attn.o_proj.weight'"),
    "throughput": (lambda: subject(engine=Slow, tokens_per_second=1000.0), "tokens/s on the GPU"),
    "gpu_speedup": (lambda: subject(engine=Slow, cpu=Exact), "on the CPU"),
    "performance_regression": (lambda: subject(engine=Slow, previous=previous(1000.0)), "after 1000.0"),
    "gpu_state_isolation": (lambda: subject(engine=Stale), "results differ"),
    "state_isolation": (lambda: subject("cpu", engine=Stale), "results differ"),
}


@pytest.mark.parametrize("name", list(PLANTED))
def test_a_planted_fault_fails_its_gate(name):
    make, says = PLANTED[name]
    found, message, value = status(name, make())
    assert found == "failed" and says in message
    if name in ("parity", "golden_output", "format_parity"):
        assert value > 1
    with pytest.raises(GateError, match=f"qa {name}: "):
        run_gates("m", "cuda", "fp32", {name: Gates(make()).by_name[name]}, [], 1).require()


def test_a_wrong_upload_fails_parity():
    found, message, _ = status("parity", subject(uploads=[("lm_head.weight", FAULT)]))
    assert found == "failed" and "weight 'lm_head.weight' element 7" in message


def test_a_damaged_kernel_fails_ptx_parity(tmp_path, monkeypatch):
    monkeypatch.setenv("APR_CACHE_DIR", str(tmp_path / "cache"))
    assert status("ptx_parity", subject()) == (NOT_RUN, "the kernel cache is empty", None)
    (tmp_path / "cache" / "rmsnorm.kernel").write_bytes(b"x")
    found, message, value = status("ptx_parity", subject())
    assert (found, value) == ("failed", 1.0) and "rmsnorm.kernel: not a kernel" in message
    (tmp_path / "cache").chmod(0o777)
    assert status("ptx_parity", subject())[0] == NOT_RUN


def test_weights_and_numbers_that_are_odd():
    ok = np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32)
    assert anomalies("w", ok, True) == [] == anomalies("b", np.ones(9, np.float32), False)
    large = 101 * ok / np.abs(ok).max()
    for bad, says in ((np.where(ok == ok.max(), np.nan, ok), "not finite"), (large, "largest 101"), (ok + 11, "mean"),
                      (np.ones_like(ok), "standard deviation")):
        assert [says in a for a in anomalies("w", bad.astype(np.float32), True)] == [True]
    assert anomalies("b", np.full(4, 300, np.float32), False) == ["b: mean 300 beyond 10"]
    qwen = sound("qwen2")
    params = {n: qwen.read(n) for n in qwen.shapes}
    assert odd_metadata(qwen, None) == []
    assert "where every qwen2 has 1e-06" in odd_metadata(
        source_of(dataclasses.replace(qwen.config, rms_norm_eps=1e-5), params), None)[0]
    assert "end id 5000" in odd_metadata(dataclasses.replace(qwen, hf_config={"eos_token_id": [3, 5000]}), None)[0]
    assert "rms_norm_eps 0.01 outside" in odd_metadata(changed(rms_norm_eps=1e-2), None)[0]


def test_a_tokenizer_that_does_not_fit():
    with open_model(HF / "qwen2") as source:
        prompter = open_prompter(source)
        assert odd_metadata(source, prompter) == []
        wide = dataclasses.replace(source.config, vocab_size=2 * prompter.tokenizer.vocab_size + 1)
        assert odd_metadata(
            source, dataclasses.replace(prompter, eos=frozenset())) == ["a tokenizer without an id that ends a text"]
    params = random_params(wide, 0)
    assert "a tokenizer of 300 ids beside a vocabulary of 601" in odd_metadata(source_of(wide, params), prompter)


def test_what_is_not_comparable_does_not_run():
    for other, says in ((previous(None), "measured no throughput"), (previous(9.0, device="cpu"), "report is of cpu"),
                        (previous(9.0, system_info={}), "another machine")):
        found, message, _ = status("performance_regression", subject(previous=other))
        assert found == NOT_RUN and says in message
    long = ([Prompt("row 0", [1] * 300)], [np.zeros((300, SOURCE.config.V), np.float32)], 0.0)
    found, message, _ = status("golden_output", subject(golden=long))
    assert found == NOT_RUN and "300 tokens" in message
    flat = with_param("lm_head.weight", lambda w: w * 0)
    assert status("parity", subject(source=flat))[:1] == (NOT_RUN,)


def raising(error):
    def gate():
        raise error
    return gate


def test_too_few_gates_are_exit_12_and_faults_of_the_device_end_it():
    sound_gate = {"a": lambda: Finding(True, "fine"), "b": raising(UnavailableError("x", "y", "z", "w"))}
    report = run_gates("m", "cpu", "fp32", sound_gate, [], 2)
    assert [g.status for g in report.gates[:2]] == ["passed", NOT_RUN] and not report.passed
    with pytest.raises(MeasureError, match="at least 2 gates to run, found 1 of 4") as caught:
        report.require()
    assert caught.value.exit_code == 12
    assert run_gates("m", "cpu", "fp32", sound_gate, [], 1).passed
    with pytest.raises(MeasureError, match="found 0"):
        run_gates("m", "cpu", "fp32", sound_gate, ["a"], 1).require()
    assert run_gates("m", "cpu", "fp32", {"a": raising(FormatError("x", "y", "z", "w"))}, [], 1).failed
    with pytest.raises(DeviceFault):
        run_gates("m", "cuda", "fp32", {"a": raising(DeviceFault("x", "y", "z", "w"))}, [], 1)


def qa(*arguments):
    """Exit code, stdout, stderr."""
    done = subprocess.run([sys.executable, "-m", "apr", "qa", *map(str, arguments)], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_the_command(tmp_path):
    code, out, _ = qa(HF / "qwen2", "--against", HF / "qwen2", "--json")
    report = json.loads(out)
    assert code == 0 and report["passed"] and report["gates_executed"] == 6 + (report["gates"][11]["status"] != NOT_RUN)
    (tmp_path / "old.json").write_text(out)
    assert previous_throughput(tmp_path / "old.json")["value"] > 0
    code, out, err = qa(HF / "qwen2", "--previous-report", tmp_path / "old.json", "--assert-tps", 1e9, "--skip",
                        "tensor_contract", "--regression-threshold", 99)
    assert code == 5 and "qa throughput" in err.splitlines()[-1] and "NOT PASSED" in out
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "skipped on request" in rows["tensor_contract"] and "passed" in rows["performance_regression"]
    assert qa(HF / "qwen2", "--min-executed", 12, "--json")[0] == 12


@pytest.mark.parametrize(("arguments", "code", "says"), [
    (["--skip", "thruput"], 2, "throughput"), (["--min-executed", "0"], 2, "--min-executed"),
    (["--assert-tps", "nan"], 2, "--assert-tps"), (["--regression-threshold", "-1"], 2, "--regression-threshold"),
    (["--precision", "bf16", "--device", "cpu"], 9, "fp32 on the CPU"), (["--golden", "nowhere"], 3, "nowhere"),
    (["--previous-report", HF / "qwen2" / "config.json"], 4, "a report of 'apr qa --json'"),
    (["--against", HF / "llama"], 2, "two models of one shape")])
def test_refusals_are_one_line_with_the_right_code(capsys, arguments, code, says):
    assert main(["qa", str(HF / "qwen2"), "--device", "cpu", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err
