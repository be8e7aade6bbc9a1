"""The whole model on the GPU against Hugging Face's numbers (tests/golden), the reference, and naive bf16."""

from dataclasses import replace

import numpy as np
import pytest
from compare import assert_close
from golden_file import NAMES, load
from harness import gate, judge, rounded
from naive import round_reference

from apr.config import TransformerTrainConfig
from apr.data.batch import LMBatch
from apr.params import EMBED, HEAD, layout
from apr.presets import llama_370m, qwen2_0_5b, qwen3_0_6b
from apr.reference.model import count_targets, loss_and_gradients, model_forward
from apr.taps import expected_gradient_names, expected_names
from apr.train.cuda_trainer import CudaTransformerTrainer

TOLERANCE = 1e-5  # float32 against float32, as tests/cpu/test_golden.py; measured worst 1.6e-6
LATER = 5e-5  # after ten AdamW steps, which divide small gradients by their own size; measured worst 4.1e-5
SMALL = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2,
         "max_position_embeddings": 64}
BF16_MODELS = [replace(qwen2_0_5b, **SMALL), replace(qwen3_0_6b, **SMALL), replace(llama_370m, **SMALL)]
FULL_T = 33
FULL_LAYERS = 24  # all of qwen2_0_5b: 4 GB of weights and 4 GB of gradients in float64, well under a minute on 16 cores


class Run:
    """A golden model in the GPU trainer; its kernels thawed, so that a wrong constant is a wrong number, no refusal."""

    def __init__(self, name, dev, precision="fp32"):
        self.golden = load(name)
        a, self.config = self.golden.adamw, self.golden.config
        rows, length = self.golden.arrays["inputs"].shape[1:]
        train = TransformerTrainConfig(lr=a["lr"], beta1=a["betas"][0], beta2=a["betas"][1], adam_eps=a["eps"],
                                       weight_decay=a["weight_decay"], max_grad_norm=a["max_grad_norm"],
                                       batch_size=rows, max_seq_len=length, precision=precision)
        given = {k: v.copy() for k, v in self.golden.group("param").items()}
        self.trainer = CudaTransformerTrainer.with_model(self.config, given, train, dev)
        dev.cache.frozen = False
        self.states: dict[str, np.ndarray] = {}

    def batch(self, step):
        """The batch of a step."""
        return LMBatch(self.golden.arrays["inputs"][step], self.golden.arrays["targets"][step])

    def gradients(self):
        """The first batch's mean loss; its gradients are in `trainer.grads`, the stages in `states`."""
        count = count_targets(self.golden.arrays["targets"][0])
        return self.trainer.gradients(self.batch(0), 1 / count,
                                      lambda n, a: self.states.__setitem__(n, a.copy())) / count


@pytest.mark.parametrize("name", NAMES)
def test_states_logits_and_gradients(dev, name):
    run = Run(name, dev)
    loss = run.gradients()
    assert abs(loss - run.golden.arrays["losses"][0]) <= 1e-5
    for stage, expected in run.golden.group("state").items():
        assert_close(run.states[stage].reshape(expected.shape), expected, TOLERANCE, stage)
    assert_close(run.states["logits"], run.golden.arrays["logits"], TOLERANCE, "logits")
    expected, grads = run.golden.group("grad"), run.trainer.grads
    assert expected.keys() == grads.keys()
    for key, value in expected.items():
        assert_close(grads[key], value, TOLERANCE, key)


@pytest.mark.parametrize("name", NAMES)
def test_every_position_agrees(dev, name):
    """Per position, so that one stale row among many does not drown in the norm of the rest."""
    run = Run(name, dev)
    expected = run.golden.arrays["logits"]
    logits = run.trainer.forward_logits(run.golden.arrays["inputs"][0])
    for b, t in np.ndindex(expected.shape[:2]):
        assert_close(logits[b, t], expected[b, t], TOLERANCE, f"logits at sequence {b} position {t}")


@pytest.mark.parametrize("name", NAMES)
def test_ten_adamw_steps(dev, name):
    """The first step kernel by kernel, the second recorded, the others as graphs."""
    run = Run(name, dev)
    for step, (loss, norm) in enumerate(zip(run.golden.arrays["losses"], run.golden.arrays["norms"], strict=True)):
        ours = run.trainer.train_batch(run.batch(step), lr=run.golden.adamw["lr"])
        assert abs(ours - loss) <= 1e-5, f"loss of step {step}: {ours}, expected {loss}"
        tolerance = TOLERANCE if step == 0 else LATER
        assert abs(run.trainer.last_grad_norm - norm) <= tolerance * norm, f"gradient norm of step {step}"
    for key, value in run.golden.group("final").items():
        assert_close(run.trainer.params[key], value, LATER, f"{key} after ten steps")


