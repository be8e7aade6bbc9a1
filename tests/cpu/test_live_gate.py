"""The live gate: sound steps pass, each planted fault is caught and named, and looking changes nothing."""

import dataclasses

import numpy as np
import pytest
from models import FAMILIES, random_batch, random_params, train_config
from step_stand_in import Fault, StandIn

from apr.config import IGNORE
from apr.data.batch import LMBatch
from apr.errors import GateError, MeasureError
from apr.reference.attention import attention_forward
from apr.reference.rmsnorm import rmsnorm_forward
from apr.tools import live_gate
from apr.tools.compare import relative
from apr.tools.live_gate import LiveGate
from apr.tools.live_judge import Judge, Limit
from apr.train.trainer import TransformerTrainer

BOTH = pytest.mark.parametrize("precision", ["fp32", "bf16"])
T, WINDOW, LOSSES, LR = 40, 24, 8, 1e-3


@pytest.fixture(autouse=True)
def small_window(monkeypatch):
    """A window that begins and ends within a sequence, and a loss of every one of these rows."""
    monkeypatch.setattr(live_gate, "POSITIONS", WINDOW)
    monkeypatch.setattr(live_gate, "LOSSES", LOSSES)


def stand_in(precision, family="qwen2", **settings):
    config = FAMILIES[family]
    return StandIn.with_model(config, random_params(config, 5), train_config(precision=precision, **settings))


def batches(step, count=1):
    return [random_batch(100 * step + i, 4, T) for i in range(count)]


def checked(trainer, gate, step, micro, fault=None):
    """A step under the gate; the fault is there from after `before` to the end of the step."""
    gate.before(trainer, step, micro)
    trainer.fault = fault or Fault()
    trainer.train_batch(micro, LR)
    trainer.fault = Fault()
    return gate.after(trainer, step, LR)


def passed(*arguments):
    """The same of a step with nothing wrong."""
    try:
        return checked(*arguments)
    except GateError as e:
        raise AssertionError(f"a sound step is refused: {e}") from e


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_sound_steps_pass(family, precision):
    trainer, gate = stand_in(precision, family), LiveGate(1, 3)
    events = [passed(trainer, gate, step, batches(step)) for step in range(6)]
    assert trainer.step == 6 and all(e["event"] == "parity" and e["gradient"] for e in events)
    assert {e["layer"] for e in events} == {0, 1} and len({e["sequence"] for e in events}) > 1
    assert len({e["positions"][0] for e in events}) > 1
    assert all(e["positions"][1] - e["positions"][0] == WINDOW for e in events)
    assert all(0 < e["worst"]["relative_l2"] <= 0.8 * e["worst"]["limit"] for e in events), events
    # embedding, six stages of the layer, final norm, losses and their sum, weight gradient, four of each slice
    assert {e["checks"] for e in events} == {1 + 6 + 1 + LOSSES + 1 + 1 + 2 * 4}


@BOTH
@pytest.mark.parametrize(("count", "rows"), [(3, 4), (1, 3), (2, 3)])
def test_several_micro_batches_or_parts_pass_without_the_gradient(precision, count, rows):
    """Their activations are those of the last part: its sequences are what the window is chosen from."""
    trainer, gate = stand_in(precision), LiveGate(1, 3)
    trainer.part_rows = rows
    events = [passed(trainer, gate, step, batches(step, count)) for step in range(4)]
    assert not any(e["gradient"] for e in events)
    assert {e["checks"] for e in events} == {1 + 6 + 1 + LOSSES + 2 * 4}
    assert all(e["sequence"] < (1 if rows == 3 else 4) for e in events)


@BOTH
@pytest.mark.parametrize("far", [[], [3]])
def test_a_small_addition_to_a_large_stream_passes(precision, far):
    """Rounding such a sum to storage costs more than the addition may be wrong by; `far`: huge in one channel alone."""
    trainer, gate = stand_in(precision, "llama"), LiveGate(1, 3)
    trainer.params["model.embed_tokens.weight"][:, far or slice(None)] *= 1000 if far else 100
    for step in range(4):
        passed(trainer, gate, step, batches(step))
    with pytest.raises(GateError, match=r"L0\d.attn_out"):
        checked(trainer, gate, 4, batches(4), altered("o_proj.weight", change=lambda w: w * 1.5))


def test_an_addition_that_rounding_swallows_passes():
    """A thousandth of the stream: in bf16 most elements of the sum are the stream's own."""
    trainer, gate = stand_in("bf16", "llama"), LiveGate(1, 3)
    trainer.params["model.embed_tokens.weight"][...] *= 1000
    for step in range(4):
        passed(trainer, gate, step, batches(step))
    stored = trainer.left["residual"].astype(np.float32)
    assert np.mean(stored[0] == stored[1]) > 0.5


def altered(*ends, change):
    """Parameters whose name ends like this, changed."""
    return Fault(params=lambda p: p | {n: change(p[n]) for n in p if n.endswith(ends)})


