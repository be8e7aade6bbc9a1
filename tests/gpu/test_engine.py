"""Generation on the GPU, whole: prefill and cached decoding against the reference's full forward, and its tokens."""

import dataclasses

import numpy as np
import pytest
from compare import relative_l2
from models import FAMILIES, random_params, source_of

from apr.config import Sampling
from apr.infer.cuda_engine import CudaEngine
from apr.reference.model import model_forward
from apr.reference.sampling import choose

GATE = 1e-5  # float32, at every position
BF16_GATE = 0.05  # over all positions: a prompt's activations are rounded to 8 bits, and attention here is sharp
MODELS = {
    **{name: dataclasses.replace(c, max_position_embeddings=700, head_dim=32, vocab_size=307)
       for name, c in FAMILIES.items()},
    "gqa": dataclasses.replace(FAMILIES["qwen2"], num_attention_heads=14, num_key_value_heads=2, head_dim=32,
                               hidden_size=96, max_position_embeddings=700, vocab_size=307, tie_word_embeddings=True)}


def engine_of(dev, name, precision="fp32", b=1, s=640):
    """An engine, its config, and the weights as it holds them, float32."""
    config = MODELS[name]
    params = random_params(config, 5, "BF16" if precision == "bf16" else "F32")
    dev.cache.frozen = False
    engine = CudaEngine(source_of(config, params), dev, precision, b, s)
    return engine, config, {n: a.astype(np.float32) for n, a in params.items()}


def prompt(seed, length, vocab=307):
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", list(MODELS))
def test_prefill_then_cached_decoding_equals_the_full_forward(dev, name, precision):
    engine, config, params = engine_of(dev, name, precision)
    for length, cached in ((1, 1), (2, 1), (31, 17), (64, 63), (600, 560), (600, 600), (600, 0)):
        ids = prompt(length, length)
        got, = engine.scores([ids], [cached])
        truth = model_forward(params, config, np.array([ids]))[0]
        assert relative_l2(got, truth) <= (GATE if precision == "fp32" else BF16_GATE), f"{length}, {cached} in prefill"
        errors = [relative_l2(got[at], truth[at]) for at in range(length)] if precision == "fp32" else [0.0]
        assert max(errors) <= GATE, f"{length} tokens, {cached} in prefill, position {np.argmax(errors)}: {max(errors)}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_ragged_batch_equals_each_sequence_alone_bit_for_bit(dev, precision):
    prompts, cached = [prompt(i, n) for i, n in enumerate((40, 3, 17, 90, 1))], [20, 3, 1, 60, 1]
    batch, _, _ = engine_of(dev, "gqa", precision, b=5)
    together = batch.scores(prompts, cached)
    alone, _, _ = engine_of(dev, "gqa", precision, b=1)
    for ids, n, scores in zip(prompts, cached, together, strict=True):
        assert (alone.scores([ids], [n])[0].view(np.uint32) == scores.view(np.uint32)).all()


DRAWN = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "seed": 7}


@pytest.mark.parametrize("settings", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", list(MODELS))
def test_generated_tokens_are_those_of_the_reference(dev, name, settings):
    engine, config, params = engine_of(dev, name, b=2)
    prompts, sampling = [prompt(1, 9), prompt(2, 5)], Sampling(300, first=3, **settings)
    got = np.stack(list(engine.generate(prompts, sampling, 64)))
    assert got.shape == (64, 2)
    for row, ids in enumerate(prompts):
        sequence = list(ids)
        for step in range(64):
            scores = model_forward(params, config, np.array([sequence]))[0, -1]
            expected = choose(scores, sampling, 3 + row, len(sequence))
            assert got[step, row] == expected, f"sequence {row}, step {step}"
            sequence.append(expected)


def test_a_shorter_prompt_after_a_longer_one_sees_nothing_of_it(dev):
    engine, _, _ = engine_of(dev, "qwen2")
    fresh, _, _ = engine_of(dev, "qwen2")
    sampling = Sampling(307)
    list(engine.generate([prompt(1, 500)], sampling, 100))
    first = np.stack(list(engine.generate([prompt(2, 3)], sampling, 50)))
    assert (first == np.stack(list(fresh.generate([prompt(2, 3)], sampling, 50)))).all()


def test_generation_stops_at_the_end_of_the_context_and_when_it_is_closed(dev):
    engine, _, _ = engine_of(dev, "llama", s=40)
    assert len(list(engine.generate([prompt(1, 30)], Sampling(307), 100))) == 10
    steps = engine.generate([prompt(1, 5)], Sampling(307), 30)
    first = [next(steps), next(steps)]
    steps.close()
    again = engine.generate([prompt(1, 5)], Sampling(307), 30)
    assert [next(again), next(again)] == first
    again.close()


def test_weights_that_overflow_are_an_error_and_no_token(dev):
    config = MODELS["llama"]
    params = random_params(config, 5)
    params["model.layers.1.mlp.down_proj.weight"][:] = 3e38
    dev.cache.frozen = False
    engine = CudaEngine(source_of(config, params), dev, "fp32", 1, 64)
    with pytest.raises(Exception, match="numbers"):
        list(engine.generate([prompt(1, 5)], Sampling(307), 10))
