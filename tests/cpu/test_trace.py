"""Traces: every point once, of all tokens, with the numbers of the pass; and a run that shows others is refused."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from models import FAMILIES, random_params, source_of

import apr.tools.trace as module
from apr.block import Batch, look_turned_back
from apr.config import IGNORE
from apr.errors import ConfigError, FormatError, MeasureError, ShapeError, UnavailableError
from apr.formats.model_file import save_model
from apr.formats.open_model import open_model
from apr.reference.model import loss_and_gradients, model_forward
from apr.reference.rope import rope_backward, rope_tables
from apr.taps import expected_gradient_names, expected_names
from apr.tools.device import Choice
from apr.tools.trace import Statistics, capture, check_tokens, prompt_tokens, statistics
from apr.tools.trace_points import all_points, parse_layers, parse_stages, point_shape, select
from apr.tools.weights import Weights
from apr.train.snapshot import sha256_of

TOKENS = [5, 80, 3, 44, 5, 96, 0]
CPU, GPU = Choice("cpu", 0, "fp32"), Choice("cuda", 0, "bf16")


def model(name, dtype="F32"):
    """A random model in memory, and its parameters."""
    params = random_params(FAMILIES[name], 5, dtype)
    return source_of(FAMILIES[name], params), params


def passes(params, config, tokens=TOKENS):
    """Every point of both passes, by the reference with whole gradients; and the mean loss."""
    seen, params = {}, {k: v.astype(np.float32) for k, v in params.items()}
    targets = np.array([[*tokens[1:], IGNORE]])
    dloss = 1 / (len(tokens) - 1)
    total = loss_and_gradients(params, {k: np.zeros_like(v) for k, v in params.items()}, config, np.array([tokens]),
                               targets, dloss, lambda name, array: seen.__setitem__(name, array.copy()))
    return seen, total * dloss


def test_statistics_are_numpys_over_the_finite_values():
    x = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    x[0, 0, :3] = 0, np.nan, -np.inf
    x[2, 4, 6], x[1, 0, 0] = 0, 1e-30  # which is no zero
    fine = x[np.isfinite(x)].astype(np.float64)
    s = statistics(x)
    assert (s.count, s.nan, s.inf, s.zeros) == (105, 1, 1, 2)
    np.testing.assert_allclose((s.mean, s.std, s.min, s.max),
                               (fine.mean(), fine.std(ddof=1), fine.min(), fine.max()), rtol=1e-12)


def test_statistics_are_accumulated_in_float64():
    s = statistics(np.array([2**24, 1, 1, 1, 1], np.float32))
    assert s.mean == (2**24 + 4) / 5
    ripple = statistics(np.tile(np.array([4096, 4097], np.float32), 50_000))
    assert ripple.mean == 4096.5 and abs(ripple.std - 0.5) < 1e-5


def test_statistics_of_little_or_nothing():
    assert statistics(np.array([3.0], np.float32)) == Statistics(1, 3.0, 0.0, 3.0, 3.0, 0, 0, 0)
    bad = statistics(np.array([np.nan, np.inf, np.nan], np.float32))
    assert bad == Statistics(3, None, None, None, None, 2, 1, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trace_holds_the_passes_numbers_of_all_tokens(name):
    source, params = model(name)
    names = all_points(source.config, True)
    trace = capture(source, CPU, TOKENS, names, names, backward=True)
    truth, loss = passes(params, source.config)
    assert list(trace.arrays) == list(trace.statistics) == list(truth) == names
    for key, array in truth.items():
        assert trace.arrays[key].dtype == np.float32 and (trace.arrays[key] == array).all(), key
        assert array.shape == point_shape(key, source.config, len(TOKENS)) and array.shape[1] == len(TOKENS)
        assert trace.statistics[key] == statistics(array)
    assert abs(trace.loss - loss) < 1e-12 and trace.tokens == tuple(TOKENS)
    assert (trace.device, trace.precision, trace.stored) == ("cpu", "fp32", ("F32",))
    forward = capture(source, CPU, TOKENS, [], expected_names(source.config.L, source.config.qk_norm))
    assert forward.loss is None and not forward.statistics
    assert all((array == truth[key]).all() for key, array in forward.arrays.items()) and len(forward.arrays) > 40


def test_only_what_is_asked_is_looked_at_and_kept():
    source, _ = model("qwen2")
    trace = capture(source, CPU, TOKENS, ["L01.ffn_norm", "logits"], ["L00.q_rope"])
    assert list(trace.statistics) == ["L01.ffn_norm", "logits"] and list(trace.arrays) == ["L00.q_rope"]


def test_the_model_is_never_whole_in_memory(tmp_path):
    """Nor are its gradients: a backward pass takes a few tensors beside the activations."""
    config = dataclasses.replace(FAMILIES["qwen2"], num_hidden_layers=24, hidden_size=128, intermediate_size=256)
    save_model(tmp_path / "m.apr", config, random_params(config, 1), "m")
    size = 4 * sum(p.size for p in random_params(config, 1).values())
    with open_model(tmp_path / "m.apr") as source:
        tracemalloc.start()
        capture(source, CPU, TOKENS, all_points(config, True), backward=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < size / 4, f"{peak} of {size}"


def test_the_weights_hash_is_the_trainers():
    source, params = model("qwen2", "BF16")
    trace = capture(source, CPU, TOKENS, ["logits"], hashed=True)
    assert trace.weights_sha256 == sha256_of({k: v.astype(np.float32) for k, v in params.items()})
    assert trace.stored == ("BF16",)


@pytest.mark.parametrize(("change", "says"), [
    (lambda names: names[:-1], "45 points, logits as number 45, found 44, the end"),
    (lambda names: [*names[:3], *names[4:]], "L00.k_linear as number 4, found 44, L00.v_linear"),
    (lambda names: [*names, "logits"], "the end as number 46, found 46, logits"),
    (lambda names: [n.replace("q_rope", "q_turned") for n in names], "L00.q_rope as number 11, .* L00.q_turned")])
def test_a_pass_that_shows_other_points_is_refused(monkeypatch, change, says):
    source, _ = model("qwen3")
    names = change(expected_names(2, True))
    monkeypatch.setattr(module, "model_forward", lambda *a: [a[-1](n, np.zeros(1)) for n in names])
    with pytest.raises(MeasureError, match=says) as caught:
        capture(source, CPU, TOKENS, [])
    assert caught.value.exit_code == 12


def test_a_point_of_the_last_token_alone_is_refused(monkeypatch):
    """Upstream laid such statistics beside those of all tokens, and looked for a fault that was none."""
    source, _ = model("llama")
    monkeypatch.setattr(module, "model_forward", lambda *a: model_forward(
        *a[:-1], lambda name, array: a[-1](name, array[:, -1:] if name == "L01.q_bias" else array)))
    with pytest.raises(ShapeError, match=r"L01.q_bias: expected \[1, 7, 4, 8\], all tokens, found \[1, 1, 4, 8\]"):
        capture(source, CPU, TOKENS, ["L01.q_bias"])
    capture(source, CPU, TOKENS, ["L01.q_rope"])


class Engine:
    """The GPU's, played by the reference: what it is asked is kept."""

    def __init__(self, source, device, precision, batch, longest):
        self.source, self.precision = source, precision
        Engine.made = (device, precision, batch, longest)

    def scores(self, prompts, cached, tap):
        Engine.asked = (prompts, cached)
        weights = Weights(self.source, self.precision)
        params = {n: weights.read(n) for n in self.source.shapes}
        model_forward(params, self.source.config, np.array(prompts), None, tap)


