"""One layer on the GPU, given the reference's own input: every stage, dx and every weight's gradient.

Weights at which every constant matters, biases of Qwen2's sizes, inputs small enough for eps to show; layer 1 of two,
so that a layer which reads another's weights or buffers is seen. bf16 is judged by the reference rounded at every op.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from harness import BF16, gate, judge, rounded
from models import FAMILIES
from naive import round_reference

from apr.arena import Arena
from apr.block import block_backward, block_forward, to_host
from apr.buffers import WORKSPACE, plan
from apr.gemm import Gemm
from apr.model import Model
from apr.ops.adamw import adamw_round
from apr.params import layout
from apr.presets import qwen2_0_5b
from apr.reference import block as reference
from apr.reference.rope import rope_tables
from apr.taps import tap_name

LAYER = 1
REAL = replace(qwen2_0_5b, num_hidden_layers=2, vocab_size=128, max_position_embeddings=64)
GROUPED = replace(FAMILIES["qwen2"], num_attention_heads=14, head_dim=64, max_position_embeddings=256)
CONFIGS = {**FAMILIES, "llama_32": replace(FAMILIES["llama"], head_dim=32), "qwen2_64": GROUPED,
           "qwen3_128": replace(FAMILIES["qwen3"], head_dim=128), "qwen2_0_5b": REAL}
CASES = [("fp32", name, 2, 17) for name in CONFIGS] + [("fp32", "qwen2", 1, 1), ("fp32", "qwen2_64", 3, 33)] + [
    ("bf16", name, 2, 17) for name in CONFIGS if CONFIGS[name].HS >= 32] + [("bf16", "qwen2_64", 1, 129)]
NAMES = ["-".join(map(str, case)) for case in CASES]
BIAS = {"q": 1.0, "k": 3.0, "v": 0.1}  # standard deviations, as numbers of Qwen2's checkpoints are
ZERO = 1e-3  # absolute, for gradients of queries and keys at T = 1, which are 0: cancelled sums of numbers of size 10


@dataclass
class Layer:
    """A layer's numbers on the host, as stored, and the GPU's model around them."""

    config: Any
    precision: str
    params: dict[str, np.ndarray]
    starts: dict[str, np.ndarray]  # what the gradients are added to
    x: np.ndarray
    dout: np.ndarray

    def on_gpu(self, dev, b, t):
        """(model, batch) with the weights, and the gradients' starts, on the GPU."""
        places, arena = layout(self.config), Arena(dev, plan(self.config, b, t, self.precision))
        for name, arrays in (("master", self.params), ("grads", self.starts)):
            flat = np.zeros(places.size, np.float32)
            for key, view in places.views(flat).items():
                view[...] = arrays.get(key, 0)
            dev.upload(arena[name], flat)
        if self.precision == "bf16":
            adamw_round(dev, arena["params"], arena["master"])
        arena.poison()
        model = Model(dev, Gemm(dev, dev.empty((WORKSPACE,), "u8")), arena, self.config)
        return model, arena

    def truth(self, kind, taps, backward):
        """dx; stages go into `taps`, the weights' gradients are the second result."""
        arrays = {k: v.astype(kind) for k, v in self.params.items()}
        grads = {k: v.astype(kind) for k, v in self.starts.items()}
        c, t, saved = self.config, self.x.shape[1], {}
        tables = rope_tables(np.arange(t), c.HS, c.rope_theta, c.rope_scaling, np.dtype(kind))
        reference.block_forward(arrays, c, LAYER, self.x.astype(kind), tables, saved, taps.__setitem__)
        dx = reference.block_backward(arrays, grads, c, LAYER, self.dout.astype(kind), tables, saved,
                                      backward.__setitem__)
        return dx, grads


def make(precision, name, b, t):
    """Random numbers of a case."""
    c, rng = CONFIGS[name], np.random.default_rng(11)
    shapes = {s.name: s.shape for s in layout(c).specs if s.name.startswith(f"model.layers.{LAYER}.")}
    params = {}
    for key, shape in shapes.items():
        noise = rng.standard_normal(shape).astype(np.float32)
        if key.endswith("bias"):
            params[key] = noise * BIAS[key.split(".")[-2][0]]
        else:
            params[key] = 1 + 0.2 * noise if "norm" in key else noise * 2 / np.sqrt(shape[1])
    stored = rounded if precision == "bf16" else np.asarray
    starts = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    x, dout = (stored(s * rng.standard_normal((b, t, c.C)).astype(np.float32)) for s in (0.05, 1.0))
    return Layer(c, precision, {k: stored(v) for k, v in params.items()}, starts, x, dout)


