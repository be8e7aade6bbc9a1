"""`apr parity`'s judge, with stand-ins for the GPU: sound ones pass, planted faults are named, nothing is no pass."""

import dataclasses
import itertools

import numpy as np
import pytest
from compare import relative_l2
from models import source_of
from parity_engines import FAULTS, MODELS, Exact, Rounded, Stale, broken, params_with, sound

from apr.errors import ConfigError, GateError, MeasureError
from apr.params import EMBED
from apr.reference.model import model_forward
from apr.tools.parity import WAYS, against_model, against_reference, against_scores
from apr.tools.parity_judge import Limit, Measured, fixed_limit, judge, measure
from apr.tools.parity_models import weight_faults
from apr.tools.parity_prompts import MAX_TOKENS, Prompt, built_in
from apr.tools.parity_truth import reference_scores
from apr.tools.weights import TensorFault, tensor_fault

ENGINES = {"fp32": Exact, "bf16": Rounded}
SAME = ()  # of the weights nothing was compared


@pytest.mark.parametrize("name", list(MODELS))
def test_the_reference_by_layers_is_the_model(name):
    source = sound(name)
    prompts = [[5, 9, 200], list(range(40)), [1], list(range(25))]
    params = {n: source.read(n) for n in source.shapes}
    for ids, scores in zip(prompts, reference_scores(source, prompts, "fp32"), strict=True):
        assert relative_l2(scores, model_forward(params, source.config, np.array([ids]))[0]) <= 1e-6
    fine, exact, rounded = (reference_scores(source, prompts[:1], "bf16", a)[0] for a in ("fp64", "fp32", "bf16"))
    assert 1e-3 < relative_l2(rounded, exact) < 0.1 and 1e-8 < relative_l2(exact, fine) < 1e-5
    assert (rounded.view(np.uint32) & 0xFFFF == 0).all() and (exact.view(np.uint32) & 0xFFFF != 0).any()


@pytest.mark.parametrize("precision", list(ENGINES))
@pytest.mark.parametrize("name", list(MODELS))
def test_a_sound_engine_passes(name, precision):
    for seed in range(2):
        source = sound(name, precision, seed)
        prompts = built_in(source.config, None)
        report = against_reference(ENGINES[precision](source), source, prompts, SAME)
        report.require()
        total = sum(len(p.ids) for p in prompts)
        by_way = {way: sum(p.way == way for p in report.positions) for way in WAYS}
        assert by_way["prompt"] == by_way["decoding"] == total > by_way["continued"] > total / 3
        share = max(p.measured.relative_l2 / p.limit.relative_l2 for p in report.positions)
        assert 0.05 < share < 0.8, "a limit that nothing comes near says nothing"
        assert report.summary()["hints"] == []


def test_float32_may_be_as_far_off_as_float32_is(monkeypatch):
    source = sound("llama")
    prompts = built_in(source.config, None, 60)
    monkeypatch.setattr("apr.tools.parity_judge.FP32_ERROR", 1e-9)  # as if the model amplified roundings far more
    report = against_reference(Exact(source), source, prompts, SAME)
    assert report.verdict == "pass"
    limits = {p.limit.relative_l2 for p in report.positions}
    assert len(limits) > 1 and 1e-7 < max(limits) < 1e-4
    scaled = source_of(*params_with("lm_head.weight", change=lambda w: w * np.float32(1 + 1e-4))(
        source.config, {n: source.read(n) for n in source.shapes}))
    assert against_reference(Exact(scaled), source, prompts, SAME).verdict == "fail"


@pytest.mark.parametrize("precision", list(ENGINES))
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_broken_engine_fails_at_a_named_position(fault, precision):
    source, wrong = broken(fault, precision)
    report = against_reference(ENGINES[precision](wrong), source, built_in(source.config, None), SAME)
    with pytest.raises(GateError, match=r"FALSIFY-CPU-GPU-006 (prompt '\w+' \(\w+\) position \d+|all \d+ positions)"):
        report.require()
    assert report.verdict == "fail" and "bisect" in report.summary()["next"]


def test_the_place_of_a_failure_says_what_kind_it_is():
    for fault, said in (("theta", "position 0 is right and later ones are not"), ("theta", "only"),
                        ("O transposed", "position 0 fails"), ("head scaled", "the scale is 1.02")):
        source, wrong = broken(fault)
        found = " / ".join(against_reference(Exact(wrong), source, built_in(source.config, None), SAME)
                           .summary()["hints"])
        assert (said in found) == (said != "only"), (fault, found)


