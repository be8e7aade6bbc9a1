"""Tap names: the vocabulary that trace, parity and bisect share between the reference and the GPU."""

import numpy as np
import pytest

from apr.taps import (
    EMBEDDING,
    FINAL_STAGES,
    LAYER_STAGES,
    STAGES,
    expected_gradient_names,
    expected_names,
    layer_tap,
    split_name,
    tap_name,
)

SYMBOLS = {"B", "T", "C", "F", "V", "NH", "NKV", "HS"}


@pytest.mark.parametrize(("arguments", "name"), [
    (("logits",), "logits"), (("logits", None, True), "dlogits"), (("attn_norm", 3), "L03.attn_norm"),
    (("attn_norm", 3, True), "L03.dattn_norm"), (("output", 0), "L00.output"), (("output", 99), "L99.output"),
    (("output", 100), "L100.output")])
def test_tap_name(arguments, name):
    assert tap_name(*arguments) == name


def test_stages_are_distinct_and_described():
    stages = [EMBEDDING, *LAYER_STAGES, *FINAL_STAGES]
    assert len({s.name for s in stages}) == len(stages)
    for stage in stages:
        assert set(stage.shape.replace("*", " ").split()) <= SYMBOLS and stage.shape.startswith("B T ")
        assert stage.meaning and not stage.name.startswith("d"), "a leading d means gradient"


def test_expected_names_follow_the_data():
    names = expected_names(2, qk_norm=False)
    assert names[0] == "embedding" and names[-2:] == ["final_norm", "logits"]
    per_layer = len(LAYER_STAGES) - 2
    assert len(names) == len(set(names)) == 3 + 2 * per_layer
    assert names[1:1 + per_layer] == [n.replace("L01", "L00") for n in names[1 + per_layer:1 + 2 * per_layer]]
    order = ["L00.attn_norm", "L00.q_linear", "L00.q_bias", "L00.q_rope", "L00.attn_heads", "L00.attn_out",
             "L00.attn_residual", "L00.ffn_norm", "L00.ffn_gate", "L00.ffn_swiglu", "L00.ffn_out", "L00.output",
             "L01.attn_norm"]
    assert [names.index(n) for n in order] == sorted(names.index(n) for n in order)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_head_norms_are_named_only_where_there_are_any(layers):
    with_norms, without = expected_names(layers, True), expected_names(layers, False)
    assert len(with_norms) - len(without) == 2 * layers
    assert [n for n in with_norms if "q_norm" not in n and "k_norm" not in n] == without
    for i in range(layers):
        at = with_norms.index(f"L{i:02d}.q_norm")
        assert with_norms.index(f"L{i:02d}.k_bias") < at < with_norms.index(f"L{i:02d}.q_rope")


def test_layer_tap_adds_the_layer_and_passes_the_array_itself():
    seen = []
    array = np.arange(3)
    tap = layer_tap(lambda name, value: seen.append((name, value)), 7)
    tap("output", array)
    layer_tap(lambda name, value: seen.append((name, value)), 7, grad=True)("output", array)
    assert [name for name, _ in seen] == ["L07.output", "L07.doutput"] and all(value is array for _, value in seen)


def test_no_tap_stays_no_tap():
    assert layer_tap(None, 0) is None and layer_tap(None, 0, grad=True) is None


@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradient_names_are_the_points_in_reverse(qk_norm):
    names = expected_gradient_names(2, qk_norm)
    assert names[:3] == ["dlogits", "dfinal_norm", "L01.doutput"] and names[-2:] == ["L00.dattn_norm", "dembedding"]
    assert [n.replace("d", "", 1) if "." not in n else n.replace(".d", ".", 1) for n in names] == expected_names(
        2, qk_norm)[::-1]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_split_name_undoes_tap_name(qk_norm):
    for name in expected_names(101, qk_norm) + expected_gradient_names(101, qk_norm):
        stage, layer, grad = split_name(name)
        assert tap_name(stage.name, layer, grad) == name and STAGES[stage.name] is stage
        assert (layer is None) == (stage not in LAYER_STAGES)


@pytest.mark.parametrize("name", ["", "attn_norm", "L03.logits", "L3.attn_norm", "L003.attn_norm", "L03.attn_norms",
                                  "3.attn_norm", "LL3.attn_norm", "L03.ddattn_norm", "dL03.attn_norm", "L-1.output",
                                  "L03..output", "L\u0661\u0662.output", "L" + "1" * 5000 + ".output", "d", "L03.d"])
def test_split_name_takes_no_other_text(name):
    with pytest.raises(KeyError):
        split_name(name)
