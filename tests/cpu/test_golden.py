"""The reference against Hugging Face transformers and PyTorch (tests/golden/make_golden.py), in float32."""

import numpy as np
import pytest
from compare import assert_close
from golden_file import NAMES, load

from apr.params import layout
from apr.reference.adamw import adamw_update
from apr.reference.global_norm import clip_factor, global_norm
from apr.reference.model import count_targets, loss_and_gradients, model_forward

TOLERANCE = 1e-5  # float32 against float32; measured worst 1.3e-6
LATER = 5e-5  # after AdamW steps: against the same in float64 PyTorch is off by up to 3.0e-5, the reference by 1.0e-5


class Run:
    """A golden model in flat memory, stepped by the reference."""

    def __init__(self, name: str) -> None:
        self.golden = load(name)
        self.config = self.golden.config
        self.layout = layout(self.config)
        self.flat, self.grad, self.m, self.v = (np.zeros(self.layout.size, np.float32) for _ in range(4))
        self.params, self.grads = self.layout.views(self.flat), self.layout.views(self.grad)
        given = self.golden.group("param")
        assert given.keys() == self.params.keys()
        for key, value in given.items():
            self.params[key][...] = value
        self.states: dict[str, np.ndarray] = {}

    def gradients(self, step: int) -> float:
        """Mean loss of the step's batch; its gradients are left in `grads`."""
        self.grad[:] = 0
        inputs, targets = self.golden.arrays["inputs"][step], self.golden.arrays["targets"][step]
        count = count_targets(targets)
        return loss_and_gradients(self.params, self.grads, self.config, inputs, targets, 1 / count,
                                  self.states.__setitem__) / count

    def update(self, step: int) -> float:
        """One AdamW step; returns the gradient norm before clipping."""
        a, norm, split = self.golden.adamw, global_norm(self.grad), self.layout.decay_end
        for part, decay in ((slice(0, split), a["weight_decay"]), (slice(split, None), 0.0)):
            adamw_update(self.flat[part], self.m[part], self.v[part], self.grad[part], lr=a["lr"], beta1=a["betas"][0],
                         beta2=a["betas"][1], eps=a["eps"], weight_decay=decay, step=step + 1,
                         grad_scale=clip_factor(norm, a["max_grad_norm"]))
        return norm


@pytest.mark.parametrize("name", NAMES)
def test_states_logits_and_gradients(name):
    run = Run(name)
    run.gradients(0)
    for stage, expected in run.golden.group("state").items():
        assert_close(run.states[stage].reshape(expected.shape), expected, TOLERANCE, stage)
    logits = model_forward(run.params, run.config, run.golden.arrays["inputs"][0])
    assert_close(logits, run.golden.arrays["logits"], TOLERANCE, "logits")
    expected = run.golden.group("grad")
    assert expected.keys() == run.grads.keys()
    for key, value in expected.items():
        assert_close(run.grads[key], value, TOLERANCE, key)


@pytest.mark.parametrize("name", NAMES)
def test_every_position_agrees(name):
    """Per position, so that one stale row among many does not drown in the norm of the rest."""
    run = Run(name)
    expected = run.golden.arrays["logits"]
    logits = model_forward(run.params, run.config, run.golden.arrays["inputs"][0])
    for b, t in np.ndindex(expected.shape[:2]):
        assert_close(logits[b, t], expected[b, t], TOLERANCE, f"logits at sequence {b} position {t}")


@pytest.mark.parametrize("name", NAMES)
def test_ten_adamw_steps(name):
    run = Run(name)
    for step, (loss, norm) in enumerate(zip(run.golden.arrays["losses"], run.golden.arrays["norms"], strict=True)):
        assert abs(run.gradients(step) - loss) <= 1e-5, f"loss of step {step}"
        tolerance = TOLERANCE if step == 0 else LATER
        assert abs(run.update(step) - norm) <= tolerance * norm, f"gradient norm of step {step}"
    for key, value in run.golden.group("final").items():
        assert_close(run.params[key], value, LATER, f"{key} after ten steps")
