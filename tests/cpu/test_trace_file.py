"""Saved traces, whole or refused, and traces against each other: what is compared, what is not, and what is found."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from models import FAMILIES, random_params, source_of

import apr.tools.trace_file as module
from apr.config import RopeScaling, encode
from apr.errors import AprError, ConfigError, FormatError, GateError, MeasureError, StorageError
from apr.formats.export import export_gguf
from apr.formats.gguf_model import open_gguf_model
from apr.formats.safetensors import write_safetensors
from apr.tools.config_diff import differing_fields
from apr.tools.device import Choice
from apr.tools.trace import Trace, capture, statistics
from apr.tools.trace_diff import default_tolerance, diff, judge, weak_tokens
from apr.tools.trace_file import KEY, NAME, check_free, is_trace, open_trace, save_trace
from apr.tools.trace_points import all_points, select

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
CPU = Choice("cpu", 0, "fp32")
TOKENS = [5, 80, 3, 44, 5, 96, 0]


def traced(name="qwen2", stages=None, change=lambda params: params, backward=True, tokens=TOKENS, **config) -> Trace:
    """A trace of a random model."""
    c = dataclasses.replace(FAMILIES[name], **config)
    names = select(c, stages, None, backward)
    return capture(source_of(c, change(random_params(c, 5))), CPU, tokens, names, names, backward)


@pytest.fixture(scope="module")
def trace():
    return traced()


@pytest.fixture
def saved(trace, tmp_path):
    save_trace(trace, tmp_path / "t")
    return tmp_path / "t"


def test_what_is_saved_is_read_again_and_by_the_package(trace, saved):
    back = open_trace(saved)
    assert dataclasses.replace(back, arrays={}) == dataclasses.replace(trace, arrays={})
    package = safetensors.numpy.load_file(saved / NAME)
    for arrays in (back.arrays, package):
        assert arrays.keys() == trace.arrays.keys()
        assert all(a.dtype == np.float32 and (a == trace.arrays[n]).all() for n, a in arrays.items())
    assert list(back.arrays) == all_points(trace.config, True) == list(back.statistics)
    with safetensors.safe_open(saved / NAME, "numpy") as opened:
        said = json.loads(opened.metadata()[KEY])
    assert said["config"] == encode(trace.config) and said["tokens"] == TOKENS and said["points"] == list(trace.arrays)
    assert (said["device"], said["precision"], said["stored"], said["loss"]) == ("cpu", "fp32", ["F32"], trace.loss)
    assert {"attn_norm", "dattn_norm", "logits"} <= set(said["stages"])


def test_the_file_or_its_folder_and_nothing_else_is_a_trace(trace, saved, tmp_path):
    assert open_trace(saved / NAME).tokens == open_trace(saved).tokens
    assert is_trace(saved) and is_trace(saved / NAME) and not is_trace(tmp_path) and not is_trace(tmp_path / "m.apr")
    (saved / "config.json").write_text("{}")
    assert not is_trace(saved)  # a model's folder, in which a trace was saved


def test_a_trace_is_saved_whole_or_not_at_all(trace, saved, tmp_path, monkeypatch):
    before = (saved / NAME).read_bytes()
    with pytest.raises(ConfigError, match="exist"):
        save_trace(trace, saved)
    for folder, says in ((saved, "a trace there"), (saved / NAME, "neither"), (tmp_path / "no" / "where", "neither")):
        with pytest.raises(ConfigError, match=says):
            check_free(folder)
    check_free(tmp_path), check_free(tmp_path / "new")
    with pytest.raises(ConfigError, match="at least one point"):
        save_trace(dataclasses.replace(trace, arrays={}), tmp_path / "new")

    def full(path, arrays, metadata):
        path.write_bytes(b"half")
        raise StorageError(str(path), "room to write", "none", "free space")
    monkeypatch.setattr(module, "write_safetensors", full)
    with pytest.raises(StorageError):
        save_trace(trace, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == [] and (saved / NAME).read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999999])
def test_a_cut_file_is_refused(saved, share):
    data = (saved / NAME).read_bytes()
    (saved / NAME).write_bytes(data[:int(share * len(data))])
    with pytest.raises(FormatError) as caught:
        open_trace(saved)
    assert caught.value.exit_code == 4 and NAME in str(caught.value) and "\n" not in str(caught.value)


def altered(trace, folder, arrays=lambda a: a, values=lambda v: v, key=KEY):
    """A file like the trace's, but for a change in its tensors or in what it says."""
    save_trace(trace, folder)
    said = json.loads(safetensors.safe_open(folder / NAME, "numpy").metadata()[KEY])
    write_safetensors(folder / NAME, arrays(dict(trace.arrays)), {key: json.dumps(values(said))})
    return folder


