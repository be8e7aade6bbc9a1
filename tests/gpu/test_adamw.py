"""The AdamW kernels: clipping, both corrections, decay of a part only, the rounded copy, and steps that must not be."""

import numpy as np
import pytest
from harness import BF16, Arrays, gate, same_bits
from models import train_config

from apr.ops.adamw import adamw_round, adamw_update
from apr.reference.adamw import adamw_update as reference
from apr.reference.global_norm import clip_factor

SIZES = [(8, 8), (2056, 800), (4096, 0), (65536 + 64, 40000)]  # elements, how many are decayed; a tail in every block
CONFIG = train_config(lr=0.01, beta1=0.9, beta2=0.95, adam_eps=1e-3, weight_decay=0.1, max_grad_norm=1.0)
LR = 0.01


class State:
    """master, m, v and gradients on the host and on the GPU, before an update number `t`."""

    def __init__(self, arrays, size, t, norm, loss=1.0, seed=9):
        rng = np.random.default_rng(seed)
        self.arrays, self.t, self.norm = arrays, t, norm
        self.grads = rng.standard_normal(size).astype(np.float32) * 0.01  # beside adam_eps 1e-3, which then shows
        self.grads[::5], self.grads[1::5] = 0, 1e-12
        self.host = [0.02 * rng.standard_normal(size), 0.01 * rng.standard_normal(size), 1e-4 * rng.random(size)]
        if t == 1:
            self.host[1][:] = self.host[2][:] = 0
        self.host = [x.astype(np.float32) for x in self.host]
        self.on_gpu = [arrays.update(x, "f32") for x in self.host]
        self.params = arrays.update(np.zeros(size)) if arrays.storage == "bf16" else None
        self.stats = arrays.update(np.array([loss, norm, 7.0, t - 1.0]), "f64")

    def update(self, decay_end):
        """The kernels' update."""
        a = self.arrays
        adamw_update(a.dev, *self.on_gpu, self.params, a.read(self.grads, "f32"), a.out(4, dtype="f32"), self.stats,
                     a.read(np.array([0.1, LR]), "f64"), decay_end, CONFIG, a.storage)

    def truth(self, decay_end):
        """master, m, v after the reference's update in float64."""
        out = [x.astype(np.float64) for x in self.host]
        for part, decay in ((slice(0, decay_end), CONFIG.weight_decay), (slice(decay_end, None), 0.0)):
            reference(*(x[part] for x in out), self.grads[part].astype(np.float64), lr=LR, beta1=CONFIG.beta1,
                      beta2=CONFIG.beta2, eps=CONFIG.adam_eps, weight_decay=decay, step=self.t,
                      grad_scale=clip_factor(self.norm, CONFIG.max_grad_norm))
        return out


@pytest.mark.parametrize("norm", [0.5, 4.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("t", [1, 1000])
@pytest.mark.parametrize(("size", "decay_end"), SIZES)
def test_adamw_forward_matches_reference(arrays, size, decay_end, t, norm):
    state = State(arrays, size, t, norm)
    state.update(decay_end)
    for name, array, expected, before in zip(("master", "m", "v"), state.on_gpu, state.truth(decay_end), state.host,
                                             strict=True):
        arrays.judge(name, array, expected, gate("adamw"))
        change = expected - before  # judged too, as most of `master` is what it was; 1e-5: that is an ulp of master
        assert np.linalg.norm(arrays.get(array) - before - change) <= 1e-5 * np.linalg.norm(change), name
    assert list(arrays.get(state.stats)) == [1.0, norm, 1.0, t]
    if state.params is not None:
        master = arrays.get(state.on_gpu[0])
        assert (arrays.get(state.params) == master.astype(BF16).astype(np.float32)).all(), "the copy is master rounded"


@pytest.mark.parametrize(("loss", "norm"), [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, np.inf)])
def test_adamw_leaves_everything_alone_unless_loss_and_norm_are_finite(arrays, loss, norm):
    state = State(arrays, 2056, 5, norm, loss)
    state.update(800)
    for array, before in zip(state.on_gpu, state.host, strict=True):
        assert (arrays.get(array) == before).all()
    assert not arrays.get(state.stats)[2], "not applied"
    assert arrays.get(state.stats)[3] == 4, "and not counted"
    if state.params is not None:
        assert not arrays.get(state.params).any()


@pytest.mark.parametrize("size", [8, 2056, 65536 + 64])
def test_adamw_round_matches_reference(bf16, rng, size):
    master = rng.standard_normal(size).astype(np.float32)
    params = bf16.out(size)
    adamw_round(bf16.dev, params, bf16.read(master, "f32"))
    assert (bf16.get(params) == master.astype(BF16).astype(np.float32)).all()


@pytest.mark.parametrize("storage", ["f32", "bf16"])
def test_adamw_gives_the_same_bits_twice(dev, storage):
    def run():
        arrays = Arrays(dev, storage)
        state = State(arrays, 2056, 3, 4.0)
        state.update(800)
        return dict(zip(("master", "m", "v"), map(arrays.bits, state.on_gpu), strict=True))
    same_bits(run)
