"""One layer of the reference: every gradient, the taps both ways, and what a layer must and must not depend on."""

from dataclasses import replace

import numpy as np
import pytest
from compare import assert_close, finite_difference_error

from apr.params import param_specs
from apr.presets import PRESETS
from apr.reference.block import block_backward, block_forward
from apr.reference.rope import rope_tables
from apr.taps import LAYER_STAGES

FINITE_DIFFERENCE = 1e-7  # the project's gate; measured worst 1e-9
FLOAT32 = 1e-5  # relative L2 of float32: one layer, forward and back; measured worst 1.3e-6
EXACT = 1e-12  # float64, the same mathematics in another order
SMALL = {"vocab_size": 11, "hidden_size": 10, "intermediate_size": 14, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 32}
CONFIGS = {name: replace(PRESETS[name], **SMALL) for name in ("llama3_2_1b", "qwen2_0_5b", "qwen3_0_6b")}
SHAPES = [(2, 7), (1, 1), (3, 4)]  # B, T


class Layer:
    """A layer with random parameters at which every one of them matters, its input and an output gradient."""

    def __init__(self, name, rng, b=2, t=7):
        self.config = c = CONFIGS[name]
        noise = {s.name: rng.standard_normal(s.shape) for s in param_specs(c) if s.name.startswith("model.layers.")}
        self.params = {n: 1 + 0.2 * x if "norm" in n else 0.4 * x for n, x in noise.items()}
        self.grads = {n: np.zeros_like(x) for n, x in self.params.items()}
        self.x, self.dout = 0.05 * rng.standard_normal((b, t, c.C)), rng.standard_normal((b, t, c.C))

    def tables(self):
        c = self.config
        return rope_tables(np.arange(self.x.shape[1]), c.HS, c.rope_theta, c.rope_scaling, self.x.dtype)

    def forward(self, saved=None, tap=None):
        return block_forward(self.params, self.config, 0, self.x, self.tables(), saved, tap)

    def backward(self, tap=None, forward_tap=None):
        """dx; the parameters' gradients are added to `grads`."""
        saved = {}
        self.forward(saved, forward_tap)
        return block_backward(self.params, self.grads, self.config, 0, self.dout, self.tables(), saved, tap)

    def loss(self):
        return float((self.forward() * self.dout).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_block_backward_matches_finite_differences(rng, name, shape):
    layer = Layer(name, rng, *shape)
    dx = layer.backward()
    assert finite_difference_error(layer.loss, layer.x, dx, rng, h=1e-6) <= FINITE_DIFFERENCE
    for key, array in layer.params.items():
        if shape[1] == 1 and any(part in key for part in ("q_proj", "k_proj", "q_norm", "k_norm")):
            assert not layer.grads[key].any(), f"{key}: one key takes all the weight, whatever its score"
        else:
            error = finite_difference_error(layer.loss, array, layer.grads[key], rng, samples=32, h=1e-5)
            assert error <= FINITE_DIFFERENCE, key


@pytest.mark.parametrize("name", CONFIGS)
def test_block_float32_matches_float64(rng, name):
    truth, ours = Layer(name, rng), Layer(name, np.random.default_rng(20261120))
    for arrays in (ours.params, ours.grads, vars(ours)):
        arrays.update({k: v.astype(np.float32) for k, v in arrays.items() if isinstance(v, np.ndarray)})
    assert_close(ours.forward(), truth.forward(), FLOAT32, "out")
    assert_close(ours.backward(), truth.backward(), FLOAT32, "dx")
    for key, value in truth.grads.items():
        assert ours.grads[key].dtype == np.float32
        assert_close(ours.grads[key], value, FLOAT32, key)


@pytest.mark.parametrize("name", CONFIGS)
def test_block_taps_every_stage_and_backward_walks_them_in_reverse(rng, name):
    layer, forward, backward = Layer(name, rng), {}, {}
    layer.backward(backward.__setitem__, forward.__setitem__)
    assert list(forward) == [s.name for s in LAYER_STAGES if layer.config.qk_norm or s.name not in ("q_norm", "k_norm")]
    assert list(backward) == list(forward)[::-1]
    sizes = {"B": 2, "T": 7, **{s: getattr(layer.config, s) for s in ("C", "F", "NH", "NKV", "HS")}}
    for stage in LAYER_STAGES:
        if stage.name in forward:
            shape = tuple(int(np.prod([sizes[s] for s in axis.split("*")])) for axis in stage.shape.split())
            assert forward[stage.name].shape == backward[stage.name].shape == shape, stage.name


@pytest.mark.parametrize("name", CONFIGS)
def test_block_stages_are_what_they_are_called(rng, name):
    """Each from those before it, so that two programs that show `q_linear` show the same thing: before the bias."""
    layer, seen = Layer(name, rng), {}
    layer.forward(None, seen.__setitem__)
    w = {k.removeprefix("model.layers.0."): v for k, v in layer.params.items()}
    heads = (*layer.x.shape[:2], -1, layer.config.HS)
    expected = {}
    for p in "qkv":
        expected[f"{p}_linear"] = seen["attn_norm"] @ w[f"self_attn.{p}_proj.weight"].T
        expected[f"{p}_bias"] = (seen[f"{p}_linear"] + w.get(f"self_attn.{p}_proj.bias", 0)).reshape(heads)
    for stage, given, part in (("attn_out", "attn_heads", "self_attn.o"), ("ffn_gate", "ffn_norm", "mlp.gate"),
                               ("ffn_up", "ffn_norm", "mlp.up"), ("ffn_out", "ffn_swiglu", "mlp.down")):
        expected[stage] = seen[given] @ w[f"{part}_proj.weight"].T
    expected |= {"attn_residual": layer.x + seen["attn_out"], "ffn_swiglu": seen["ffn_silu"] * seen["ffn_up"],
                 "ffn_silu": seen["ffn_gate"] / (1 + np.exp(-seen["ffn_gate"])),
                 "output": seen["attn_residual"] + seen["ffn_out"]}
    for stage, array in expected.items():
        assert_close(seen[stage], array, EXACT, stage)


@pytest.mark.parametrize("name", CONFIGS)
def test_block_tapped_gradients_explain_the_parameters(rng, name):
    """dweight = doutᵀ · inp and dbias = sum of dout, with dout and inp as tapped: a tap is the array it says it is."""
    layer, forward, backward = Layer(name, rng), {}, {}
    layer.backward(backward.__setitem__, forward.__setitem__)
    inputs = {"q": "attn_norm", "k": "attn_norm", "v": "attn_norm", "o": "attn_heads",
              "gate": "ffn_norm", "up": "ffn_norm", "down": "ffn_swiglu"}
    outputs = {"o": "attn_out", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_out"}
    for key, gradient in layer.grads.items():
        part, kind = key.split(".")[-2:]
        p = part.removesuffix("_proj")
        if kind == "bias":
            assert_close(backward[f"{p}_bias"].reshape(14, -1).sum(axis=0), gradient, EXACT, key)
        elif p in inputs:
            dout, inp = backward[outputs.get(p, f"{p}_linear")], forward[inputs[p]]
            assert_close(dout.reshape(14, -1).T @ inp.reshape(14, -1), gradient, EXACT, key)
    assert_close(forward["ffn_silu"] * forward["ffn_up"], forward["ffn_swiglu"], EXACT, "silu(gate) * up")
    dact_act = backward["ffn_swiglu"] * forward["ffn_swiglu"]
    for factor in ("ffn_silu", "ffn_up"):
        assert_close(backward[factor] * forward[factor], dact_act, EXACT, f"d{factor} of a product")


@pytest.mark.parametrize("name", CONFIGS)
def test_block_of_zero_projections_is_the_identity(rng, name):
    layer = Layer(name, rng)
    for key, value in layer.params.items():
        if "o_proj" in key or "down_proj" in key:
            value[:] = 0
    assert (layer.forward() == layer.x).all()
    assert (layer.backward() == layer.dout).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_block_is_causal_to_the_bit(rng, name):
    layer = Layer(name, rng)
    before = layer.forward()
    layer.x[:, 4] += 100 * rng.standard_normal(layer.x[:, 4].shape)
    after = layer.forward()
    assert (after[:, :4] == before[:, :4]).all()
    assert (after[:, 4:] != before[:, 4:]).any(axis=-1).all(), "and every later position sees it"


@pytest.mark.parametrize("name", CONFIGS)
def test_block_backward_accumulates_and_micro_batches_add_up(rng, name):
    whole, parts = Layer(name, rng, b=4), Layer(name, np.random.default_rng(20261120), b=4)
    for grads in (whole.grads, parts.grads):
        for value in grads.values():
            value += 3.0
    dx, (x, dout) = whole.backward(), (parts.x, parts.dout)
    for half in (slice(0, 1), slice(1, 4)):
        parts.x, parts.dout = x[half], dout[half]
        assert_close(parts.backward(), dx[half], EXACT, "dx of a part")
    for key, value in whole.grads.items():
        assert_close(parts.grads[key], value, EXACT, key)
