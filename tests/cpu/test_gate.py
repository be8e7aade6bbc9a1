"""The start gate's judgement, with the CPU engine in the GPU's place: what it passes, names, refuses and remembers."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from models import FAMILIES, random_params, source_of

from apr.errors import GateError
from apr.infer.cpu_engine import CpuEngine
from apr.tools import gate
from apr.tools.gate import _Judge, _key, check, start_gate

PARAMS = {name: random_params(config, 5) for name, config in FAMILIES.items()}


class Planted(CpuEngine):
    """An engine that shows stages otherwise than it computes them: `plant` takes way, name and array."""

    def __init__(self, name, plant=lambda way, stage, array: array, config=None, params=None):
        super().__init__(config or FAMILIES[name], params or PARAMS[name], 1, 32)
        self.plant = plant

    def scores(self, prompts, cached, tap=None):
        way = "prompt" if cached[0] else "decoding"

        def changed(stage, array):
            seen = self.plant(way, stage, array)
            if seen is not None:
                tap(stage, seen)
        return super().scores(prompts, cached, changed)


def sound(name):
    return source_of(FAMILIES[name], PARAMS[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sound_engine_passes(name):
    report = check(Planted(name), sound(name))
    assert report["tokens"] == 8 and report["near_ties"] == 0 and report["logits_relative_l2"] < 1e-5
    assert report["worst_stage"]["relative_l2"] <= report["worst_stage"]["limit"] == 5e-5


BIAS = "model.layers.1.self_attn.v_proj.bias"
FAULTS = {  # what is loaded wrongly, and the stage that shows it first
    "eps": ("llama", {"rms_norm_eps": 1e-4}, {}, "L00.attn_norm"),
    "theta": ("llama", {"rope_theta": 1e6}, {}, "L00.q_rope"),
    "a bias dropped in the last layer": ("qwen2", {}, {BIAS: np.zeros_like}, "L01.v_bias"),
    "a head norm dropped": ("qwen3", {}, {"model.layers.1.self_attn.k_norm.weight": np.ones_like}, "L01.k_norm"),
    "a matrix reshaped": ("llama", {}, {"model.layers.1.mlp.down_proj.weight": lambda w: w.reshape(48, 32).T.copy()},
                          "L01.ffn_out"),
    "the head": ("llama", {}, {"lm_head.weight": lambda w: np.roll(w, 1, 0)}, "logits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_stage_that_differs_is_named(fault):
    name, config, params, stage = FAULTS[fault]
    given = {n: params[n](a) if n in params else a for n, a in PARAMS[name].items()}
    engine = Planted(name, config=dataclasses.replace(FAMILIES[name], **config), params=given)
    with pytest.raises(GateError, match=rf"FALSIFY-CPU-GPU-003 {stage} \(prompt\)") as caught:
        check(engine, sound(name))
    assert caught.value.exit_code == 5


def planted(way, stage, change):
    """A plant in one stage, one way."""
    return lambda w, s, a: change(a) if (w, s) == (way, stage) else a


def noise(size):
    """A relative error of this size across the array, which leaves its scale as it was."""
    def change(a):
        rough = np.random.default_rng(1).standard_normal(a.shape)
        rough -= a * (rough * a).sum() / (a.astype(np.float64) ** 2).sum()
        return a + size * rough * np.linalg.norm(a) / np.linalg.norm(rough)
    return change


@pytest.mark.parametrize("way", ["prompt", "decoding"])
@pytest.mark.parametrize(("change", "passes"), [
    (noise(4e-5), True), (noise(7e-5), False), (lambda a: a * (1 + 1.5e-5), True), (lambda a: a * (1 + 2.7e-5), False),
    (lambda a: a * (1 - 2.7e-5), False), (lambda a: np.full_like(a, np.nan), False), (lambda a: -a, False)])
def test_error_and_scale_have_limits_of_their_own(way, change, passes):
    """A scale of 1 + 2.7e-5 is an error within the limit, and a cosine of 1."""
    engine = Planted("qwen2", planted(way, "L01.attn_out", change))
    if passes:
        check(engine, sound("qwen2"))
    else:
        with pytest.raises(GateError, match=rf"L01\.attn_out \({way}\)"):
            check(engine, sound("qwen2"))


@pytest.mark.parametrize("way", ["prompt", "decoding"])
def test_a_stage_that_was_not_seen_is_no_stage_that_agrees(way):
    engine = Planted("qwen3", planted(way, "L01.attn_heads", lambda a: None))
    with pytest.raises(GateError, match=rf"{way}: expected every stage.*1 missing, L01\.attn_heads first"):
        check(engine, sound("qwen3"))


@pytest.mark.parametrize(("precision", "error", "gap", "fine"), [
    ("fp32", 9e-4, 1.0, True), ("fp32", 2e-3, 1.0, False), ("bf16", 0.2, 1.0, True), ("bf16", 0.3, 1.0, False),
    ("bf16", 0.0, 0.015, True), ("bf16", 0.0, 0.03, False)])
def test_scores_end_to_end_and_their_near_ties(precision, error, gap, fine):
    """`gap` under 1: the two best of the last position change places, that far apart in the spread of the scores."""
    truth = np.random.default_rng(2).uniform(0, 0.5, (3, 50))
    truth[:, 0], truth[:, 7], truth[:, 9] = 0, 1, 1 - gap if gap < 1 else 0.6
    seen = truth.copy()
    seen[0] *= 1 + error  # in one position, which a mean over all would hide
    if gap < 1:
        seen[2, [7, 9]] = seen[2, [9, 7]]
    judge = _Judge(precision, {"prompt": {"logits": seen}, "decoding": {"logits": truth}})
    if fine:
        report = judge.whole(truth)
        assert report["near_ties"] == (gap < 1) and report["logits_relative_l2"] >= 0.9 * error
    else:
        with pytest.raises(GateError, match=r"logits at position \d \(prompt\)"):
            judge.whole(truth)


def engine_with(folder, **changes):
    """What the verdict's key reads of an engine."""
    facts = {"weights_sha256": "a", "name": "H200", "gemm": 1, "toolchain": "t", "precision": "bf16", "B": 1, **changes}
    cache = SimpleNamespace(store=SimpleNamespace(path=folder), toolchain=facts["toolchain"])
    return SimpleNamespace(weights_sha256=facts["weights_sha256"], precision=facts["precision"], B=facts["B"],
                           dev=SimpleNamespace(name=facts["name"], cache=cache),
                           net=SimpleNamespace(gemm=SimpleNamespace(version=facts["gemm"])))


