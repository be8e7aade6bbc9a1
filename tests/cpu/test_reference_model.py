"""The reference's whole model: every parameter's gradient, the loss of no knowledge, taps, and what must not matter."""

import math
from dataclasses import replace

import numpy as np
import pytest
from compare import assert_close, finite_difference_error

from apr.config import IGNORE, RopeScaling
from apr.errors import ShapeError
from apr.params import layout
from apr.presets import PRESETS
from apr.reference.model import count_targets, loss_and_gradients, loss_sum, model_forward
from apr.taps import expected_gradient_names, expected_names

FINITE_DIFFERENCE = 1e-7  # the project's gate; measured worst 4e-8
FLOAT32 = 2e-5  # relative L2 of float32: end to end; measured worst 4.5e-6
EXACT = 1e-12  # float64, the same mathematics in another order
SMALL = {"vocab_size": 13, "hidden_size": 10, "intermediate_size": 14, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 16}
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512)
UNTIED = {"rope_theta": 1e4, "rope_scaling": LLAMA3, "tie_word_embeddings": False}
FAMILIES = {"llama": ("llama3_2_1b", UNTIED), "qwen2": ("qwen2_0_5b", {}), "qwen3": ("qwen3_0_6b", {})}
CONFIGS = {name: replace(PRESETS[preset], **SMALL, **more) for name, (preset, more) in FAMILIES.items()}
B, T = 3, 7


class Model:
    """A model in flat memory whose random weights let every constant show, and a batch with ignored targets."""

    def __init__(self, name, kind=np.float64):
        rng, self.name, self.config = np.random.default_rng(20261120), name, CONFIGS[name]
        place = layout(self.config)
        self.flat, self.grad = np.zeros(place.size, kind), np.zeros(place.size, kind)
        self.params, self.grads = place.views(self.flat), place.views(self.grad)
        for key, value in self.params.items():
            noise = rng.standard_normal(value.shape)
            value[...] = 1 + 0.2 * noise if "norm" in key else 0.05 * noise if "embed" in key else 0.4 * noise
        ids = rng.integers(0, self.config.V, (B, T + 1))
        self.inputs, self.targets = ids[:, :-1], np.where(rng.random((B, T)) < 0.2, IGNORE, ids[:, 1:])

    def gradients(self, rows=slice(None), tap=None):
        """Sum of the losses of these sequences; its gradients are added to `grads`."""
        return loss_and_gradients(self.params, self.grads, self.config, self.inputs[rows], self.targets[rows], 1.0, tap)

    def loss(self):
        return loss_sum(self.params, self.config, self.inputs, self.targets)

    def logits(self, tap=None):
        return model_forward(self.params, self.config, self.inputs, tap=tap)


@pytest.fixture(params=CONFIGS)
def model(request):
    return Model(request.param)


def test_model_gradients_match_finite_differences(model, rng):
    model.gradients()
    for key, array in model.params.items():
        assert model.grads[key].any(), f"{key} learns nothing"
        h = 2e-6 if "embed" in key else 2e-5  # a small part of the values: the table's are 0.05
        error = finite_difference_error(model.loss, array, model.grads[key], rng, samples=24, h=h)
        assert error <= FINITE_DIFFERENCE, key


def test_model_float32_matches_float64(model):
    ours = Model(model.name, np.float32)
    assert ours.logits().dtype == np.float32
    assert_close(ours.logits(), model.logits(), FLOAT32, "logits")
    assert math.isclose(ours.gradients(), model.gradients(), rel_tol=FLOAT32)
    for key, value in model.grads.items():
        assert_close(ours.grads[key], value, FLOAT32, key)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_model_of_zero_weights_loses_exactly_ln_v(name, kind):
    """In nats and per counted target: the yardstick of every loss that apr prints."""
    model = Model(name, kind)
    model.flat[:] = 0
    assert abs(model.loss() / count_targets(model.targets) - math.log(model.config.V)) <= 1e-6


def test_model_of_silent_layers_shows_eps_in_every_norm(model):
    """Each norm then sees the embedding, made tiny here; behind real layers the stream is too large for eps to show."""
    for key, value in model.params.items():
        value *= 0 if "o_proj" in key or "down_proj" in key else 0.01 if "embed" in key else 1
    x, seen = model.params["model.embed_tokens.weight"][model.inputs], {}
    model.logits(seen.__setitem__)
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + model.config.rms_norm_eps)
    places = {f"L{i:02d}.{stage}": f"model.layers.{i}.{norm}.weight" for i in range(model.config.L)
              for stage, norm in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))}
    for stage, weight in {**places, "final_norm": "model.norm.weight"}.items():
        assert_close(seen[stage], normed * model.params[weight], EXACT, stage)


def test_model_taps_every_point_and_backward_walks_them_in_reverse(model):
    names, arrays = [], {}
    model.gradients(tap=lambda name, array: (names.append(name), arrays.update({name: array.copy()})))
    forward = expected_names(model.config.L, model.config.qk_norm)
    assert names[:len(forward)] == forward
    assert names[len(forward):] == expected_gradient_names(model.config.L, model.config.qk_norm)
    assert all(arrays[n].shape == arrays[d].shape for n, d in zip(forward, names[:len(forward) - 1:-1], strict=True))
    assert_close(arrays["logits"], model.logits(), EXACT, "logits")


def test_model_training_and_evaluation_agree_and_leave_no_trace(model):
    params, before = model.flat.copy(), model.loss()
    assert model.gradients() == before == model.loss(), "to the bit, before and after a training pass"
    assert (model.flat == params).all()


def test_model_micro_batches_add_up_to_the_whole(model):
    whole = model.gradients()
    gradient = model.grad.copy()
    halves = model.gradients(slice(0, 1)) + model.gradients(slice(1, B))
    assert math.isclose(halves, whole, rel_tol=EXACT)
    assert_close(model.grad, 2 * gradient, EXACT, "the whole, plus the whole again in two parts")


def test_model_ignored_targets_do_not_count(model):
    kept, dense = model.loss(), np.where(model.targets == IGNORE, 5, model.targets)
    assert count_targets(model.targets) == (model.targets >= 0).sum() < model.targets.size
    assert not math.isclose(loss_sum(model.params, model.config, model.inputs, dense), kept)
    model.targets[:] = IGNORE
    assert model.gradients() == 0
    assert not model.grad.any()


@pytest.mark.parametrize("t", [0, 3, T - 1])
def test_model_is_causal_to_the_bit(model, t):
    before = model.logits()
    model.inputs[:, t] = (model.inputs[:, t] + 1) % model.config.V
    after = model.logits()
    assert (after[:, :t] == before[:, :t]).all()
    assert (after[:, t:] != before[:, t:]).any(axis=-1).all(), "and every later position sees it"


@pytest.mark.parametrize("part", [np.s_[[2, 0, 1]], np.s_[1:2], np.s_[:, :1], np.s_[:, :4]], ids=str)
def test_model_treats_sequences_alone_and_prefixes_alike(model, part):
    logits = model_forward(model.params, model.config, model.inputs[part])
    assert_close(logits, model.logits()[part], EXACT, "logits")


@pytest.mark.parametrize("t", [0, 17])
def test_model_refuses_lengths_it_has_no_positions_for(model, t):
    with pytest.raises(ShapeError, match=f"1 <= T <= max_position_embeddings = 16, found T = {t}"):
        model_forward(model.params, model.config, np.zeros((1, t), int))
