"""Which path a run says it takes, of each op that has a fast one: what its kernels are, and no more than they are."""

import io

import pytest
from lazy_gpu import LazyGemm, LazyGpu
from models import FAMILIES, train_config

from apr.cli.progress import Display, kernels
from apr.kernel import FAST_PATHS, KernelSpec, is_fast
from apr.ops import attention, cross_entropy
from apr.presets import qwen2_0_5b
from apr.registry import inference_paths, paths
from apr.train.cuda_trainer import CudaTransformerTrainer
from apr.train.trainer import TransformerTrainer

EVERY = frozenset(FAST_PATHS)
FAST = KernelSpec("attention_sm90.cu", "attention_forward", attention.BAKED, ("T:i32",))


@pytest.fixture
def covered(monkeypatch):
    """A fast path of attention where it is wanted, which covers every model."""
    general = attention.variants
    monkeypatch.setattr(attention, "variants", lambda c, storage, fast: (
        [(FAST, attention.attention_baked(c, storage))] if "attention" in fast else general(c, storage, fast)))


def test_without_a_fast_path_every_op_is_general():
    for storage in ("f32", "bf16"):
        assert paths(qwen2_0_5b, storage, frozenset()) == {"attention": "general", "cross_entropy": "general"}
        assert inference_paths(qwen2_0_5b, storage, 1, frozenset()) == {"attention": "general"}


def test_a_path_is_that_of_the_kernels(covered):
    assert paths(qwen2_0_5b, "bf16", EVERY)["attention"] == FAST_PATHS["attention"] == "sm_90a"
    assert paths(qwen2_0_5b, "bf16", EVERY - {"attention"})["attention"] == "general"
    assert inference_paths(qwen2_0_5b, "bf16", 8, EVERY) == {"attention": "sm_90a"}


def test_what_a_fast_kernel_is():
    assert is_fast("attention", FAST) and is_fast("cross_entropy", cross_entropy.FAST_FORWARD)
    assert not is_fast("cross_entropy", FAST) and not is_fast("attention", cross_entropy.FAST_FORWARD)
    for op, module in (("attention", attention), ("cross_entropy", cross_entropy)):
        assert any(not is_fast(op, spec) for spec in module.SPECS)


def test_a_trainer_and_its_record_say_it(covered, monkeypatch):
    monkeypatch.setattr("apr.train.cuda_trainer.Gemm", LazyGemm)
    for fast, path in ((frozenset(), "general"), (EVERY, "sm_90a")):
        dev = LazyGpu()
        dev.fast = fast
        trainer = CudaTransformerTrainer(FAMILIES["qwen2"], train_config(), dev)
        assert trainer.path["attention"] == trainer.record()["path"]["attention"] == path
    assert TransformerTrainer(FAMILIES["qwen2"], train_config()).path == {}


def test_a_person_is_told_where_there_is_a_choice():
    stream = io.StringIO()
    with Display(stream) as display:
        start = {"event": "start", "device": "cuda:0", "synthetic": False, "max_steps": 2, "tokens_per_step": 4}
        display(start | {"path": {"attention": "sm_90a", "cross_entropy": "general"}})
        display(start | {"path": {}})
    first, second = stream.getvalue().splitlines()
    assert first.endswith("of 4 tokens; kernels: attention sm_90a, cross_entropy general")
    assert second.endswith("of 4 tokens") and kernels({}) == ""
