"""Models saved by transformers (tests/golden/make_hf_models.py): what the GPU computes from those folders."""

from pathlib import Path

import numpy as np
import pytest
from compare import assert_close

from apr.config import Sampling
from apr.formats.open_model import open_model
from apr.formats.safetensors import open_safetensors
from apr.infer.cuda_engine import CudaEngine
from apr.tools.gate import check

HF = Path(__file__).parents[1] / "golden" / "hf"
NAMES = ("llama", "mistral", "qwen2", "qwen3", "smollm")
TOLERANCE = 2e-5  # float32 against float32, at every position


@pytest.fixture(params=NAMES)
def model(dev, request):
    """An engine in float32 that passed the gate, and what transformers computed."""
    dev.cache.frozen = False
    with open_model(HF / request.param) as source:
        engine = CudaEngine(source, dev, "fp32", 2, 128)
        check(engine, source)
    with open_safetensors(HF / request.param / "expected.safetensors") as opened:
        return engine, opened.read_all()


def test_scores_of_transformers(model):
    engine, truth = model
    prompts = [truth[f"prompt.{i}"].tolist() for i in range(2)]
    for cached in (0, 3, None):
        found = engine.scores(prompts, [len(p) if cached is None else cached for p in prompts])
        for i, scores in enumerate(found):
            for t, row in enumerate(truth[f"logits.{i}"]):
                assert_close(scores[t], row, TOLERANCE, f"prompt {i}, {cached} in prefill, position {t}")


def test_64_greedy_tokens_of_transformers(model):
    engine, truth = model
    prompt, tokens = truth["prompt.1"].tolist(), truth["greedy"]
    found = np.stack(list(engine.generate([prompt], Sampling(engine.config.V), len(tokens))))[:, 0]
    assert found.tolist() == tokens.tolist() and len(tokens) == 64
