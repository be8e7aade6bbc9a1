"""Bisect, on NumPy stand-ins for a GPU: a sound model has no finding, a planted fault is named with stage and cause."""

import dataclasses

import numpy as np
import pytest
from host_subjects import HostEngine, HostTrainer
from models import FAMILIES, random_params, source_of

import apr.reference.block as block
import apr.reference.kv_cache as kv_cache
import apr.reference.model as model
from apr.reference.adamw import adamw_update
from apr.reference.cross_entropy import cross_entropy_forward_backward
from apr.tools.bisect import LIMITS, Bisection

MODELS = {name: dataclasses.replace(c, vocab_size=131, num_hidden_layers=3, num_attention_heads=6,
                                    num_key_value_heads=2, hidden_size=48) for name, c in FAMILIES.items()}
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def source(name, seed=5):
    """A model at which every constant shows."""
    return source_of(MODELS[name], random_params(MODELS[name], seed))


def search(kind, name, upload=lambda name, array: array, everything=False, prepare=lambda subject: None):
    """The bisection of a stand-in."""
    file = source(name)
    subject = kind(file, upload)
    prepare(subject)
    bisection = Bisection(file, subject, 0, everything)
    (bisection.inference if kind is HostEngine else bisection.training)(subject)
    return bisection


def findings(*args, **kwargs):
    """What the bisection of a stand-in found, which must be something."""
    found = search(*args, **kwargs).findings
    assert found, "the fault was not found"
    return found


@pytest.mark.parametrize("kind", [HostEngine, HostTrainer])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_sound_model_has_no_finding(kind, name):
    bisection = search(kind, name, everything=True)
    assert bisection.findings == []
    report = bisection.report()
    assert len(report["phases"]) == (4 if kind is HostEngine else 6)
    assert all(p["checks"] > 0 for p in report["phases"])
    worst = max(p["worst"] for p in report["phases"])
    assert max(floor for p in report["phases"] for floor in p["floors"].values()) == worst
    assert 0 < worst <= 0.5 * LIMITS["fp32"].error, report["phases"]


def once(monkeypatch, module, name, wrong, number=None):
    """Replace a function of a module, for its call `number` or for all."""
    right, calls = getattr(module, name), [0]

    def replaced(*args, **kwargs):
        calls[0] += 1
        return (wrong if number in (None, calls[0]) else right)(*args, **kwargs)

    monkeypatch.setattr(module, name, replaced)


def eps_of_llama(x, weight, eps):
    """RMSNorm with another eps."""
    from apr.reference.rmsnorm import rmsnorm_forward
    return rmsnorm_forward(x, weight, 1e-5)


def no_bias(x, bias):
    """A dropped bias."""
    return x.copy()


def theta_of_llama(positions, head_size, theta, scaling, dtype):
    """RoPE tables of another theta."""
    from apr.reference.rope import rope_tables
    return rope_tables(positions, head_size, 1e4, scaling, dtype)


def neighbours(x, cos, sin):
    """Rotation of neighbouring pairs."""
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 1::2] * cos + x[..., 0::2] * sin
    return out


FORWARD = {  # module, function, wrong one, stage, kind, value
    "eps": (block, "rmsnorm_forward", eps_of_llama, "L00.attn_norm", "eps", 1e-5),
    "bias": (block, "bias_forward", no_bias, "L00.q_bias", "bias_missing", None),
    "theta": (model, "rope_tables", theta_of_llama, "L00.q_rope", "theta", 1e4),
    "pairs": (block, "rope_forward", neighbours, "L00.q_rope", "pairs", None),
}


@pytest.mark.parametrize("fault", list(FORWARD))
def test_a_planted_fault_of_forward_is_named(monkeypatch, fault):
    module, function, wrong, stage, kind, value = FORWARD[fault]
    monkeypatch.setattr(module, function, wrong)
    found = findings(HostTrainer, "qwen2")
    assert (found[0].stage, found[0].cause.kind) == (stage, kind), found[0]
    assert value is None or found[0].cause.value == pytest.approx(value, rel=0.05)