@pytest.mark.parametrize(("arrays", "says"), [
    (lambda a: {n.replace("1.q_rope", "1.q_turned"): x for n, x in a.items()}, "'L01.q_rope'.*tensor for each point"),
    (lambda a: {n: x for n, x in a.items() if n != "dlogits"}, "'dlogits'.*a tensor for each point, found none"),
    (lambda a: a | {"extra": a["logits"]}, "'extra'.*only the points"),
    (lambda a: a | {"logits": a["logits"][:, :-1]}, r"'logits'.*F32 \[1, 7, 97\]"),
    (lambda a: a | {"logits": a["logits"].reshape(7, 97)}, r"'logits'.*found F32 \[7, 97\]"),
    (lambda a: a | {"logits": a["logits"].astype(np.float16)}, "'logits'.*found F16")],
    ids=["renamed", "missing", "extra", "short", "flat", "half"])
def test_tensors_that_are_not_the_traces_are_refused(trace, tmp_path, arrays, says):
    with pytest.raises(FormatError, match=says):
        open_trace(altered(trace, tmp_path / "t", arrays))


@pytest.mark.parametrize(("values", "says"), [
    (lambda v: [v], "version 1"), (lambda v: v | {"version": 2}, "version 1, found 2"),
    (lambda v: v | {"more": 1}, "'more'"), (lambda v: {k: x for k, x in v.items() if k != "loss"}, "'loss'"),
    (lambda v: v | {"config": v["config"] | {"hidden_size": 64}}, r"'embedding'.*F32 \[1, 7, 64\], by the config"),
    (lambda v: v | {"config": v["config"] | {"hidden_size": "64"}}, "the configuration of a model"),
    (lambda v: v | {"config": {}}, "the configuration of a model"),
    (lambda v: v | {"tokens": [*v["tokens"], 97]}, "token ids"), (lambda v: v | {"tokens": []}, "token ids"),
    (lambda v: v | {"tokens": [True, 1]}, "token ids"), (lambda v: v | {"tokens": "1"}, "token ids"),
    (lambda v: v | {"tokens": v["tokens"][1:]}, r"F32 \[1, 6, 32\]"), (lambda v: v | {"model": 3}, "types"),
    (lambda v: v | {"precision": "fp8"}, "types"), (lambda v: v | {"points": [1]}, "types"),
    (lambda v: v | {"loss": "1"}, "types"), (lambda v: v | {"weights_sha256": 1}, "types"),
    (lambda v: v | {"points": []}, "points of the model"), (lambda v: v | {"points": v["points"][::-1]}, "the order"),
    (lambda v: v | {"points": v["points"] + ["L09.output"]}, "'L09.output'"),
    (lambda v: v | {"points": v["points"] + ["logits"]}, "each once")])
def test_a_description_that_is_not_the_traces_is_refused(trace, tmp_path, values, says):
    with pytest.raises(FormatError, match=says):
        open_trace(altered(trace, tmp_path / "t", values=values))