def stored(layer, x):
    """As the arena holds it."""
    return x.astype(BF16) if layer.precision == "bf16" else x


def run_gpu(dev, layer):
    """Stages, gradients of stages, dx and weight gradients of the GPU."""
    b, t, c = *layer.x.shape[:2], layer.config
    model, arena = layer.on_gpu(dev, b, t)
    forward, backward = {}, {}
    batch = model.batch(b, t, lambda name, array: forward.__setitem__(name, array.copy()))
    dev.upload(batch.residual(2 * LAYER)[0], stored(layer, layer.x))
    block_forward(batch, model.weights[LAYER], LAYER, pending=False)
    batch = model.batch(b, t, lambda name, array: backward.__setitem__(name, array.copy()))
    dev.upload(batch.rows("dresidual", c.C), stored(layer, layer.dout))
    block_backward(batch, model.weights[LAYER], model.grads[LAYER], LAYER)
    dx = to_host(dev, batch.rows("dresidual", c.C)).reshape(layer.x.shape)
    grads = layout(c).views(dev.download(arena["grads"]))
    return forward, backward, dx, grads


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_block_matches_reference(dev, monkeypatch, case):
    layer = make(*case)
    forward, backward, dx, grads = run_gpu(dev, layer)
    stages, dstages, rivals, drivals = {}, {}, {}, {}
    truth, dtruth = layer.truth(np.float64, stages, dstages)
    naive, dnaive = None, {}
    if layer.precision == "bf16":
        round_reference(monkeypatch)
        naive, dnaive = layer.truth(np.float32, rivals, drivals)
    for ours, theirs, rival, grad, missing in ((forward, stages, rivals, False, {"output"}),  # added by the next layer
                                               (backward, dstages, drivals, True, set())):
        assert list(ours) == [tap_name(s, LAYER, grad) for s in theirs if s not in missing]
        for stage, expected in theirs.items():
            if stage not in missing:
                name = tap_name(stage, LAYER, grad)
                judge(ours[name], expected, gate("model"), name, rival.get(stage), ZERO)
    judge(dx, truth, gate("model"), "dx", naive)
    for key, expected in dtruth.items():
        judge(grads[key], expected, gate("model"), f"gradient of {key}", dnaive.get(key))
    others = [key for key, view in grads.items() if key not in dtruth and view.any()]
    assert not others, f"another layer's gradients were touched: {others}"


@pytest.mark.parametrize(("precision", "name"), [("fp32", "qwen2"), ("bf16", "qwen2_64")])
def test_block_begins_with_the_addition_that_the_layer_before_left(dev, monkeypatch, precision, name):
    """`pending`: the stream is layer 0's plus `branch`, added by this layer's first kernel, in which eps must show."""
    layer = make(precision, name, 2, 17)
    model, _ = layer.on_gpu(dev, 2, 17)
    before = rounded(0.01 * np.random.default_rng(3).standard_normal(layer.x.shape))
    branch = stored(layer, layer.x - before).astype(np.float32)
    seen = {}
    batch = model.batch(2, 17, lambda stage, array: seen.__setitem__(stage, array.copy()))
    dev.upload(batch.residual(2 * LAYER - 1)[0], stored(layer, before))
    dev.upload(batch.rows("branch", layer.config.C), stored(layer, branch))
    block_forward(batch, model.weights[LAYER], LAYER, pending=True)
    stages, rivals = {}, {}
    layer.x = before.astype(np.float64) + branch
    layer.truth(np.float64, stages, {})
    judge(seen["L00.output"], layer.x, gate("model"), "the stream", rounded(layer.x) if precision == "bf16" else None)
    if precision == "bf16":
        round_reference(monkeypatch)
        layer.x = rounded(layer.x)
        layer.truth(np.float32, rivals, {})
    for stage in ("attn_norm", "k_rope", "attn_heads", "attn_residual", "ffn_out"):
        judge(seen[f"L01.{stage}"], stages[stage], gate("model"), stage, rivals.get(stage))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_block_gives_the_same_bits_twice(dev, precision):
    layer = make(precision, "qwen3_128", 2, 17)
    first, second = run_gpu(dev, layer), run_gpu(dev, layer)
    assert (first[2] == second[2]).all()
    for one, two in ((first[0], second[0]), (first[1], second[1]), (first[3], second[3])):
        for key in one:
            assert (one[key] == two[key]).all(), key
