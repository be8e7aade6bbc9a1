"""A decoding step without a GPU: what it launches is what is warmed up, nothing else and nothing twice."""

import dataclasses

import numpy as np
import pytest
from models import FAMILIES

from apr.arena import Arena
from apr.buffers import STORAGE, inference_plan
from apr.decode import Decoder
from apr.kernel import Baked, KernelSpec
from apr.model import Model
from apr.ops.decode_attention import partial_size
from apr.ops.decode_linear import head_blocks
from apr.registry import inference_variants

S = 48
CONFIGS = {name: dataclasses.replace(c, head_dim=32) for name, c in FAMILIES.items()}  # what the kernels cover
CONFIGS["gqa"] = dataclasses.replace(CONFIGS["qwen2"], num_attention_heads=12, num_key_value_heads=1)


class FakeDevice:
    """Memory that is NumPy's, and a list of what was launched: (spec, baked, programmatic)."""

    ordinal = 0
    fast: frozenset[str] = frozenset()

    def __init__(self):
        self.launched: list[tuple[KernelSpec, Baked, bool]] = []

    def free_bytes(self):
        return 1 << 40, 1 << 40

    def empty(self, shape, dtype):
        return np.zeros(shape, {"u8": np.uint8, "bf16": np.uint16, "i32": np.int32, "i64": np.int64, "f64": np.float64,
                                "f32": np.float32}[dtype])

    def fill(self, array, byte):
        assert byte == 0

    def download(self, array):
        return array

    def launch(self, spec, baked, grid, block, args, shared=0, programmatic=False):
        spec.check_baked(baked)
        assert len(args) == len(spec.args) and min(grid) > 0 and block[0] <= 1024
        self.launched.append((spec, baked, programmatic))


class FakeGemm:
    """Products that take any time."""

    def linear(self, *arrays, **options):
        assert len(arrays) in (3, 4)


def decoder_of(config, precision, b):
    """A decoder whose prompt has gone through the layers; its device."""
    dev, storage = FakeDevice(), STORAGE[precision]
    plan = inference_plan(config, b, S, precision, head_blocks(config, b, storage), partial_size(config, b))
    net = Model(dev, FakeGemm(), Arena(dev, plan), config)
    for tap in (None, lambda name, array: None):  # a prompt, and one that is looked at
        net.forward(net.batch(1, 5, tap, 0))
    return Decoder(net, np.zeros((S, b), np.int32)), dev


def modules(variants):
    """What is compiled: source and baked values."""
    return {(spec.source, repr(sorted(baked.items()))) for spec, baked, *_ in variants}


@pytest.mark.parametrize("b", [1, 2, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_generation_launches_is_what_is_warmed_up(name, precision, b):
    config = CONFIGS[name]
    decoder, dev = decoder_of(config, precision, b)
    decoder.start()
    decoder.step()
    needed = inference_variants(config, STORAGE[precision], b)
    assert modules(dev.launched) == modules(needed)
    entries = {(spec.entry, repr(sorted(baked.items()))) for spec, baked in needed}
    assert {(spec.entry, repr(sorted(baked.items()))) for spec, baked, _ in dev.launched} <= entries


def test_a_step_is_five_kernels_a_layer_the_head_and_the_choice():
    decoder, dev = decoder_of(CONFIGS["qwen2"], "bf16", 1)
    dev.launched.clear()
    decoder.step()
    layer = ["decode_qkv", "decode_attention", "decode_add", "decode_gate_up", "decode_add"]
    assert [spec.entry for spec, *_ in dev.launched] == [*layer * CONFIGS["qwen2"].L, "decode_head", "sample"]
    # Attention reads keys of earlier steps before it waits, so those must have ended when a step's first kernel starts.
    assert [programmatic for *_, programmatic in dev.launched] == [False] + [True] * (len(dev.launched) - 1)