@pytest.mark.parametrize("name", NAMES)
def test_model_taps_every_stage_in_order(dev, name):
    run, names = Run(name, dev), []
    run.trainer.forward_logits(run.golden.arrays["inputs"][0], lambda stage, _array: names.append(stage))
    forward = expected_names(run.config.L, run.config.qk_norm)
    assert names == forward
    run.gradients()
    assert list(run.states) == forward + expected_gradient_names(run.config.L, run.config.qk_norm)


@pytest.mark.parametrize("t", [1, 5, 23])
def test_model_of_shorter_batches_than_planned(dev, t):
    """A batch may be smaller than the arena: fewer rows, shorter sequences, after a full one has left its numbers."""
    run = Run("qwen3", dev)
    run.gradients()
    ids, expected = run.golden.arrays["inputs"][0][:2, :t], run.golden.arrays["logits"][:2, :t]
    assert_close(run.trainer.forward_logits(ids), expected, TOLERANCE, "logits of the beginning of two sequences")


def reference_of(run_params, config, batch, kind, dloss):
    """logits, loss and gradients of the reference in `kind`."""
    params = {k: v.astype(kind) for k, v in run_params.items()}
    grads = {k: np.zeros_like(v) for k, v in params.items()}
    kept = {}
    total = loss_and_gradients(params, grads, config, batch.inputs, batch.targets, dloss,
                               lambda n, a: kept.__setitem__(n, a.copy()) if n == "logits" else None)
    return kept["logits"], total * dloss, grads


@pytest.mark.parametrize("config", BF16_MODELS, ids=lambda c: c.hf_model_type)
def test_bf16_model_is_no_worse_than_twice_naive(dev, monkeypatch, config):
    """Logits and every gradient, from the same rounded weights. (The golden models' heads of 16 are too small.)"""
    rng = np.random.default_rng(4)
    params = random_params(config, rng)
    batch = LMBatch.from_rows(rng.integers(0, config.V, (3, 34)))
    train = TransformerTrainConfig(batch_size=3, max_seq_len=33, precision="bf16")
    trainer = CudaTransformerTrainer.with_model(config, {k: v.copy() for k, v in params.items()}, train, dev)
    params, states = {k: rounded(v) for k, v in params.items()}, {}
    loss = trainer.gradients(batch, 1 / batch.num_tokens, lambda n, a: states.__setitem__(n, a.copy()))
    logits, truth, grads = reference_of(params, config, batch, np.float64, 1 / batch.num_tokens)
    round_reference(monkeypatch)
    naive_logits, naive_loss, naive_grads = reference_of(params, config, batch, np.float32, 1 / batch.num_tokens)
    judge(states["logits"], logits, gate("model"), "logits", naive_logits)
    assert abs(loss / batch.num_tokens - truth) <= 2 * abs(naive_loss - truth) + 2e-3  # 2^-9: bf16 of a score of 1
    for key, ours in trainer.grads.items():
        judge(ours, grads[key], gate("model"), key, naive_grads[key])


def random_params(config, rng):
    """Weights of realistic size, gains that are not 1, biases as in Qwen2's checkpoints."""
    sizes = {"q": 1.0, "k": 3.0, "v": 0.1}
    params = {}
    for spec in layout(config).specs:
        noise = rng.standard_normal(spec.shape, dtype=np.float32)
        if spec.name.endswith("bias"):
            params[spec.name] = noise * np.float32(sizes[spec.name.split(".")[-2][0]])
        elif "norm" in spec.name:
            params[spec.name] = 1 + np.float32(0.2) * noise
        else:
            scale = 0.02 if spec.name in (EMBED, HEAD) else 1 / np.sqrt(spec.shape[1])
            params[spec.name] = noise * np.float32(scale)
    return params


@pytest.mark.parametrize("preset", [qwen2_0_5b, llama_370m], ids=["qwen2_0_5b", "llama_370m"])
def test_full_size_model_matches_reference(dev, preset):
    """Logits and every gradient of a whole model in float32, against float64: 24 layers, a real vocabulary."""
    assert preset.L == FULL_LAYERS
    rng = np.random.default_rng(8)
    params, batch = random_params(preset, rng), LMBatch.from_rows(rng.integers(0, preset.V, (1, FULL_T + 1)))
    train = TransformerTrainConfig(batch_size=1, max_seq_len=FULL_T)
    trainer = CudaTransformerTrainer.with_model(preset, params, train, dev)
    ours = trainer.forward_logits(batch.inputs)
    loss = trainer.gradients(batch, 1 / FULL_T) / FULL_T
    params = {k: v.astype(np.float64) for k, v in params.items()}
    assert_close(ours, model_forward(params, preset, batch.inputs), gate("model"), "logits")
    grads = {k: np.zeros_like(v) for k, v in params.items()}
    truth = loss_and_gradients(params, grads, preset, batch.inputs, batch.targets, 1 / FULL_T) / FULL_T
    assert abs(loss - truth) <= 1e-5
    for key, array in trainer.grads.items():
        judge(array, grads.pop(key), gate("model"), key)
