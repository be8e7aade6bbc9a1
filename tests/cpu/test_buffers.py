"""The plan of GPU memory: every size from its shape, nothing twice, nothing that two things need at once."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from apr.buffers import (
    BESIDE_LOGITS,
    LOGITS_BYTES,
    PARTS,
    SIZES,
    WORKSPACE,
    BufferSpec,
    inference_plan,
    logits_rows,
    plan,
    table,
)
from apr.errors import ConfigError
from apr.params import layout
from apr.presets import PRESETS, llama3_2_1b, llama_370m, qwen2_0_5b, qwen3_0_6b, tiny

MIB = 2**20
# Buffers that share memory, with the pass in which each is alive (apr/block.py, apr/model.py).
ALIASES = {
    "dnorm": ("branch", "branch: forward, from a product to the addition that takes it; dnorm: backward alone"),
    "dact": ("act", "act: forward, into the down projection; in backward swiglu_backward reads dact and writes act at "
                    "the same element, so each element of dact is read before it is overwritten"),
    "params": ("master", "fp32 alone: the weights that kernels read are the master weights; adamw is given no copy"),
}
# Beside these, what lies in logits_buf, which is alive from the end of the forward pass to the layers' backward pass.
BESIDE = {
    "act": "the layers alone", "norm": "the layers, and the final norm's backward pass, when the logits are free",
    "dqkv": "backward through a layer; in forward an aside for the tap", "datty": "backward through a layer",
    "dresidual": "from the final norm's backward pass on",
}


def by_name(p) -> dict[str, BufferSpec]:
    return {b.name: b for b in p.buffers}


def test_the_numbers_of_qwen2_0_5b():
    """B = 8, T = 2048, bf16: N = 16384, C = 896, F = 4864, L = 24, QKV = 1152."""
    p = plan(qwen2_0_5b, 8, 2048, "bf16")
    b = by_name(p)
    parameters = 151936 * 896 + 24 * (1152 * 896 + 1152 + 896 * 896 + 3 * 4864 * 896 + 2 * 896) + 896
    assert b["master"].size == parameters == 494_032_768
    assert p.by_role() == {
        "master": 4 * parameters, "params": 2 * parameters, "grads": 4 * parameters, "optimizer": 8 * parameters,
        "acts": 16384 * (2 * (49 * 896 + 24 * (1152 + 896 + 2 * 4864) + 896) + 4 * (49 + 24 * 14)),
        "scratch": 16384 * 2 * 896 + 4096 * 151936 * 2 + 8 * 14 * 2048 * 4 + 528 * 1152 * 4
        + 528 * 8 + 2 * 2048 * 32 * 4 + 16384 * 4 + 4 * 4 + WORKSPACE,
        "inputs": 4 * 16384 * 4 + 4 + 2 * 8 + 4 * 8}
    assert p.rows == 4096 and b["logits_buf"].shape == (4096, 151936)
    assert round(p.bytes / MIB) == 19988  # 19.52 GiB
    assert p.bytes == sum(-(-x.bytes // 256) * 256 for x in p.buffers)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["qwen2_0_5b", "qwen3_0_6b", "llama_370m", "tiny", "llama3_2_1b"])
def test_sums_alignment_and_names(name, precision):
    p = plan(PRESETS[name], 3, 100, precision)
    names = [b.name for b in p.buffers]
    assert len(set(names)) == len(names) and {b.dtype for b in p.buffers} <= set(SIZES)
    assert sum(p.by_role().values()) == sum(b.bytes for b in p.buffers) <= p.bytes
    assert p.bytes % 256 == 0 and p.bytes - sum(b.bytes for b in p.buffers) < 256 * len(names)
    assert all(b.size > 0 and (b.bytes == b.size * SIZES[b.dtype]) != bool(b.alias) for b in p.buffers)
    storage = {"fp32": "f32", "bf16": "bf16"}[precision]
    for b in p.buffers:  # statistics, sums and what AdamW works on are never bf16
        assert b.dtype == storage or b.dtype != "bf16"
        if b.name in ("master", "grads", "m", "v", "rstd", "lse", "partial", "losses", "cos", "sin", "head_rstd"):
            assert b.dtype == "f32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_aliases_have_the_size_of_what_they_share_and_a_reason(precision):
    b = by_name(plan(qwen3_0_6b, 2, 64, precision))
    aliases = {x.name: x.alias for x in b.values() if x.alias}
    whole = {name: of for name, (of, _) in ALIASES.items() if precision == "fp32" or name != "params"}
    assert aliases == {**dict.fromkeys(BESIDE, "logits_buf"), **whole, "dact": "logits_buf"}
    for name, of in whole.items():  # an alias of act is of the memory that act is in
        assert (b[name].shape, b[name].dtype, b[name].offset) == (b[of].shape, b[of].dtype, b[of].offset)
    for name, of in aliases.items():
        assert b[of].alias is None and b[name].bytes == 0 and b[name].dtype == b[of].dtype


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_lies_in_logits_buf_fits_and_lies_apart(precision):
    """As much as there is room for; a small vocabulary has room for little."""
    narrow = replace(tiny, vocab_size=128, intermediate_size=100)
    for config, B, T in ((qwen2_0_5b, 8, 2048), (llama_370m, 32, 1024), (qwen3_0_6b, 1, 1), (tiny, 4, 16),
                         (narrow, 4, 16)):
        b = by_name(plan(config, B, T, precision))
        inside = sorted((x for x in b.values() if x.alias == "logits_buf" and x.name != "dact"), key=lambda x: x.offset)
        for one, after in zip(inside, [*inside[1:], b["logits_buf"]], strict=True):
            end = after.offset if after in inside else b["logits_buf"].size
            assert one.offset + one.size <= end and one.offset * SIZES[one.dtype] % 256 == 0
    assert set(BESIDE) == set(BESIDE_LOGITS)
    cramped = by_name(plan(narrow, 4, 16, precision))
    alone = [name for name in BESIDE if cramped[name].alias is None]
    assert "act" not in alone and alone and all(cramped[name].bytes for name in alone)
    assert cramped["dact"].alias == "logits_buf" and cramped["dact"].offset == cramped["act"].offset


def test_aliases_are_never_alive_together():
    """The walk over a layer never names `branch` in backward, nor `dnorm` in forward."""
    source = (Path(__file__).parents[2] / "apr" / "block.py").read_text()
    forward, backward = re.split(r"^def block_backward", source, flags=re.M)
    forward = forward.partition("def block_forward")[2]
    assert '"branch"' in forward and '"dnorm"' not in forward and '"dact"' not in forward
    assert '"dnorm"' in backward and '"branch"' not in backward
    model = (Path(__file__).parents[2] / "apr" / "model.py").read_text()
    losses = model.partition("def losses_and_gradients")[2].partition("def _chunks")[0]
    assert '"dnorm"' in losses and '"branch"' not in losses
    # what lies in logits_buf is asked for before the logits or after them, and the arena refuses it in between
    during = losses.partition("for start, stop")[2].partition("self._add_losses")[0]
    assert during and not any(f'"{name}"' in during for name in (*BESIDE, "dact"))
    # act is written by swiglu_backward, in the same launch that reads dact, and after that dact is not read
    after = backward.partition("swiglu_backward(dev, gate_up, act, dact, gate_up)")[2]
    assert after and "dact" not in after.partition("def head_norm")[0]


def test_dact_is_read_before_act_is_written_at_each_element():
    source = (Path(__file__).parents[2] / "kernels" / "swiglu.cu").read_text()
    body = source.partition("swiglu_backward(")[2].partition("{")[2]
    assert "__restrict__" not in source.partition("swiglu_backward(")[2].partition(")")[0]
    assert 0 < body.index("(dact)") < body.index("(act)")


def test_tied_and_untied_and_padded():
    tied, untied = (by_name(plan(replace(tiny, tie_word_embeddings=t), 2, 8, "fp32")) for t in (True, False))
    assert untied["master"].size - tied["master"].size == tiny.Vp * tiny.C and tiny.Vp == 1024
    assert tied["logits_buf"].shape == (16, 1024)
    p = plan(llama_370m, 1, 8, "bf16")
    assert by_name(p)["logits_buf"].shape[1] == 50304 and by_name(p)["params"].size == layout(llama_370m).size


def test_head_norms_keep_what_they_normalised():
    with_, without = by_name(plan(qwen3_0_6b, 2, 8, "bf16")), by_name(plan(qwen2_0_5b, 2, 8, "bf16"))
    assert {"qkv_raw", "head_rstd"} <= set(with_)
    assert with_["qkv_raw"].shape == with_["qkv"].shape == (28, 16, 32 * 128)
    assert with_["head_rstd"].shape == (28, 16, 24) and with_["head_rstd"].dtype == "f32"
    assert not {"qkv_raw", "head_rstd"} & set(without)
    assert with_["partial"].shape == (PARTS, 4096) and without["partial"].shape == (PARTS, 1152)


def test_the_numbers_of_generating_with_qwen2_0_5b():
    """8 sequences of 2048 tokens, bf16; 38,000 blocks in the head, 9000 elements of attention's scratch."""
    p = inference_plan(qwen2_0_5b, 8, 2048, "bf16", 38_000, 9000)
    b, parameters, s = by_name(p), 494_032_768, 2048
    assert p.by_role() == {
        "params": 2 * parameters, "kv": 2 * 2 * 24 * 8 * 2 * s * 64,
        "acts": s * (2 * (3 * 896 + 1152 + 896 + 2 * 4864 + 896) + 4 * (3 + 14)),  # of one layer
        "scratch": s * 2 * (2 * 896 + 4864 + 1152) + 128 * 151936 * 2 + 2 * s * 32 * 4 + WORKSPACE
        + 8 * 4 * (1152 + 896 + 4864 + 151936 + 2 * 38_000) + 4 * 9000,
        "inputs": 4 * s + 5 * 8 + 2 * 8, "state": 8 * 4 * (896 + 14 + 3)}
    assert b["k_cache"].shape == b["v_cache"].shape == (24, 8, 2, 2048, 64) and b["k_cache"].dtype == "bf16"
    assert b["logits_buf"].shape == (128, 151936) and p.rows == 128 and p.what == "generation"
    assert not {"master", "grads", "m", "v", "targets", "losses", "delta", "datty"} & set(b)
    assert b["scores"].dtype == b["x"].dtype == "f32" and b["best_id"].dtype == b["ticket"].dtype == "i32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [qwen3_0_6b, llama_370m, tiny], ids=lambda c: c.hf_model_type)