def test_the_verdict_depends_on_all_that_made_it(tmp_path, monkeypatch):
    changes = [{}, {"weights_sha256": "b"}, {"name": "A100"}, {"gemm": 2}, {"toolchain": "u"}, {"precision": "fp32"},
               {"B": 2}]
    keys = [_key(engine_with(tmp_path, **c)) for c in changes]
    assert len(set(keys)) == len(keys) and _key(engine_with(tmp_path)) == keys[0]
    found = gate.driver.probe()
    for target, value in (("driver.probe", lambda: dataclasses.replace(found, driver_version="99.0")),
                          ("driver.cupy_distributions", lambda: {"cupy-cuda12x": "99"}),
                          ("_sources_sha256", lambda: "other sources")):
        with monkeypatch.context() as patch:
            patch.setattr(f"apr.tools.gate.{target}", value)
            assert _key(engine_with(tmp_path)) not in keys, target


def test_a_verdict_is_remembered_unless_it_is_spoilt_and_skipping_is_said(tmp_path, monkeypatch):
    calls, warnings, engine = [], [], engine_with(tmp_path)
    monkeypatch.setattr(gate, "check", lambda *_: calls.append(1) or {"tokens": 8})
    assert [start_gate(engine, None, warnings.append)["status"] for _ in range(2)] == ["passed", "remembered"]
    assert start_gate(engine_with(tmp_path, B=2), None, warnings.append)["status"] == "passed" and len(calls) == 2
    (tmp_path / f"gate-{_key(engine)}.json").write_text("[]")
    assert start_gate(engine, None, warnings.append)["status"] == "passed" and warnings == []
    monkeypatch.setenv("SKIP_PARITY_GATE", "1")
    assert start_gate(engine, None, warnings.append)["status"] == "skipped" and len(calls) == 3
    assert len(warnings) == 1 and "SKIP_PARITY_GATE" in warnings[0]
