"""One model's points on the CPU, on the GPU and from a GGUF export: matched, all within tolerance, both directions."""

import dataclasses

import numpy as np
import pytest
from models import FAMILIES, random_params, source_of

from apr.cli.main import main
from apr.errors import GateError
from apr.formats.export import export_gguf
from apr.formats.gguf_model import open_gguf_model
from apr.formats.model_file import save_model
from apr.tools.device import Choice
from apr.tools.trace import capture
from apr.tools.trace_diff import diff, judge
from apr.tools.trace_file import open_trace, save_trace
from apr.tools.trace_points import all_points

PRECISIONS = ["fp32", "bf16"]
MODELS = {name: dataclasses.replace(c, head_dim=32, num_hidden_layers=3, vocab_size=307,
                                    hidden_size=128 if name == "llama" else 96)
          for name, c in FAMILIES.items()}
TOKENS = np.random.default_rng(2).integers(0, 307, 24).tolist()
CPU = Choice("cpu", 0, "fp32")
BIAS = "model.layers.1.self_attn.k_proj.bias"


def source(name, precision, change=lambda params: params):
    """A model, its weights of the storage type."""
    return source_of(MODELS[name], change(random_params(MODELS[name], 5, "BF16" if precision == "bf16" else "F32")))


def traced(of, dev, precision, backward, place="cuda"):
    """Every point of a model, on the GPU unless said otherwise."""
    names = all_points(of.config, backward)
    dev.cache.frozen = False
    choice = Choice("cuda", 0, precision) if place == "cuda" else CPU
    return capture(of, choice, TOKENS, names, names, backward, device=dev)


@pytest.mark.parametrize("backward", [False, True], ids=["generation", "training"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_cpu_gpu_and_gguf_agree_at_every_point(dev, tmp_path, name, precision, backward):
    of = source(name, precision)
    export_gguf(of, tmp_path / "m.gguf")
    gpu, cpu = traced(of, dev, precision, backward), traced(of, dev, precision, backward, "cpu")
    with open_gguf_model(tmp_path / "m.gguf") as other:
        gguf = traced(other, dev, precision, backward)
    names = all_points(of.config, backward)
    for other, truth in ((gpu, cpu), (gguf, cpu), (gguf, gpu)):
        points = diff(other, truth)
        judge(points)
        assert [p.name for p in points] == names
        assert all(p.std > 0 and p.other_std > 0 for p in points), "a point of equal numbers shows nothing"
        exact = [p.difference.relative_l2 == 0 for p in points]
        assert all(exact) if truth is gpu else not all(exact), "the same bytes in another file; another computation"
    if backward:
        assert abs(gpu.loss - cpu.loss) <= (1e-5 if precision == "fp32" else 2e-2)
    assert (gpu.device, gpu.precision, cpu.device) == ("cuda:0", precision, "cpu")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_generation_and_training_show_the_same_numbers(dev, precision):
    """Two plans and two ways to the logits, but the same kernels of a layer."""
    of = source("qwen3", precision)
    names = all_points(of.config, False)
    one, two = traced(of, dev, precision, False), traced(of, dev, precision, True)
    two = dataclasses.replace(two, arrays={n: two.arrays[n] for n in names})
    judge(diff(one, two))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_dropped_bias_is_seen_after_the_bias_and_not_before(dev, precision):
    bad = source("qwen2", precision, lambda params: params | {BIAS: 0 * params[BIAS]})
    points = diff(traced(bad, dev, precision, False), traced(source("qwen2", precision), dev, precision, False, "cpu"))
    with pytest.raises(GateError, match=r"TRACE-DIFF L01\.k_bias: "):
        judge(points)


def test_a_trace_from_the_gpu_is_saved_and_read(dev, tmp_path):
    trace = traced(source("qwen3", "bf16"), dev, "bf16", True)
    save_trace(trace, tmp_path / "t")
    back = open_trace(tmp_path / "t")
    assert back.arrays.keys() == trace.arrays.keys()
    assert all((back.arrays[n] == a).all() for n, a in trace.arrays.items())
    assert dataclasses.replace(back, arrays={}) == dataclasses.replace(trace, arrays={})


def test_the_command_compares_the_gpu_with_the_cpu(dev, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("APR_CACHE_DIR", str(tmp_path / "cache"))
    config = MODELS["qwen2"]
    save_model(tmp_path / "m.apr", config, random_params(config, 5), "m")
    for other, precision in (("cpu", "fp32"), ("cuda:fp32", "bf16")):
        assert main(["trace", str(tmp_path / "m.apr"), "--device", "cuda", "--precision", precision, "--diff", other,
                     "--backward"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[-1].endswith("all within") and out[-1].startswith(f"{len(all_points(config, True))} points compared")