def test_a_plan_of_generation_shares_no_memory_and_names_nothing_twice(config, precision):
    p = inference_plan(config, 4, 100, precision, 10, 20)
    assert [x.name for x in p.buffers if x.alias] == [] and len(by_name(p)) == len(p.buffers)
    assert sum(p.by_role().values()) == sum(x.bytes for x in p.buffers) <= p.bytes
    assert by_name(p)["params"].dtype == by_name(p)["v_cache"].dtype == {"fp32": "f32", "bf16": "bf16"}[precision]
    assert by_name(p)["residual"].shape[0] == 3 and by_name(p)["qkv"].shape[0] == 1  # one layer at a time
    assert ("qkv_raw" in by_name(p)) == config.qk_norm and by_name(p)["logits_buf"].shape == (100, config.Vp)


@pytest.mark.parametrize("S", [0, -1, 513])
def test_a_context_beyond_the_positions_is_refused(S):
    with pytest.raises(ConfigError, match=r"context: expected 1 to max_position_embeddings \(512\)"):
        inference_plan(tiny, 1, S, "bf16", 1, 1)
    assert inference_plan(tiny, 1, 512, "bf16", 1, 1).T == 512 and inference_plan(tiny, 1, 1, "bf16", 1, 1).rows == 1


@pytest.mark.parametrize(("rows", "row_bytes", "expected"), [
    (16384, 303872, 4096), (16384, 100608, 8192), (1, 303872, 1), (100, 303872, 100), (16384, 607744, 2048),
    (4416, 303872, 4416), (4417, 303872, 2304), (3, LOGITS_BYTES, 3), (1000, LOGITS_BYTES // 100, 128)])
def test_rows_of_logits(rows, row_bytes, expected):
    assert logits_rows(rows, row_bytes) == expected


@pytest.mark.parametrize("row_bytes", [256, 100608, 303872, 607744])
def test_rows_of_logits_are_few_equal_parts(row_bytes):
    for n in (1, 127, 128, 129, 8000, 16384, 32768, 100_001):
        rows = logits_rows(n, row_bytes)
        parts = -(-n // rows)
        assert 1 <= rows <= n and (rows == n or rows % 128 == 0)
        assert rows * row_bytes <= LOGITS_BYTES + 128 * row_bytes
        assert (parts - 1) * rows < n and n - (parts - 1) * rows > rows - 128 * parts


@pytest.mark.parametrize(("B", "T", "where"), [
    (1, 0, "max_seq_len"), (1, -1, "max_seq_len"), (1, 513, "max_seq_len"), (0, 8, "batch_size"), (-1, 8, "batch_size"),
    (65536, 1, "batch_size"), (65535, 512, None), (1, 512, None), (1, 1, None)])
def test_limits_of_batch_and_length(B, T, where):
    if where is None:
        assert plan(tiny, B, T, "bf16").bytes > 0
        return
    with pytest.raises(ConfigError, match=where):
        plan(tiny, B, T, "bf16")


def test_rows_times_heads_stay_in_31_bits():
    wide = replace(tiny, max_position_embeddings=2**20)
    with pytest.raises(ConfigError, match=r"batch_size.*1024 x 1048576"):
        plan(wide, 1024, 2**20, "bf16")
    assert plan(wide, 1023, 2**20, "bf16").B == 1023


def test_memory_grows_with_batch_and_length_and_fp32():
    sizes = [plan(llama3_2_1b, B, T, "bf16").bytes for B, T in ((1, 128), (2, 128), (2, 256), (8, 2048))]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    assert plan(llama3_2_1b, 8, 2048, "fp32").bytes > sizes[-1]


def test_the_table_names_every_buffer_and_sums():
    p = plan(qwen2_0_5b, 8, 2048, "bf16")
    lines = table(p)
    assert [line.split()[0] for line in lines[1:1 + len(p.buffers)]] == [b.name for b in p.buffers]
    assert lines[-1].split() == ["total", f"{p.bytes / MIB:.1f}"]
    assert sum(float(line.split()[3]) for line in lines[1:1 + len(p.buffers)]) == pytest.approx(p.bytes / MIB, abs=2)
    assert [line.split()[0] for line in lines[1 + len(p.buffers):-1]] == list(p.by_role())
    assert "(the memory of branch)" in "\n".join(lines) and max(map(len, lines)) < 100