def config_with(**changes):
    return Fault(config=lambda c: dataclasses.replace(c, **changes))


def swapped(params):
    return {n.replace("gate_proj", "?").replace("up_proj", "gate_proj").replace("?", "up_proj"): a
            for n, a in params.items()}


def sees_the_next(left):
    """Attention in which each query sees one key too many."""
    c = FAMILIES["qwen2"]
    q, k, v = (np.float32(a).reshape(c.L * 4, T, -1, c.HS)
               for a in np.split(left["qkv"], [c.NH * c.HS, (c.NH + c.NKV) * c.HS], axis=2))
    out = attention_forward(np.concatenate([q[:, :1], q[:, :-1]], 1), k, v, c.HS**-0.5)[0]  # a query at its place + 1
    out[:, :-1] = out[:, 1:]
    left["atty"] = out.reshape(left["atty"].shape).astype(left["atty"].dtype)


def put(name, index, change):
    """A change of something that is left."""
    def left(arrays):
        arrays[name][index] = change(arrays[name][index])
    return Fault(left=left)


def scaled(buffer, factor):
    """The optimizer's state changed between `before` and the update."""
    def update(trainer, lr, norm):
        getattr(trainer, buffer)[...] *= np.float32(factor)
        return lr, norm
    return Fault(update=update)


def uncorrected(trainer, lr, norm):
    """AdamW without bias correction, which is a factor of lr."""
    c, t = trainer.config, trainer.step + 1
    return lr * (1 - c.beta1**t) / (1 - c.beta2**t)**0.5, norm


def stale_copy(trainer, lr, norm):
    trainer.left["copy"] = trainer.params_buf.copy()
    return lr, norm


def twice(grads):
    for array in grads.values():
        array *= 2


def decays_all(trainer):
    end = trainer.layout.decay_end
    trainer.params_buf[end:] *= np.float32(1 - LR * trainer.config.weight_decay)


def final_norm_of_one(left):
    stream = left["residual"][-1].astype(np.float32)
    left["final_norm"] = rmsnorm_forward(stream, np.ones(stream.shape[1], np.float32), 1e-6)[0].astype(
        left["final_norm"].dtype)


FAULTS = {
    "embedding of the token before": (put("residual", 0, lambda a: np.roll(a, 1, 0)), "embedding"),
    "q bias dropped": (altered("q_proj.bias", change=np.zeros_like), r"L0\d.q_rope"),
    "k bias dropped": (altered("k_proj.bias", change=np.zeros_like), r"L0\d.k_rope"),
    "v bias dropped": (altered("v_proj.bias", change=np.zeros_like), r"L0\d.v_bias"),
    "eps": (config_with(rms_norm_eps=1e-4), r"L0\d.v_bias"),
    "theta": (config_with(rope_theta=1e4), r"L0\d.q_rope"),
    "a mask off by one": (Fault(left=sees_the_next), r"L0\d.attn_heads"),
    "attention not a number": (put("atty", np.s_[:], lambda a: a * np.nan), r"L0\d.attn_heads"),
    "an output projection of 1 % too much": (altered("o_proj.weight", change=lambda w: w * 1.01), r"L0\d.attn_out"),
    "attention lost to the stream": (put("residual", np.s_[1::2], lambda a: a * 0), r"L0\d.attn_out"),
    "gate for up": (Fault(params=swapped), r"L0\d.ffn_out"),
    "a gain of the final norm": (Fault(left=final_norm_of_one), "final_norm"),
    "losses off by a row": (put("losses", np.s_[:], lambda a: np.roll(a, 1)), "loss of position"),
    "a loss in five left over": (put("losses", np.s_[::5], lambda a: a * 0 + 4.0), "loss of position"),
    "a table that something else wrote": (altered("embed_tokens.weight", change=lambda w: w * 1.1), "embedding"),
    "gradients added twice": (Fault(grads=twice), r"L0\d.gate_up weight gradient"),
    "m": (scaled("m_buf", 1.001), "AdamW's m of"),
    "v": (scaled("v_buf", 0.999), "AdamW's v of"),
    "a weight that something else wrote": (scaled("params_buf", 1.0001), "update of"),
    "no bias correction": (Fault(update=uncorrected), "update of"),
    "another lr": (Fault(update=lambda _t, lr, norm: (1.001 * lr, norm)), "update of"),
    "no clipping": (Fault(update=lambda _t, lr, _norm: (lr, 0.5)), "AdamW's m of"),
    "decay of norms and biases": (Fault(after=decays_all), "update of"),
    "the copy of before": (Fault(update=stale_copy), "copy of"),
}


@BOTH
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_and_named(fault, precision):
    trainer, gate = stand_in(precision, max_grad_norm=0.5), LiveGate(1, 3)
    for step in range(2):
        checked(trainer, gate, step, batches(step))
    planted, stage = FAULTS[fault]
    with pytest.raises(GateError, match=rf"^INV-TRAIN-PARITY {stage}.* at step 2, layer \d, sequence \d") as caught:
        checked(trainer, gate, 2, batches(2), planted)
    assert caught.value.exit_code == 5