def test_the_first_stage_is_named_where_the_last_layer_is_wrong(monkeypatch):
    once(monkeypatch, block, "rmsnorm_forward", eps_of_llama, 5)  # the third layer's first norm
    found = findings(HostTrainer, "qwen2")
    assert (found[0].stage, found[0].cause.kind, found[0].contract) == (
        "L02.attn_norm", "eps", "apr-pretrain-cuda-rmsnorm-eps-parity-v1")


@pytest.mark.parametrize("kind", [HostEngine, HostTrainer])
def test_a_transposed_upload_is_named(kind):
    found = findings(kind, "llama", lambda n, a: np.ascontiguousarray(a.T) if n == O_PROJ else a)
    assert [(f.phase, f.stage, f.cause.kind) for f in found] == [
        ("H4D.1 uploads", f"upload.{O_PROJ}", "transposed")]


def test_one_flipped_bit_of_an_upload_is_named():
    def flip(name, array):
        if name == O_PROJ:
            array = array.copy()
            array.view(np.uint32)[3, 4] ^= 1
        return array

    found = findings(HostEngine, "llama", flip)
    assert found[0].stage == f"upload.{O_PROJ}"
    assert found[0].cause.kind == "bits"
    assert "1 of 2304 elements are not the file's, the first at [3, 4]" in found[0].cause.text


def test_stale_keys_are_named(monkeypatch):
    right = kv_cache.KVCache.attend

    def forgetful(self, layer, rows):
        def cached(q, k, v, scale):
            start, end = self.lengths[0], self.lengths[0] + q.shape[1]
            kept = self.k[layer, 0, start:end].copy()
            out = right(self, layer, rows)(q, k, v, scale)
            if q.shape[1] > 1:  # a prompt's keys are used, but not kept
                self.k[layer, 0, start:end] = kept
            return out
        return cached

    monkeypatch.setattr(kv_cache.KVCache, "attend", forgetful)
    found = findings(HostEngine, "qwen2")
    assert [(f.phase, f.stage, f.cause.kind) for f in found] == [("H4D.2 decoding", "L00.k_cache", "stale")]


def test_generation_that_starts_elsewhere_is_named():
    def prepare(subject):
        right = subject.generate
        subject.generate = lambda ids, count: right(ids[:-1], count)  # one token too early

    found = findings(HostEngine, "llama", prepare=prepare)
    assert (found[0].phase, found[0].stage, found[0].cause.kind) == ("H4D.2 generation", "generated", "tokens")


def off_by_one(logits, targets, dloss):
    """Cross-entropy that reads the next row's target."""
    return cross_entropy_forward_backward(logits, np.roll(targets, -1), dloss)


def test_a_cross_entropy_off_by_one_row_is_named():
    found = findings(HostTrainer, "llama", prepare=lambda s: setattr(s, "cross_entropy", off_by_one))
    assert (found[0].phase, found[0].stage, found[0].cause.kind) == ("H4D.3 loss", "losses", "target_row")


def uncorrected(param, m, v, grad, *, step, **rest):
    """AdamW without bias correction."""
    adamw_update(param, m, v, grad, step=10**9, **rest)


def test_adamw_without_bias_correction_is_named():
    found = findings(HostTrainer, "llama", prepare=lambda s: setattr(s, "adamw", uncorrected))
    assert found[0].phase == "H4D.4 optimizer" and found[0].stage.startswith("update.")
    assert found[0].cause.kind == "correction"


def test_a_gradient_of_the_wrong_heads_is_named(monkeypatch):
    right = block.attention_backward

    def wrong(dout, q, k, v, prob, scale):
        dq, dk, dv = right(dout, q, k, v, prob, scale)
        return dq, dk[:, :, ::-1], dv

    monkeypatch.setattr(block, "attention_backward", wrong)
    found = findings(HostTrainer, "llama")
    assert (found[0].phase, found[0].stage) == ("H4D.2 backward", "L02.dk_rope")
    assert found[0].cause.kind == "permuted"
