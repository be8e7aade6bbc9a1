"""The CPU engine: tokens follow the scores, batches are their members, limits hold, and memory stays one copy."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from compare import assert_close
from models import FAMILIES, SMALL

import apr.infer.cpu_engine as module
from apr.config import Sampling
from apr.errors import InferenceError, ShapeError
from apr.formats.model_file import save_model
from apr.formats.open_model import open_model
from apr.infer.cpu_engine import CpuEngine, load_params
from apr.params import param_specs
from apr.reference.model import model_forward
from apr.reference.sampling import choose

FLOAT32 = 1e-5  # relative L2, as in test_reference_kv_cache.py
GREEDY = Sampling(vocab=97)
PROMPTS = [[3, 5, 8], [1], list(range(40)), [7] * 12]


def parameters(config, seed=5):
    rng = np.random.default_rng(seed)
    noise = {s.name: rng.standard_normal(s.shape, dtype=np.float32) for s in param_specs(config)}
    return {n: 1 + np.float32(0.2) * x if "norm" in n else np.float32(0.3) * x for n, x in noise.items()}


@pytest.fixture(scope="module", params=list(FAMILIES))
def engine(request):
    config = FAMILIES[request.param]
    return CpuEngine(config, parameters(config), 4, 64)


def continued(engine, prompts, sampling, limit):
    """The tokens of each sequence, limit of them at most."""
    steps = list(engine.generate(prompts, sampling, limit))
    assert all(s.shape == (len(prompts),) and s.dtype == np.int32 for s in steps)
    return [[int(t) for t in row] for row in zip(*steps, strict=True)]


def by_full_forward(engine, prompt, sampling, row, limit):
    ids = list(prompt)
    for _ in range(limit):
        logits = model_forward(engine.params, engine.config, np.array([ids]))[0, -1]
        ids.append(choose(logits, sampling, sampling.first + row, len(ids)))
    return ids[len(prompt):]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(vocab=97, temperature=0.9, seed=4, first=3),
                                      Sampling(vocab=60, temperature=1.5, top_k=40, top_p=0.9, seed=1)])
def test_every_token_is_the_full_forward_passes(engine, sampling):
    ours = continued(engine, PROMPTS, sampling, 20)
    for row, prompt in enumerate(PROMPTS):
        assert ours[row] == by_full_forward(engine, prompt, sampling, row, 20)
        alone = dataclasses.replace(sampling, first=sampling.first + row)
        assert continued(engine, [prompt], alone, 20) == [ours[row]]
    assert max(max(row) for row in ours) < sampling.vocab


def test_scores_of_prefill_and_decode_are_the_full_forward_passes(engine):
    prompts = [list(np.random.default_rng(n).integers(0, 97, n)) for n in (64, 1, 17, 30)]
    for cached in ([64, 1, 17, 30], [0, 1, 0, 1], [30, 1, 16, 7]):
        for prompt, scores in zip(prompts, engine.scores(prompts, cached), strict=True):
            assert_close(scores, model_forward(engine.params, engine.config, np.array([prompt]))[0], FLOAT32, "scores")


def test_a_tap_sees_prompts_whole_and_every_step(engine, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    seen = []
    engine.scores([[1, 2, 3, 4, 5, 6, 7], [9, 8, 7]], [6, 1], lambda n, a: seen.append((n, a.shape[:2])))
    assert [shape for name, shape in seen if name == "logits"] == [(1, 6), (1, 1), (2, 1), (1, 1)]


def test_a_prompt_in_pieces_is_the_prompt(engine, monkeypatch):
    prompt = list(range(50))
    whole = continued(engine, [prompt], GREEDY, 10), engine.scores([prompt], [50])[0]
    monkeypatch.setattr(module, "CHUNK", 7)
    assert continued(engine, [prompt], GREEDY, 10) == whole[0]
    assert_close(engine.scores([prompt], [50])[0], whole[1], FLOAT32, "in pieces of 7")


def test_where_generation_ends(engine):
    assert continued(engine, [[1] * 60], GREEDY, 100)[0] == by_full_forward(engine, [1] * 60, GREEDY, 0, 4)
    assert len(continued(engine, [[1], [1] * 62], GREEDY, 100)[0]) == 2  # the longest decides
    assert continued(engine, [[1] * 64], GREEDY, 5) == [] and continued(engine, [[1]], GREEDY, 0) == []
    assert len(continued(engine, [[1]], GREEDY, 1)[0]) == 1
    steps = engine.generate([[1, 2]], GREEDY, 50)
    first = next(steps)
    steps.close()
    assert first == next(engine.generate([[1, 2]], GREEDY, 1))  # nothing of the closed one is left


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []], [[1]] * 5, [[1] * 65], [[97]], [[-1]], [[1], [5, 97]]])
def test_prompts_out_of_range_are_refused(engine, prompts):
    for call in (lambda: engine.generate(prompts, GREEDY, 1), lambda: engine.scores(prompts, [1] * len(prompts))):
        with pytest.raises(ShapeError, match="prompt"):
            call()


@pytest.mark.parametrize("cached", [[], [-1], [4], [1, 1]])
def test_a_cached_part_out_of_range_is_refused(engine, cached):
    with pytest.raises(ShapeError, match="cached"):
        engine.scores([[1, 2, 3]], cached)


@pytest.mark.parametrize(("b", "s"), [(0, 8), (1, 0), (1, 65)])
def test_sizes_out_of_range_are_refused(b, s):
    with pytest.raises(ShapeError, match=r"engine \(B, S\)"):
        CpuEngine(SMALL, parameters(SMALL), b, s)


def test_damaged_weights_are_named_not_sampled(recwarn):
    params = parameters(SMALL)
    params["model.norm.weight"][3] = np.nan
    with pytest.raises(InferenceError, match="scores at position 2"):
        next(CpuEngine(SMALL, params, 1, 8).generate([[1, 2]], GREEDY, 1))
    params["model.norm.weight"][3] = 3e38
    with pytest.raises(InferenceError, match="scores at position"):
        list(CpuEngine(SMALL, params, 1, 8).generate([[1, 2]], GREEDY, 5))
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_parameters_are_loaded_as_float32_one_by_one(tmp_path, dtype):
    stored = {n: a.astype(dtype) for n, a in parameters(SMALL).items()}
    save_model(tmp_path / "m.apr", SMALL, stored, "m")
    with open_model(tmp_path / "m.apr") as source:
        params = load_params(source)
    assert params.keys() == stored.keys()
    for name, array in params.items():
        assert array.dtype == np.float32 and array.flags.c_contiguous
        assert (array == stored[name].astype(np.float32)).all()
