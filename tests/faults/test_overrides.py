"""H4: variables that change what is computed or checked are few, documented, shown, and in every artifact."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_model import write_model

from apr import paths
from apr.cli import bench
from apr.cli.main import main
from apr.formats.model_file import load_model, save_model
from apr.tools import gate
from apr.train.log import NAME

ROOT = Path(__file__).parents[2]
ACTIVE = {"APR_GENERAL": "attention", "APR_SYNC": "1", "SKIP_PARITY_GATE": "1"}
BANNER = [f"override: {name}={value}" for name, value in ACTIVE.items()]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch, tmp_path):
    """Of apr's, but the folder of the cache."""
    for name in (*paths.ENVIRONMENT, paths.SKIP_GATE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("APR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def active(monkeypatch):
    """Every override."""
    for name, value in ACTIVE.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with a tokenizer, made without any override."""
    return write_model(tmp_path_factory.mktemp("model") / "m.apr")


@pytest.mark.parametrize(("values", "expected"), [
    ({}, {}), (ACTIVE, ACTIVE), ({"APR_GENERAL": "", "APR_SYNC": "0", "SKIP_PARITY_GATE": ""}, {}),
    ({"APR_DEVICE": "cpu", "APR_TRACEBACK": "1"}, {})])
def test_H4_overrides_are_what_is_set_and_changes_a_result(monkeypatch, values, expected):
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert paths.overrides() == expected and paths.skip_parity_gate() == ("SKIP_PARITY_GATE" in expected)
    assert paths.override_record() == ({"overrides": expected} if expected else {})


@pytest.mark.parametrize("name", ["APR_SYNC", "APR_TRACEBACK", "SKIP_PARITY_GATE"])
@pytest.mark.parametrize("value", ["yes", "true", "2", " 1", "1\x1b[2J"])
def test_H4_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    assert main(["inspect", "x"]) == 2
    said = capsys.readouterr().err
    assert name in said and "0 or 1" in said and said.count("\n") == 1 and "\x1b" not in said


def command(name, model):
    """The arguments of a command that computes, on the CPU; bench has stand-ins for the GPU."""
    return {"run": ["run", model, "a small", "--max-tokens", "2", "--no-gpu"],
            "qa": ["qa", model, "--device", "cpu", "--skip", "throughput"],
            "parity": ["parity", model, "--against", model, "--tokens", "16"],
            "bench": ["bench", "decode", "--preset", "tiny"]}[name]


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """`apr bench` with something in the GPU's place."""
    monkeypatch.setattr(bench, "choose_device", lambda word: SimpleNamespace(ordinal=0))
    monkeypatch.setattr(bench, "TimedDevice", lambda ordinal, warn: SimpleNamespace(name="GPU"))
    monkeypatch.setattr(bench, "measure_decode", lambda *_: iter([{"bench": "decode", "ms": 1.0}]))


@pytest.mark.parametrize("name", ["run", "qa", "parity", "bench"])
def test_H4_overrides_are_in_the_banner_and_in_the_result(model, no_gpu_needed, capsys, monkeypatch, name):
    arguments = [*map(str, command(name, model)), "--json"]

    def result():
        assert main(arguments) == 0
        said = capsys.readouterr()
        last = json.loads(said.out.splitlines()[-1])
        return last.get("summary", last), [s for s in said.err.splitlines() if s.startswith("override: ")]

    plain, nothing = result()
    assert "overrides" not in plain and nothing == []
    for variable, value in ACTIVE.items():
        monkeypatch.setenv(variable, value)
    found, banner = result()
    assert found["overrides"] == ACTIVE and banner == BANNER and found.keys() - plain.keys() == {"overrides"}


def test_H4_overrides_are_in_models_that_were_computed_here(tmp_path, model, active):
    config, params, metadata = load_model(model)
    assert "overrides" not in metadata
    save_model(tmp_path / "m.apr", config, params, "m")
    assert load_model(tmp_path / "m.apr")[2]["overrides"] == ACTIVE


def test_H4_overrides_are_in_all_that_a_run_leaves(folder, tmp_path, capsys, active):
    arguments = ["pretrain", "--config", str(folder / "run.yaml"), "--dataset", str(folder / "texts"), "--num-steps",
                 "2", "--warmup-steps", "0", "--steps-per-epoch", "2", "--device", "cpu", "--run-dir",
                 str(tmp_path / "run"), "--json"]
    assert main(arguments) == 0
    said, run = capsys.readouterr(), tmp_path / "run"
    assert [line for line in said.err.splitlines() if line.startswith("override: ")] == BANNER
    start = json.loads((run / NAME).read_text().splitlines()[0])
    records = {"start": start, "run.json": json.loads((run / "run.json").read_text())["versions"],
               "state.json": json.loads((run / "ckpt" / "step-00000002" / "state.json").read_text()),
               "epoch-000.apr": load_model(run / "ckpt" / "epoch-000.apr")[2]}
    assert {name: record.get("overrides") for name, record in records.items()} == dict.fromkeys(records, ACTIVE)


def test_H4_a_verdict_is_remembered_for_the_kernels_that_it_is_about(tmp_path, monkeypatch):
    cache = SimpleNamespace(store=SimpleNamespace(path=tmp_path), toolchain="t")
    engine = SimpleNamespace(weights_sha256="a", precision="bf16", B=1, dev=SimpleNamespace(name="H200", cache=cache),
                             net=SimpleNamespace(gemm=SimpleNamespace(version=1)))
    monkeypatch.setattr(gate, "check", lambda *_: {"tokens": 8})
    monkeypatch.setenv("APR_GENERAL", "attention")
    assert gate.start_gate(engine, None, pytest.fail)["status"] == "passed"
    monkeypatch.delenv("APR_GENERAL")
    assert gate.start_gate(engine, None, pytest.fail)["status"] == "passed"  # not "remembered"
    assert gate.start_gate(engine, None, pytest.fail)["status"] == "remembered"


def test_H4_the_table_of_variables_is_whole():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (yes|no) \|$", (ROOT / "SECURITY.md").read_text(), re.M)
    assert [name for name, _, _ in rows] == [*paths.ENVIRONMENT, paths.SKIP_GATE]
    assert [name for name, _, recorded in rows if recorded == "yes"] == list(paths.OVERRIDES)
