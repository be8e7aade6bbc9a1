"""The start gate: it lets a sound engine through, and names the layer and stage of a broken one."""

import dataclasses

import numpy as np
import pytest
from models import FAMILIES, random_params, source_of

from apr.errors import GateError
from apr.infer.cuda_engine import CudaEngine
from apr.tools.gate import check, start_gate

PRECISIONS = ["fp32", "bf16"]
MODELS = {name: dataclasses.replace(c, head_dim=32, num_hidden_layers=3, vocab_size=307,
                                    hidden_size=128 if name == "llama" else 96)
          for name, c in FAMILIES.items()}
BIAS = "model.layers.2.self_attn.{}_proj.bias"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def sources(name, precision, change=lambda config, params: (config, params)):
    """The model, and what a broken reader makes of it."""
    params = random_params(MODELS[name], 5, "BF16" if precision == "bf16" else "F32")
    return source_of(MODELS[name], params), source_of(*change(MODELS[name], dict(params)))


def engine_of(dev, source, precision, b=1):
    """An engine that may compile."""
    dev.cache.frozen = False
    return CudaEngine(source, dev, precision, b, 32)


@pytest.mark.parametrize("b", [1, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", list(MODELS))
def test_the_gate_passes_a_sound_engine(dev, name, precision, b):
    sound, _ = sources(name, precision)
    report = check(engine_of(dev, sound, precision, b), sound)
    assert report["tokens"] == 8 and report["worst_stage"]["relative_l2"] > 0
    assert report["worst_stage"]["relative_l2"] <= 0.8 * report["worst_stage"]["limit"], report


def config_with(**changes):
    """A reader that gets a number of the configuration wrong."""
    return lambda config, params: (dataclasses.replace(config, **changes), params)


def params_with(*names, change):
    """A reader that gets parameters wrong."""
    return lambda config, params: (config, params | {n: change(params[n]) for n in names})


def neighbours(heads):
    """Rows in GPT-J's order: neighbouring channels turn together."""
    return lambda w: np.concatenate([np.stack(np.split(h, 2), 1).reshape(h.shape) for h in np.split(w, heads)])


FAULTS = {
    "a bias dropped in the last layer": ("qwen2", params_with(BIAS.format("v"), change=np.zeros_like), "L02.v_bias"),
    "eps": ("llama", config_with(rms_norm_eps=1e-4), "L00.attn_norm"),
    "theta": ("llama", config_with(rope_theta=1e6), "L00.q_rope"),
    "pairing": ("llama", params_with("model.layers.1.self_attn.q_proj.weight", change=neighbours(4)), "L01.q_linear"),
    "O transposed": ("llama", params_with(O_PROJ, change=lambda w: np.ascontiguousarray(w.T)), "L01.attn_out"),
    "gate for up": ("qwen3", lambda c, p: (c, p | {"model.layers.0.mlp.up_proj.weight":
                                                   p["model.layers.0.mlp.gate_proj.weight"]}), "L00.ffn_up"),
    "a head norm dropped": ("qwen3", params_with("model.layers.2.self_attn.k_norm.weight", change=np.ones_like),
                            "L02.k_norm"),
    "one wrong number in the head": ("llama", params_with("lm_head.weight", change=lambda w: w * (1 + 300 * np.eye(
        *w.shape, dtype=np.float32) * (np.arange(w.shape[1]) == 5)).astype(w.dtype)), "logits"),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fault", list(FAULTS))
def test_the_gate_names_where_a_broken_engine_goes_wrong(dev, fault, precision):
    name, change, stage = FAULTS[fault]
    sound, broken = sources(name, precision, change)
    with pytest.raises(GateError, match=rf"FALSIFY-CPU-GPU-003 {stage} ") as caught:
        check(engine_of(dev, broken, precision), sound)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gate_sees_a_cache_slot_off_by_one(dev, precision, monkeypatch):
    sound, _ = sources("qwen2", precision)
    engine = engine_of(dev, sound, precision)
    right = engine._state
    monkeypatch.setattr(engine, "_state", lambda ids, at, *rest: right(ids, [i + 1 for i in at], *rest))
    with pytest.raises(GateError, match="decoding"):
        check(engine, sound)


def test_the_verdict_is_remembered_for_these_weights_and_can_be_skipped(dev, monkeypatch):
    sound, other = sources("qwen2", "bf16", params_with(BIAS.format("q"), change=lambda b: -b))
    warnings = []
    engine = engine_of(dev, sound, "bf16")
    assert start_gate(engine, sound, warnings.append)["status"] == "passed"
    again = start_gate(engine_of(dev, sound, "bf16"), sound, warnings.append)
    assert again["status"] == "remembered" and again["tokens"] == 8
    with pytest.raises(GateError):
        start_gate(engine_of(dev, other, "bf16"), sound, warnings.append)
    assert warnings == []
    monkeypatch.setenv("SKIP_PARITY_GATE", "1")
    assert start_gate(engine_of(dev, other, "bf16"), sound, warnings.append)["status"] == "skipped"
    assert len(warnings) == 1 and "SKIP_PARITY_GATE" in warnings[0]