def test_old_keys_in_the_cache_are_seen_where_a_prompt_follows_a_longer_one():
    source = sound("llama")
    prompts = built_in(source.config, None)
    report = against_reference(Stale(source), source, prompts, SAME)
    with pytest.raises(GateError, match=r"prompt 'repeated' \(decoding\) position"):
        report.require()
    assert any("old keys" in hint for hint in report.summary()["hints"])
    assert "prompt" not in {p.way for p in report.failed}
    alone = against_reference(Stale(source), source, prompts[:1], SAME)
    assert {p.way for p in alone.failed} <= {"continued"}


def test_a_wrong_upload_is_a_failure_that_names_the_tensor_and_scores_are_still_compared():
    source = sound("llama")
    fault = TensorFault("lm_head.weight", 7, 1, 39296, 1.0, 2.0)
    weights = [("model.norm.weight", None), ("lm_head.weight", fault)]
    report = against_reference(Exact(source), source, built_in(source.config, None, 20), weights)
    assert report.weights_compared == 2 and not report.failed and len(report.positions) > 20
    with pytest.raises(GateError, match=r"weight 'lm_head.weight' element 7: expected 1, .*found 2 \(1 of 39296"):
        report.require()


class Spoiled(Exact):
    """One score of the last position of the last prompt is no number."""

    value = np.nan

    def scores(self, prompts, cached, tap=None):
        """As Engine.scores."""
        found = super().scores(prompts, cached, tap)
        if prompts[0] == [MODELS["llama"].V // 3]:
            found[-1][-1, 3] = self.value
        return found


@pytest.mark.parametrize(("value", "text"), [(np.nan, "1 NaN and 0 inf"), (np.inf, "0 NaN and 1 inf")])
def test_a_score_that_is_no_number_fails(value, text):
    source = sound("llama")
    engine = Spoiled(source)
    engine.value = value
    report = against_reference(engine, source, built_in(source.config, None), SAME)
    with pytest.raises(GateError, match=rf"prompt 'single' \(decoding\) position 0.*{text}"):
        report.require()
    assert {p.prompt for p in report.failed} == {"single"} and report.summary()["worst"]["kl"]["prompt"] == "single"


def test_nothing_measured_is_not_a_pass():
    source = sound("qwen3")
    params = {n: source.read(n) for n in source.shapes} | {EMBED: np.zeros(source.shapes[EMBED], np.float32)}
    flat = source_of(source.config, params)  # a tied head of zeros: every score is 0
    report = against_reference(Exact(flat), flat, built_in(source.config, None, 9), SAME)
    assert report.verdict == "unmeasured" and report.summary()["worst"]["relative_l2"] is None
    with pytest.raises(MeasureError, match="all equal") as caught:
        report.require()
    assert caught.value.exit_code == 12
    with pytest.raises(MeasureError, match="no position"):
        against_reference(Exact(source), source, [], SAME).require()


def judged(found, expected, limit=None):
    return judge(Prompt("p", [4]), "prompt", 0, measure(np.array(found, np.float32), np.array(expected, np.float32)),
                 limit or Limit(0.5, 0.5, 0.5))


def test_near_ties_and_what_is_none():
    expected = [0.0, 10.0, 9.9, -10.0]
    near = judged([0.0, 9.9, 10.0, -10.0], expected)
    assert (near.verdict, near.measured.expected_argmax, near.measured.found_argmax) == ("near tie", 1, 2)
    assert judged([0.0, 10.0, 9.9, -10.0], expected).verdict == "pass"
    assert judged([1.0] * 4, [1.0] * 4).verdict == "unmeasured"
    tight = Limit(0.01, 0.5, 0.5)
    assert "token 0 the likeliest" in judged([10.1, 10.0, 9.9, -10.0], expected).why
    assert judged([0.0, 9.9, 10.0, -10.0], expected, tight).verdict == "near tie"
    assert "KL" in judged([0.0, 10.0, 9.9, -10.0], expected, Limit(1, -1, 1)).why
    lost = dataclasses.replace(near.measured, relative_l2=np.nan)
    assert judge(Prompt("p", [4]), "prompt", 0, lost, tight).verdict == "fail"
    assert "relative L2" in judged([0.0, 10.1, 9.9, -10.0], expected, Limit(1e-3, 1, 1)).why


def test_the_numbers_are_right():
    rng = np.random.default_rng(0)
    t, a = rng.standard_normal((2, 50)).astype(np.float32)
    m = measure(a, t)
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (t, a))
    assert m.kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-9)
    assert m.mean_abs == pytest.approx(float(np.abs(a - t).mean()), rel=1e-6)
    assert m.scale == pytest.approx(float(a @ t / (t @ t)), rel=1e-5) and (m.nans, m.infs) == (0, 0)
    assert isinstance(m, Measured) and m.expected_argmax == t.argmax() and m.found_argmax == a.argmax()
    assert fixed_limit(48).relative_l2 == 2 * fixed_limit(24).relative_l2 == 2 * fixed_limit(3).relative_l2


