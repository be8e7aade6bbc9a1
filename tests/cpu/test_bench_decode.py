"""The benchmark of whole generation without a GPU: its model, its bytes, its rows, and its command line."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from models import FAMILIES

from apr import driver
from apr.errors import DeviceFault
from apr.formats.export import export_safetensors
from apr.formats.safetensors import open_safetensors
from apr.presets import llama2_7b, qwen2_0_5b
from apr.tools import decode_speed

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_decode  # noqa: E402
import harness  # noqa: E402

CONFIG = FAMILIES["qwen2"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Fewer random numbers."""
    monkeypatch.setattr(decode_speed, "BLOCK", 5000)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_random_model_is_a_whole_one(precision, small_blocks, tmp_path):
    arrays = bench_decode.random_model(CONFIG, precision)
    norms = [a for n, a in arrays.items() if n.endswith("norm.weight")]
    others = [a.astype(np.float32) for n, a in arrays.items() if not n.endswith("norm.weight")]
    assert len(norms) == 2 * CONFIG.L + 1 and all((a == 1).all() for a in norms)
    assert all(0.005 < a.std() < 0.04 for a in others)
    first, second = (arrays[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    assert (first != second).mean() > 0.9  # no two layers alike
    with bench_decode.source_of(CONFIG, arrays, precision) as source:
        export_safetensors(source, tmp_path / "m.safetensors")
    with open_safetensors(tmp_path / "m.safetensors") as file:
        assert all((file.read(n) == a).all() for n, a in arrays.items())


def test_bytes_of_a_step():
    """Qwen2-0.5B: 494,032,768 parameters, 24 layers, two key heads of 64; an untied embedding is not read."""
    assert bench_decode.step_bytes(qwen2_0_5b, 2, 1, 0) == 2 * 494_032_768
    assert bench_decode.step_bytes(qwen2_0_5b, 2, 8, 100) == 2 * (494_032_768 + 8 * 100 * 2 * 24 * 2 * 64)
    weights = 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    assert bench_decode.step_bytes(llama2_7b, 4, 1, 0) == 4 * weights


class FakeEngine:
    """An engine that makes tokens out of nothing; `fails` names a method that cannot."""

    fails: str | None = None
    error: Exception = ValueError("no such thing")

    def __init__(self, source, device, precision, B, S):
        self.config, self.dev, self.S, self.steps = source.config, device, S, 0
        self.decoder = SimpleNamespace(start=lambda: None)

    def _prefill(self, slot, prompt):
        if self.fails == "_prefill":
            raise self.error
        assert len(prompt) <= self.S

    def _state(self, tokens, positions, sampling, steps):
        assert max(positions) + steps < self.S and len(tokens) == len(positions)

    def _launch(self):
        self.steps += 1

    def generate(self, prompts, sampling, limit):
        for _ in range(limit):
            yield np.zeros(len(prompts), np.int32)


@pytest.fixture
def bench(monkeypatch, small_blocks):
    """A Bench on a GPU that is not there."""
    event = SimpleNamespace(record=lambda stream: None)
    cuda = SimpleNamespace(Event=lambda: event, get_elapsed_time=lambda a, b: 128.0)
    dev = SimpleNamespace(name="NVIDIA H200", stream=None, synchronize=lambda: None,
                          cache=SimpleNamespace(frozen=True), cupy=SimpleNamespace(cuda=cuda, __version__="14"))
    monkeypatch.setattr(bench_decode, "CudaEngine", FakeEngine)
    monkeypatch.setattr(bench_decode, "preset", lambda name: CONFIG)
    monkeypatch.setattr(bench_decode, "ceilings", lambda b: {"copy": 4e12})
    monkeypatch.setattr(FakeEngine, "fails", None)
    return SimpleNamespace(dev=dev, peers=None, quick=True, blocks={})


def rows_of(folder: Path) -> list[dict[str, str]]:
    """What was kept."""
    with open(folder / "nvidia-h200" / "decode.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_plan_gives_its_rows_under_the_columns(bench, tmp_path, capsys):
    assert bench_decode.measure_all("some", bench, tmp_path) == 0
    rows = rows_of(tmp_path)
    assert tuple(rows[0]) == bench_decode.COLUMNS and capsys.readouterr().err == ""
    assert [(r["precision"], r["batch"], r["context"], r["sampling"], r["what"]) for r in rows] == [
        *(("bf16", "1", t, s, w) for t in ("128", "2000") for s in ("greedy", "drawn") for w in ("step", "generate")),
        *(("bf16", "1", t, "greedy", w) for t in ("512", "2048") for w in ("first", "prefill")),
        *(("bf16", "8", "128", s, w) for s in ("greedy", "drawn") for w in ("step", "generate")),
        *(("fp32", "1", "128", "greedy", w) for w in ("step", "generate")),
        *(("fp32", "1", "512", "greedy", w) for w in ("first", "prefill"))]
    step = rows[0]  # 128 ms for 128 steps
    assert (step["ms"], step["tok_s"], step["torch"], step["peer"]) == ("1", "1000", "", "")
    roof = 4e12 / bench_decode.step_bytes(CONFIG, 2, 1, 128 + bench_decode.STEPS // 2)
    assert float(step["roof_tok_s"]) == pytest.approx(roof, rel=1e-4)
    assert float(step["of_roof"]) == pytest.approx(1000 / roof, rel=1e-4)
    eight = next(r for r in rows if r["batch"] == "8")
    assert eight["tok_s"] == "8000"
    assert float(eight["of_roof"]) * float(eight["roof_tok_s"]) == pytest.approx(8000, 1e-3)


def test_what_fails_is_named_and_the_rest_goes_on(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FakeEngine, "fails", "_prefill")
    assert bench_decode.measure_all("some", bench, tmp_path) == 0
    assert {r["what"] for r in rows_of(tmp_path)} == {"generate"}
    assert "step: ValueError: no such thing" in capsys.readouterr().err
    monkeypatch.setattr(FakeEngine, "error", DeviceFault("a", "b", "c", "d"))
    with pytest.raises(DeviceFault):
        bench_decode.measure_all("some", bench, tmp_path)


def test_loading_is_measured_from_both_kinds_of_file(bench, capsys):
    found = bench_decode.load_times("some", bench)
    assert list(found) == ["apr, .apr", "apr, safetensors"] and all(rate > 0 for rate in found.values())
    assert capsys.readouterr().out.count("GiB/s") == 2


@pytest.mark.parametrize("arguments", [["--quick"], ["--load"], ["--no-peer"]])
def test_without_a_gpu_it_is_one_line_and_exit_code_9(arguments, monkeypatch, capsys):
    monkeypatch.setattr(driver, "probe", lambda: driver.DriverInfo(False, "no driver here", "", ()))
    assert bench_decode.main(arguments) == 9
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("apr: ") and err.count("\n") == 1
    assert bench_decode.main(["--preset", "nonesuch"]) == 2


def test_its_rows_are_not_those_of_kernels():
    assert bench_decode.COLUMNS != harness.COLUMNS and len(set(bench_decode.COLUMNS)) == len(bench_decode.COLUMNS)
