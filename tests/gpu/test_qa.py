"""`apr qa` on a GPU, through the command: every gate that needs one runs, and a planted fault is exit 5."""

import json
import os
import subprocess
import sys

import pytest
from models import source_of
from parity_engines import FAULTS, sound

from apr.formats.model_file import write_apr_model


@pytest.fixture(scope="module")
def files(tmp_path_factory, dev):
    """A model, and what a broken writer made of it; `dev` so that the test is skipped without a GPU."""
    path = tmp_path_factory.mktemp("qa")
    source = sound("llama", "bf16")
    write_apr_model(path / "model.apr", source)
    _, change = FAULTS["O transposed"]
    write_apr_model(path / "broken.apr", source_of(*change(source.config, {n: source.read(n) for n in source.shapes})))
    return path


def qa(files, *arguments, code=0):
    """The report and its gates by name."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "APR_CACHE_DIR": str(files / "cache")}
    done = subprocess.run([sys.executable, "-m", "apr", "qa", str(files / "model.apr"), "--json",
                           "--assert-gpu-speedup", "0", *map(str, arguments)],
                          capture_output=True, text=True, timeout=300, env=env, check=False)
    assert done.returncode == code, done.stderr
    report = json.loads(done.stdout)
    return report, {g["name"]: g for g in report["gates"]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_gate_that_a_gpu_has_runs_and_passes(files, precision):
    report, gates = qa(files, "--device", "cuda", "--precision", precision, "--against", files / "model.apr",
                       "--min-executed", "9")
    assert {n for n, g in gates.items() if g["status"] == "not run"} == {
        "golden_output", "performance_regression", "state_isolation", "ollama_parity", "classifier_head"}
    assert report["passed"] and report["system_info"]["gpu_model"] and gates["parity"]["value"] > 0
    assert gates["ptx_parity"]["message"].endswith("kernels") and gates["format_parity"]["value"] == 0
    (files / f"{precision}.json").write_text(json.dumps(report))
    _, gates = qa(files, "--device", "cuda", "--precision", precision, "--previous-report", files / f"{precision}.json",
                  "--regression-threshold", "95")
    assert gates["performance_regression"]["status"] == "passed"


def test_another_file_that_differs_is_exit_5(files):
    report, gates = qa(files, "--device", "cuda", "--against", files / "broken.apr", code=5)
    assert [n for n, g in gates.items() if g["status"] == "failed"] == ["format_parity"] and not report["passed"]
    assert "o_proj" in gates["format_parity"]["message"]