def test_two_files_are_compared_field_by_field_and_bit_by_bit():
    source = sound("qwen2")
    prompts = built_in(source.config, None, 30)
    same = against_model(source, sound("qwen2"), Exact, prompts)
    assert same.verdict == "pass" and same.weights_compared == len(source.shapes) and not same.field_faults
    name = "model.layers.0.self_attn.q_proj.bias"
    config, params = params_with(name, change=lambda b: b + (np.arange(b.size) == 3).astype(b.dtype))(
        source.config, {n: source.read(n) for n in source.shapes})
    other = against_model(source, source_of(config, params), Exact, prompts)
    assert [(f.name, f.index, f.count) for f in other.weight_faults] == [(name, 3, 1)] and other.failed
    with pytest.raises(GateError, match=rf"weight '{name}' element 3"):
        other.require()
    renamed = dataclasses.replace(source.config, max_position_embeddings=200, rms_norm_eps=2e-6)
    eps = against_model(source, source_of(renamed, {n: source.read(n) for n in source.shapes}), Exact, prompts)
    assert [(f.name, f.computed) for f in eps.field_faults] == [("max_position_embeddings", False),
                                                                ("rms_norm_eps", True)]
    with pytest.raises(GateError, match="rms_norm_eps: expected 1e-06, found 2e-06"):
        eps.require()
    barely = dataclasses.replace(source.config, rms_norm_eps=1.000001e-6)  # which no score shows
    same = against_model(source, source_of(barely, {n: source.read(n) for n in source.shapes}), Exact, prompts)
    assert same.verdict == "fail" and not same.failed
    with pytest.raises(ConfigError, match="hidden_size 96 and 128"):
        against_model(source, sound("llama"), Exact, prompts)


def test_a_type_that_holds_the_same_numbers_is_no_difference():
    a = np.array([1.5, -2, 0], np.float32)
    assert tensor_fault("a", a, a.astype(np.float16)) is None
    signed = tensor_fault("a", a, np.array([1.5, -2, -0.0], np.float32))
    assert signed is not None and signed.index == 2
    fault = tensor_fault("a", a, np.array([1.5, -2.5, 1], np.float16))
    assert (fault.index, fault.count, fault.elements, fault.expected, fault.found) == (1, 2, 3, -2, -2.5)
    assert len(dict(weight_faults(sound("llama"), sound("llama")))) == len(sound("llama").shapes)


def test_given_scores():
    source = sound("llama")
    prompts = [Prompt("row 0", [5, 9, 200, 4])]
    truth = reference_scores(source, [p.ids for p in prompts], "fp32")
    against_scores(Exact(source), source, prompts, truth, 0.0).require()
    against_scores(Rounded(source), source, prompts, truth, 0.0).require()
    narrow = [t.astype(np.float16).astype(np.float32) for t in truth]
    against_scores(Exact(source), source, prompts, narrow, 2.0 ** -11).require()
    for wrong, rounding in ((narrow, 0.0), ([1.001 * t for t in truth], 0.0), ([np.roll(t, 1, 0) for t in truth], 0.1)):
        with pytest.raises(GateError, match="parity with given scores prompt 'row 0'"):
            against_scores(Exact(source), source, prompts, wrong, rounding).require()


@pytest.mark.parametrize("tokens", [1, 2, 7, 50, 200, 400, MAX_TOKENS])
def test_prompts_are_bounded_ordered_and_in_the_vocabulary(tokens):
    config = dataclasses.replace(MODELS["llama"], max_position_embeddings=96)
    prompts = built_in(config, None, tokens)
    lengths = [len(p.ids) for p in prompts]
    assert 1 <= sum(lengths) <= tokens and lengths == sorted(lengths, reverse=True) and lengths[0] <= 96
    assert all(0 <= i < config.V for i in itertools.chain(*(p.ids for p in prompts)))
    if tokens == 200:
        named = {p.name: p.ids for p in prompts}
        assert len(named["long"]) > 65 and len(set(named["repeated"])) == 1 and len(named["single"]) == 1
        assert set(named["edges"]) == {0, config.V - 1}


@pytest.mark.parametrize("tokens", [0, -1, MAX_TOKENS + 1])
def test_a_number_of_tokens_out_of_range_is_refused(tokens):
    with pytest.raises(ConfigError, match="--tokens"):
        built_in(MODELS["llama"], None, tokens)