class Trainer:
    """The same of training."""

    @classmethod
    def with_model(cls, config, arrays, settings, device):
        Trainer.made = (config, arrays, settings, device)
        return cls()

    def gradients(self, batch, dloss, tap):
        config, arrays, _, _ = Trainer.made
        Trainer.asked = (batch, dloss)
        return loss_and_gradients(arrays, {k: np.zeros_like(v) for k, v in arrays.items()}, config, batch.inputs,
                                  batch.targets, dloss, tap)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is none."""
    monkeypatch.setattr(module, "CudaEngine", Engine)
    monkeypatch.setattr(module, "CudaTransformerTrainer", Trainer)
    monkeypatch.setattr(module, "Device", lambda ordinal: f"device {ordinal}")


def test_forward_on_a_gpu_is_a_prompt_in_one_pass(gpu):
    source, _ = model("qwen3")
    trace = capture(source, GPU, TOKENS, ["logits"], ["L00.q_norm"])
    assert Engine.made == ("device 0", "bf16", 1, 7) and Engine.asked == ([TOKENS], [7])
    assert (trace.device, trace.precision, trace.loss) == ("cuda:0", "bf16", None)
    assert trace.statistics["logits"].std > 0


def test_backward_on_a_gpu_is_training_without_an_update(gpu):
    source, params = model("qwen3")
    trace = capture(source, GPU, TOKENS, ["L01.dq_norm"], ["L01.dq_norm"], backward=True, device="mine")
    config, arrays, settings, device = Trainer.made
    assert (config, device) == (source.config, "mine") and arrays.keys() == params.keys()
    assert (settings.batch_size, settings.max_seq_len, settings.precision) == (1, 7, "bf16")
    assert Trainer.asked[0].targets.tolist() == [[*TOKENS[1:], IGNORE]] and Trainer.asked[1] == 1 / 6
    truth, loss = passes(params, source.config)
    assert abs(trace.loss - loss) < 1e-12 and (trace.arrays["L01.dq_norm"] == truth["L01.dq_norm"]).all()


class HostArena(dict):
    """Arrays by name."""

    def download(self, array):
        return array


def test_the_gpus_gradient_of_normalised_heads_is_that_of_the_rotated_ones_turned_back():
    """Its kernel has none to show, so block_backward turns it on the host; here with arrays that are there already."""
    c, rng, seen, t = FAMILIES["qwen3"], np.random.default_rng(3), {}, 6
    cos, sin = rope_tables(np.arange(9), c.HS, c.rope_theta, None, np.dtype(np.float32))
    dqkv = rng.standard_normal((2 * t, c.QKV)).astype(np.float32)
    arena = HostArena(cos=cos[:, 0], sin=sin[:, 0])
    look_turned_back(Batch(arena, None, arena, c, 2, t, seen.__setitem__), 1, dqkv)
    heads = dqkv.reshape(2, t, -1, c.HS)
    for name, part in (("L01.dk_norm", slice(c.NH, c.NH + c.NKV)), ("L01.dq_norm", slice(0, c.NH))):
        np.testing.assert_allclose(seen[name], rope_backward(heads[:, :, part], cos[:t], sin[:t]), rtol=1e-6, atol=1e-6)
    assert list(seen) == ["L01.dk_norm", "L01.dq_norm"] == expected_gradient_names(2, True)[14:16]


@pytest.mark.parametrize(("tokens", "backward", "says"), [
    ([], False, "1 to 64 of them, found 0"), ([1] * 65, False, "found 65"),
    ([1, 97], False, r"ids in \[0, 97\), found 97"), ([1, -1], False, "found -1"),
    ([1, 2, 3], True, "4 to 64 of them for a backward pass")])
def test_tokens_that_the_model_cannot_take(tokens, backward, says):
    with pytest.raises(ConfigError, match=says):
        check_tokens(FAMILIES["llama"], tokens, backward)


def test_bf16_on_the_cpu_is_refused():
    with pytest.raises(UnavailableError, match="fp32 on the CPU"):
        capture(model("llama")[0], Choice("cpu", 0, "bf16"), TOKENS, [])


def test_a_model_without_a_tokenizer_gets_random_ids_and_says_so():
    source, _ = model("qwen2")
    ids, origin = prompt_tokens(source, None)
    assert len(ids) == 16 and len(set(ids)) > 8 and "random" in origin and prompt_tokens(source, None)[0] == ids
    with pytest.raises(FormatError, match="tokenizer"):
        prompt_tokens(source, "text")


def test_stages_and_layers_are_chosen_by_name():
    c = dataclasses.replace(FAMILIES["qwen3"], num_hidden_layers=5)
    assert select(c, None, None, False) == expected_names(5, True)
    assert select(c, None, None, True) == all_points(c, True)
    assert select(c, {"attn_norm", "dlogits", "dq_rope", "embedding"}, range(1, 3), True) == [
        "embedding", "L01.attn_norm", "L02.attn_norm", "dlogits", "L02.dq_rope", "L01.dq_rope"]
    assert parse_stages("attn_norm, dq_rope", c, True) == {"attn_norm", "dq_rope"}
    assert parse_stages("all", c, False) is None
    assert parse_layers("1..3", c) == range(1, 4) and parse_layers("4", c) == range(4, 5)


@pytest.mark.parametrize(("text", "backward", "says"), [
    ("attn_nrm", False, "did you mean 'attn_norm'"), ("dattn_nrm", True, "did you mean 'dattn_norm'"),
    ("", False, "known: all, attn_heads"), ("q_norm", False, "Qwen3"), ("dlogits", False, "add --backward"),
    ("attn_norm,,logits", False, "found ''"), ("L00.attn_norm", False, "attn_norm"), ("All", False, "'all'")])
def test_a_stage_that_is_none_is_refused(text, backward, says):
    with pytest.raises(ConfigError, match=says):
        parse_stages(text, FAMILIES["llama"], backward)


@pytest.mark.parametrize("text", ["", "2", "0..2", "1..0", "-1", "0...1", "0..", "a", "0,1", "٠", "9" * 5000])
def test_layers_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="--layers"):
        parse_layers(text, FAMILIES["llama"])