@BOTH
@pytest.mark.parametrize(("family", "end", "stage"), [
    ("llama", "lm_head.weight", "loss of position"), ("qwen3", "q_norm.weight", r"L0\d.q_rope"),
    ("qwen3", "k_norm.weight", r"L0\d.k_rope"), ("llama", "post_attention_layernorm.weight", r"L0\d.ffn_out"),
    ("llama", "down_proj.weight", r"L0\d.ffn_out"), ("qwen3", "model.norm.weight", "final_norm")])
def test_a_weight_of_any_family_is_caught_and_named(precision, family, end, stage):
    trainer, gate = stand_in(precision, family), LiveGate(1, 3)
    with pytest.raises(GateError, match=f"^INV-TRAIN-PARITY {stage}"):
        checked(trainer, gate, 0, batches(0), altered(end, change=lambda w: w * 1.1))


@BOTH
def test_the_sum_of_the_losses_is_that_of_the_rows(precision):
    """Rows that nobody looks at by themselves, as those of another sequence are."""
    trainer, gate = stand_in(precision), LiveGate(1, 3)
    gate.before(trainer, 0, batches(0))
    begin = gate.taken.sequence * T
    def left(arrays):
        arrays["losses"][:begin] *= 1.01
        arrays["losses"][begin + T:] *= 1.01
    trainer.fault = Fault(left=left)
    trainer.train_batch(batches(0), LR)
    with pytest.raises(GateError, match="INV-TRAIN-PARITY sum of the losses "):
        gate.after(trainer, 0, LR)


@BOTH
def test_targets_that_do_not_count_and_a_rate_of_zero_pass(precision):
    trainer, gate = stand_in(precision), LiveGate(1, 3)
    whole = random_batch(1, 4, T)
    targets = whole.targets.copy()
    targets[:, ::2] = IGNORE
    gate.before(trainer, 0, [LMBatch(whole.inputs, targets)])
    trainer.train_batch([LMBatch(whole.inputs, targets)], 0.0)
    assert gate.after(trainer, 0, 0.0)["event"] == "parity"


def test_a_step_that_applied_nothing_is_left_to_other_guards():
    trainer, gate = stand_in("fp32"), LiveGate(1, 3)
    assert passed(trainer, gate, 0, batches(0), altered("norm.weight", change=lambda w: w * np.nan)) is None
    blank = [LMBatch(b.inputs, np.full_like(b.targets, IGNORE)) for b in batches(1)]
    assert passed(trainer, gate, 1, blank) is None and trainer.step == 0


def test_a_trainer_that_shows_nothing_is_not_passed():
    trainer = TransformerTrainer.new(FAMILIES["llama"], train_config())
    with pytest.raises(MeasureError, match="INV-TRAIN-PARITY at step 0"):
        LiveGate(1, 3).before(trainer, 0, batches(0))


def test_every_kth_step_is_due_and_the_first_of_a_process():
    gate = LiveGate(4, 0)
    assert gate.due(3)
    trainer = stand_in("fp32")
    checked(trainer, gate, 3, batches(3))
    assert [s for s in range(4, 17) if gate.due(s)] == [4, 8, 12, 16]


def test_what_is_looked_at_depends_on_seed_and_step_alone():
    places = []
    for seed in (3, 3, 4):
        trainer, gate = stand_in("fp32"), LiveGate(2, seed)
        events = [checked(trainer, gate, step, batches(step)) for step in (0, 2, 4, 6)]
        places.append([(e["layer"], e["sequence"], e["positions"]) for e in events])
        assert {layer for layer, _, _ in places[-1][:2]} == {0, 1}  # in turns
    assert places[0] == places[1] != places[2]


@BOTH
def test_looking_changes_nothing(precision):
    plain, watched, gate = stand_in(precision), stand_in(precision), LiveGate(1, 3)
    for step in range(4):
        plain.train_batch(batches(step), LR)
        checked(watched, gate, step, batches(step))
    assert plain.parameters_sha256() == watched.parameters_sha256()
    assert plain.optimizer_state_sha256() == watched.optimizer_state_sha256()


@pytest.mark.parametrize(("rows", "passes"), [([1.0, 1.0], True), ([1.0, 1.1], False), ([1.0, np.nan], False)])
def test_rows_count_alike(rows, passes):
    """Rows of ordinary size beside a huge one are judged by their own."""
    want = np.array([[1e6] * 8, [1.0] * 8, [2.0] * 8])
    judge, got = Judge("here"), want * np.array([*rows, rows[1]])[:, None]
    if not passes:
        assert not relative(got, want)[0] > 1e-6
        with pytest.raises(GateError, match="INV-TRAIN-PARITY stage here"):
            judge.hold("stage", got, want, Limit(1e-2, 1e-2))
    else:
        judge.hold("stage", got, want, Limit(1e-2, 1e-2))