def test_a_safetensors_file_of_something_else_is_refused(trace, tmp_path):
    with pytest.raises(FormatError, match="a safetensors file of something else"):
        open_trace(altered(trace, tmp_path / "t", key="format"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gguf_export_has_the_same_numbers_at_every_point(name, tmp_path):
    c = FAMILIES[name]
    source, names = source_of(c, random_params(c, 5)), all_points(c, True)
    export_gguf(source, tmp_path / "m.gguf")
    with open_gguf_model(tmp_path / "m.gguf") as other:
        points = diff(*(capture(s, CPU, TOKENS, names, names, True) for s in (source, other)))
    judge(points)
    assert [p.name for p in points] == names and all(p.difference.relative_l2 == 0 and p.std > 0 for p in points)


def scaled(name, by):
    """A reader that gets one parameter wrong."""
    return lambda params: params | {name: params[name] * np.float32(by)}


@pytest.mark.parametrize(("change", "first"), [
    (scaled("model.layers.1.self_attn.v_proj.bias", 0), "L01.v_bias"),
    (scaled("model.layers.0.self_attn.k_proj.weight", 1.001), "L00.k_linear"),
    (scaled("model.layers.1.mlp.up_proj.weight", 1.001), "L01.ffn_up"),
    (scaled("model.norm.weight", 1.001), "final_norm")])
def test_the_first_point_beyond_is_named(trace, change, first):
    bad = traced(change=change)
    points = diff(bad, trace)
    assert all((p.std, p.other_std) == (bad.statistics[p.name].std, trace.statistics[p.name].std) for p in points)
    with pytest.raises(GateError, match=rf"TRACE-DIFF {first}: ") as caught:
        judge(points)
    assert caught.value.exit_code == 5 and all(p.within for p in points[:[p.name for p in points].index(first)])
    assert len([p for p in points if not p.within]) < len(points)
    judge(diff(bad, trace, tolerance=1.0) if first != "L01.v_bias" else diff(trace, trace))


def test_the_other_is_the_truth(trace):
    twice = dataclasses.replace(trace, arrays={n: 2 * a for n, a in trace.arrays.items()})
    assert {(p.difference.relative_l2, p.difference.scale) for p in diff(twice, trace)} == {(1.0, 2.0)}
    assert {(p.difference.relative_l2, p.difference.scale) for p in diff(trace, twice)} == {(0.5, 0.5)}


def test_numbers_that_are_none_are_never_within(trace):
    for value in (np.nan, np.inf):
        array = trace.arrays["L01.ffn_out"].copy()
        array[0, 3, 4] = value
        bad = dataclasses.replace(trace, arrays={**trace.arrays, "L01.ffn_out": array},
                                  statistics={**trace.statistics, "L01.ffn_out": statistics(array)})
        for pair in ((bad, trace), (trace, bad), (bad, bad)):
            points = diff(*pair, tolerance=1.0)
            assert [p.name for p in points if not p.within] == ["L01.ffn_out"]
            with pytest.raises(GateError, match=r"TRACE-DIFF L01\.ffn_out: .* [12] not finite"):
                judge(points)


@pytest.mark.parametrize(("changes", "says"), [
    ({"hidden_size": 64}, "found hidden_size 64 and 32;"), ({"num_hidden_layers": 3}, "num_hidden_layers"),
    ({"num_key_value_heads": 4}, "num_key_value_heads"), ({"vocab_size": 98}, "vocab_size"),
    ({"head_dim": 16}, "head_dim"), ({"intermediate_size": 64}, "intermediate_size"), ({"name": "qwen3"}, "qk_norm")])
def test_models_of_other_shapes_are_refused(trace, changes, says):
    with pytest.raises(AprError, match=says) as caught:
        diff(traced(**changes), trace)
    assert caught.type is ConfigError


def test_other_tokens_and_points_without_a_partner_are_refused(trace):
    with pytest.raises(FormatError, match=r"tokens: .*the first other one at position 3"):
        diff(traced(tokens=[5, 80, 3, 45, 5, 96, 0]), trace)
    with pytest.raises(FormatError, match="found 7, the first other one at position 6"):
        diff(traced(tokens=TOKENS[:-1]), trace)
    some, more = traced(stages={"q_rope", "logits"}, backward=False), traced(stages={"q_rope", "dlogits"})
    with pytest.raises(FormatError, match="only in the first: logits, only in the second: dlogits"):
        diff(some, more)
    with pytest.raises(FormatError, match="only in the first: None, only in the second: embedding"):
        diff(some, trace)


def test_nothing_compared_is_no_pass(trace):
    zero = dataclasses.replace(trace, arrays={n: np.zeros_like(a) for n, a in trace.arrays.items()})
    for pair in ((trace, zero), (zero, zero), (dataclasses.replace(trace, arrays={}),) * 2):
        with pytest.raises(MeasureError) as caught:
            diff(*pair)
        assert caught.value.exit_code == 12
    with pytest.raises(MeasureError):
        judge([])


def test_tolerances_follow_precision_depth_and_direction(trace):
    half = dataclasses.replace(trace, precision="bf16")
    deep = dataclasses.replace(half, config=dataclasses.replace(trace.config, num_hidden_layers=8))
    assert [default_tolerance(trace, trace, g) for g in (False, True)] == [2e-5, 5e-5]
    for pair in ((half, trace), (trace, half)):
        assert default_tolerance(*pair, False) == pytest.approx(0.04 * 2**0.5)
    assert default_tolerance(deep, deep, False) == pytest.approx(2 * default_tolerance(half, half, False))
    assert default_tolerance(deep, half, True) == pytest.approx(0.12 * 8**0.5)
    assert default_tolerance(dataclasses.replace(deep, config=dataclasses.replace(trace.config, num_hidden_layers=40)),
                             half, True) == 0.5


def test_numbers_of_the_configuration_and_weak_prompts_are_told(trace):
    other = dataclasses.replace(trace.config, rms_norm_eps=1e-4)
    assert differing_fields(trace.config, other) == {"rms_norm_eps": (1e-6, 1e-4)}
    scaled = dataclasses.replace(trace.config, rope_scaling=LLAMA3)
    mine, theirs = differing_fields(trace.config, scaled)["rope_scaling"]
    assert mine is None and json.loads(json.dumps(theirs))["factor"] == 8.0
    assert weak_tokens(TOKENS) is None and "17 equal tokens" in weak_tokens([3] * 17)
