"""The parameter table: layout in flat memory, decay groups, initial values."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from apr.config import TransformerConfig
from apr.params import ALIGNMENT, init_params, layout, param_specs
from apr.presets import PRESETS, preset

SMALL = {"vocab_size": 501, "hidden_size": 48, "intermediate_size": 104, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64}


def small(name: str, **changes) -> TransformerConfig:
    """The preset's family at a size that no alignment fits."""
    return dataclasses.replace(preset(name), **{**SMALL, **changes})


def made(config: TransformerConfig, seed: int) -> dict[str, np.ndarray]:
    """Initial values; what init_params leaves out would stay NaN."""
    arrays = {spec.name: np.full(spec.shape, np.nan, np.float32) for spec in param_specs(config)}
    init_params(config, seed, arrays)
    return arrays


@pytest.mark.parametrize("config", [*PRESETS.values(), small("qwen2_0_5b"), small("qwen3_0_6b"), small("tiny")],
                         ids=[*PRESETS, "small-qwen2", "small-qwen3", "small-llama"])
def test_layout_is_aligned_and_does_not_overlap(config):
    lay = layout(config)
    position = 0
    for spec, offset in zip(lay.specs, lay.offsets, strict=True):
        assert offset % ALIGNMENT == 0 or spec.name.split(".")[-2] in ("k_proj", "v_proj", "up_proj"), spec.name
        assert position <= offset < position + ALIGNMENT, f"{spec.name} overlaps or leaves a hole"
        padded = spec.name in ("model.embed_tokens.weight", "lm_head.weight")
        assert spec.room == (config.Vp * spec.shape[1] if padded else spec.size)
        assert lay.offset(spec.name) == offset
        position = offset + spec.room
    assert position <= lay.size < position + ALIGNMENT and lay.size % ALIGNMENT == 0
    assert [s.name for s in lay.specs] == [s.name for s in param_specs(config)]


@pytest.mark.parametrize("config", [*PRESETS.values(), small("qwen2_0_5b")], ids=[*PRESETS, "small-qwen2"])
def test_matrices_are_decayed_norms_and_biases_are_not(config):
    lay = layout(config)
    for spec, offset in zip(lay.specs, lay.offsets, strict=True):
        assert spec.decay == (len(spec.shape) == 2) == (offset < lay.decay_end), spec.name
        vector = spec.name.endswith(("norm.weight", ".bias"))
        assert vector == (len(spec.shape) == 1), spec.name
        assert spec.init == ("normal" if not vector else "zeros" if spec.name.endswith(".bias") else "ones")
    assert lay.decay_end % ALIGNMENT == 0


@pytest.mark.parametrize("config", [preset("qwen2_0_5b"), preset("qwen3_0_6b"), preset("llama_370m"),
                                    small("qwen2_0_5b", hidden_size=37)], ids=["qwen2", "qwen3", "llama", "odd"])
def test_what_is_multiplied_together_lies_together(config):
    lay = layout(config)
    for i in range(config.L):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        biases = [[attn + f"{p}_proj.bias" for p in "qkv"]] if config.use_bias else []
        sizes = {spec.name: spec.size for spec in lay.specs}
        for group in ([attn + f"{p}_proj.weight" for p in "qkv"], [mlp + "gate_proj.weight", mlp + "up_proj.weight"],
                      *biases):  # without a gap, so that the merged matrix is a view
            for left, right in pairwise(group):
                assert lay.offset(right) == lay.offset(left) + sizes[left]
            assert lay.offset(group[0]) % ALIGNMENT == 0


def test_views_are_the_flat_memory():
    config = small("qwen2_0_5b")
    lay = layout(config)
    flat = np.arange(lay.size, dtype=np.float32)
    views = lay.views(flat)
    for spec, offset in zip(lay.specs, lay.offsets, strict=True):
        view = views[spec.name]
        assert view.shape == spec.shape and view.base is not None and np.shares_memory(view, flat)
        assert view.reshape(-1)[0] == offset and view.reshape(-1)[-1] == offset + spec.size - 1


@pytest.mark.parametrize("name", ["tiny", "qwen2_0_5b", "qwen3_0_6b"])
def test_initial_values(name):
    config = small(name, vocab_size=4003, hidden_size=128)
    arrays = made(config, 1)
    assert any("bias" in key for key in arrays) == (name == "qwen2_0_5b")
    for spec in param_specs(config):
        values = arrays[spec.name]
        if spec.init == "normal":
            assert abs(values.mean()) < 5 * 0.02 / np.sqrt(values.size), spec.name
            assert abs(values.std() / 0.02 - 1) < 5 / np.sqrt(2 * values.size), spec.name
            outside = np.mean(np.abs(values) > 0.04)  # 4.55 % of a normal distribution lie beyond two deviations
            assert abs(outside - 0.0455) < 5 * np.sqrt(0.0455 / values.size), spec.name
        else:
            assert (values == (1 if spec.init == "ones" else 0)).all(), spec.name


def test_initial_values_are_a_function_of_seed_and_name():
    config = small("qwen2_0_5b")
    first, again, other = made(config, 7), made(config, 7), made(config, 8)
    drawn = [spec.name for spec in param_specs(config) if spec.init == "normal"]
    for name in first:
        assert np.array_equal(first[name], again[name])
        assert np.array_equal(first[name], other[name]) == (name not in drawn)
    starts = {first[name].reshape(-1)[:8].tobytes() for name in drawn}
    assert len(starts) == len(drawn), "two tensors share their numbers"


def test_a_tensor_does_not_depend_on_the_others():
    """One layer less, another family, an untied head: what has the same name and shape has the same values."""
    base = made(small("qwen2_0_5b"), 7)
    heads = [made(small("tiny", num_hidden_layers=layers), 7)["lm_head.weight"] for layers in (1, 2)]
    assert np.array_equal(*heads)  # the last matrix, whatever came before it
    for config in (small("qwen2_0_5b", num_hidden_layers=1), small("tiny"), small("qwen3_0_6b")):
        values = made(config, 7)
        common = values.keys() & base.keys()
        assert len(common) > 5 and "model.layers.0.mlp.down_proj.weight" in common
        for name in common:
            assert np.array_equal(values[name], base[name]), name
