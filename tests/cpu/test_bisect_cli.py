"""`apr bisect` from the command line where there is no GPU, and its output with a stand-in for one."""

import json

import numpy as np
import pytest
from host_subjects import HostEngine, HostTrainer
from models import SMALL, random_params

import apr.cli.bisect as command
import apr.reference.block as block
from apr.cli.main import main
from apr.formats.model_file import save_model
from apr.tools.device import Choice


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model file."""
    path = tmp_path_factory.mktemp("bisect") / "small.apr"
    save_model(path, SMALL, random_params(SMALL, 5), "small")
    return path


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, whose part NumPy plays."""
    monkeypatch.setattr(command, "choose_device", lambda asked: Choice("cuda", 0, "bf16"))
    monkeypatch.setattr(command, "Device", lambda ordinal, warn: None)
    monkeypatch.setattr(command, "CudaEngine", lambda source, *rest: source)
    monkeypatch.setattr(command, "EngineSubject", HostEngine)
    monkeypatch.setattr(command, "TrainerSubject", lambda source, device, precision: HostTrainer(source))


@pytest.mark.parametrize(("arguments", "code", "reason"), [
    ([], 9, "GATE-GPUTRAIN-002 --device: expected a GPU that can be used as 'cuda'"),
    (["--device", "cpu"], 9, "--device: expected a GPU to hold against the reference, found cpu"),
    (["--device", "tpu"], 2, "--device: expected cpu, cuda, cuda:0 to cuda:15 or auto, found 'tpu'"),
    (["--precision", "fp16"], 2, "invalid choice: 'fp16'"),
])
def test_what_cannot_be_searched_is_refused_in_one_line(model, capsys, arguments, code, reason):
    assert main(["bisect", str(model), *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and reason in err and err.count("\n") == 1


def test_a_file_that_is_no_model_is_refused(gpu, tmp_path, capsys):
    (tmp_path / "a.apr").write_bytes(b"nothing")
    assert main(["bisect", str(tmp_path / "a.apr")]) == 4
    assert main(["bisect", str(tmp_path / "b.apr")]) == 3
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("flags", [[], ["--train"]])
def test_a_sound_model_ends_with_0_and_a_line_for_each_phase(gpu, model, capsys, flags):
    assert main(["bisect", str(model), "--precision", "fp32", *flags]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == (6 if flags else 4)
    assert all("all right" in line for line in out.splitlines())


def test_a_finding_ends_with_5_and_names_stage_cause_and_contract(gpu, model, capsys, monkeypatch):
    monkeypatch.setattr(block, "bias_forward", lambda x, bias: x.copy())
    assert main(["bisect", str(model), "--precision", "fp32"]) == 5
    out, err = capsys.readouterr()
    assert "H4D.2 prompt L00.q_bias: the bias is not added [bias_missing]" in out
    assert "apr: H4D.2 prompt L00.q_bias (fp32): expected the GPU within 1e-05 of the reference" in err
    assert "contracts/apr-pretrain-cuda-forward-parity-v1.yaml" in err and err.count("\n") == 1


def test_json_is_one_line_a_precision(gpu, model, capsys, monkeypatch):
    monkeypatch.setattr(block, "bias_forward", lambda x, bias: x.copy())
    assert main(["bisect", str(model), "--precision", "fp32", "--json", "--all"]) == 5
    report = json.loads(capsys.readouterr().out)
    stages = [f["stage"] for f in report["findings"]]
    assert stages[:3] == ["L00.q_bias", "L00.k_bias", "L00.v_bias"] and "L01.v_bias" in stages
    assert {f["cause"]["kind"] for f in report["findings"]} == {"bias_missing"}
    assert all(phase["checks"] > 0 for phase in report["phases"])


def test_what_overflows_float32_is_found_where_it_does(gpu, tmp_path, capsys):
    params = random_params(SMALL, 5)
    params["model.layers.0.mlp.up_proj.weight"] = params["model.layers.0.mlp.up_proj.weight"] * np.float32(1e38)
    save_model(tmp_path / "large.apr", SMALL, params, "large")
    with np.errstate(all="ignore"):
        assert main(["bisect", str(tmp_path / "large.apr"), "--precision", "fp32", "--json"]) == 5
    finding = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["findings"][0]  # NaN is no JSON
    assert finding["stage"] == "L00.ffn_up" and finding["cause"]["kind"] in ("infinite", "nan")
