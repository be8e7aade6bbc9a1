"""`apr bench` and what it shares with the benchmarks, without a GPU: costs, floors, timed launches, rows, refusals."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from apr import registry
from apr.buffers import PARTS
from apr.cli import bench as command
from apr.cli.main import main
from apr.device import Device
from apr.driver import DriverInfo
from apr.params import layout, param_specs
from apr.presets import llama_370m, qwen2_0_5b, qwen2_7b, qwen3_0_6b, tiny
from apr.tools import bench, device, timed_device
from apr.tools.step_cost import PASSES, Cost, floors, flops_per_token, matrices, step_costs
from apr.tools.timed_device import TimedDevice, by_name, group_of

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
RATES = {"copy": 4e12, "bf16": 8e14, "f32": 5e13}
N, B, T = 16384, 8, 2048


def test_flops_of_a_token_are_those_that_others_count():
    assert flops_per_token(qwen2_0_5b, 2048) == 6 * 493_961_216 + 129_024 * 2048
    assert llama_370m.V == 50257 and llama_370m.tie_word_embeddings
    assert flops_per_token(tiny, 8) == 6 * (1000 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 256)) + 6 * 2 * 64 * 8  # untied


def formula(op, name, **symbols):
    return getattr(importlib.import_module(f"bench_{op}"), name)(**symbols)


def test_bytes_of_groups_are_those_of_the_benchmarks_of_single_ops():
    """Whose formulas are held against the headers of the kernels."""
    c, costs = qwen2_0_5b, step_costs(qwen2_0_5b, B, T, "bf16")
    total = {group: sum(cost.bytes * cost.count for cost in of) for group, of in costs.items()}
    size = layout(c).size
    assert total["swiglu"] == c.L * sum(formula("swiglu", f"{d}_bytes", N=N, F=c.F, s=2) for d in
                                        ("forward", "backward"))
    assert total["rope"] == 2 * c.L * formula("rope", "forward_bytes", N=N, NH=c.NH, NKV=c.NKV, HS=c.HS, s=2)
    assert total["bias"] == c.L * formula("linear", "bias_backward_bytes", N=N, O=c.QKV, P=PARTS, s=2)
    norm = formula("rmsnorm", "forward_bytes", N=N, C=c.C, s=2) + formula("rmsnorm", "backward_bytes", N=N, C=c.C,
                                                                        P=PARTS, s=2)
    both = formula("residual", "forward_bytes", N=N, C=c.C, s=2) + formula("residual", "backward_bytes", N=N, C=c.C,
                                                                         P=PARTS, s=2)
    assert total["norm + residual"] == norm + 2 * c.L * both
    assert total["AdamW"] == formula("adamw", "update_bytes", size=size, copy=size)
    assert total["gradient norm"] == formula("global_norm", "norm_bytes", size=size)
    assert total["memset"] == 4 * sum(p.size for p in param_specs(c) if not p.decay)
    assert total["attention forward"] == c.L * formula("attention", "forward_bytes", B=B, T=T, NH=c.NH, NKV=c.NKV,
                                                       HS=c.HS, s=2)
    for direction in ("forward", "backward"):
        flops = sum(cost.flops * cost.count for cost in costs[f"attention {direction}"])
        assert flops == c.L * formula("attention", f"{direction}_flops", B=B, T=T, NH=c.NH, HS=c.HS)


def test_gradients_are_set_but_for_what_adds_to_them():
    tied, untied = (step_costs(c, B, T, "bf16") for c in (qwen2_0_5b, qwen2_7b))
    c = qwen2_7b  # whose table is not its head
    vectors = sum(p.size for p in param_specs(c) if not p.decay)
    assert [cost.bytes for cost in untied["memset"]] == [4 * (vectors + c.Vp * c.C)]
    c = qwen2_0_5b
    forward, dweight = ([cost.bytes for cost in tied[f"products {name}"]] for name in ("forward", "dweight"))
    weights = [c.C * c.QKV, c.NH * c.HS * c.C, 2 * c.C * c.F, c.F * c.C, *[c.C * c.Vp] * 4]
    assert [(b - a) // w for a, b, w in zip(forward, dweight, weights, strict=True)] == [2] * 5 + [6] * 3


def test_flops_of_all_groups_are_those_of_the_tokens_and_of_padding():
    for c in (qwen2_0_5b, llama_370m):
        flops = sum(cost.flops * cost.count for of in step_costs(c, B, T, "bf16").values() for cost in of)
        padding = 6 * (c.Vp - c.V) * c.C
        backward = 1 * c.L * c.NH * c.HS * T  # 2 + 5 halves are counted here, 6 in MFU
        assert flops == N * (flops_per_token(c, T) + padding + backward)


def test_a_floor_is_the_larger_of_two_and_products_of_few_rows_are_bound_by_bytes():
    assert Cost(4 * 10**12, 8 * 10**14).ms(RATES, "bf16") == 1000.0
    assert Cost(4 * 10**12, 16 * 10**14, 3).ms(RATES, "bf16") == 6000.0
    assert "bias" not in step_costs(llama_370m, B, T, "bf16")
    assert [n for name, n, *_ in matrices(qwen2_0_5b, N, 2) if name == "head"] == [4096] * 4
    wide, narrow = (floors(step_costs(qwen2_0_5b, b, t, "bf16"), RATES, "bf16") for b, t in ((8, 2048), (1, 16)))
    assert 2.1 > narrow["products dweight"] / narrow["products forward"] > 1.9
    assert wide["products forward"] < 1.3 * N * 2 * 493_961_216 / 8e14 * 1e3
    assert set(wide) == set(narrow)


@pytest.mark.parametrize(("config", "storage"), [(qwen2_0_5b, "bf16"), (qwen3_0_6b, "f32"), (llama_370m, "bf16")])
def test_every_kernel_of_a_step_has_a_group_with_a_floor(config, storage):
    costs = step_costs(config, B, T, "bf16" if storage == "bf16" else "fp32")
    for spec, _ in registry.variants(config, storage):
        assert group_of(f"{spec.entry} of {spec.source.removesuffix('.cu')}-X=1-sm_90a-00") in costs
    assert [group_of(f"1152x16384x896-{letters}-bf16-bf16-0") for letters in ("TN", "NN", "NT")] == [
        f"products {name}" for name in PASSES]
    assert group_of("attention_backward_x of attention_sm90-HS=64-sm_90a-00") == "attention backward"
    assert group_of("f of something_new-HS=64-sm_90a-00") == "something_new"
    assert set(bench.OPS) <= set(costs) | {"bias"}


@pytest.fixture
def timed(monkeypatch):
    """A TimedDevice whose base only keeps what happens; events are numbered, a number is a millisecond."""
    log = []

    class Event:
        def record(self, stream):
            self.number = len(log)
            log.append("event")

    cuda = SimpleNamespace(Event=Event, get_elapsed_time=lambda a, b: float(b.number - a.number))

    def init(self, ordinal=0, folder=None, warn=None):
        self.cupy, self.stream, self.name = SimpleNamespace(cuda=cuda), "stream", "NVIDIA H200"
    for name, body in {"__init__": init, "launched": lambda self, name: None, "empty": lambda self, *a: "array",
                       "synchronize": lambda self: None, "upload": lambda self, a, h: log.append("upload"),
                       "fill": lambda self, a, b: log.append("fill"),
                       "launch": lambda self, name, *a: (log.append("launch"), self.launched(name))}.items():
        monkeypatch.setattr(Device, name, body)
    dev = TimedDevice()
    dev.log = log
    return dev


def test_launches_are_timed_and_the_gpu_waits_for_the_host(timed):
    timed.launch("a")
    timed.fill(0, 0)
    assert timed.times() == [] and timed.log == ["launch", "fill"]
    timed.timing, timed.hold, timed.busy = True, 2.5, ("array", 1.0)
    timed.log.clear()
    timed.upload(0, 0)
    timed.fill(0, 0)
    timed.upload(0, 0)
    timed.launch("a")
    timed.launched("b")
    assert timed.log == ["upload", "event", "fill", "event", "upload", "fill", "fill", "fill", "event", "launch",
                         "event", "event"]
    assert timed.times() == [("memset", 2.0), ("a", 2.0), ("b", 1.0)] and timed.times() == []


def test_the_step_is_timed_without_graphs_and_everything_is_put_back(timed):
    def train(batch):
        timed.upload(0, 0)
        assert not trainer.graphs
        for name in ("x of rope-a", "1x1x1-TN-bf16-bf16-0"):
            timed.launch(name)
    trainer = SimpleNamespace(graphs=True, train_batch=train)
    rounds = timed_device.step_times(timed, trainer, ["batch"], 3)
    assert trainer.graphs and not timed.timing and timed.hold == 0 and timed.busy is None
    assert by_name(rounds, group_of) == {"rope": (2.0, 1), "products forward": (2.0, 1)}
    assert by_name([[("a", 1.0)], [("a", 5.0), ("b", 4.0)], [("a", 3.0)]], str) == {"a": (3.0, 1.0),
                                                                                    "b": (0.0, 1 / 3)}


class FakeTrainer:
    """Takes 3 GiB, 1 % more than planned."""

    graphs, arena = True, SimpleNamespace(plan=SimpleNamespace(bytes=int(3 * 2**30 / 1.01)))

    def __init__(self, dev):
        dev.held += 3 * 2**30
        self.steps = 0

    @classmethod
    def new(cls, model, config, dev):
        return cls(dev)

    @classmethod
    def with_model(cls, model, arrays, config, dev):
        assert arrays == "weights"
        return cls(dev)

    def train_batch(self, batch):
        self.steps += 1

    def start_batch(self, batch, lr):
        self.steps += 1
        return SimpleNamespace(result=lambda: None)


@pytest.fixture
def gpu(monkeypatch):
    """An H200 whose trainer is a fake and whose kernels take what is written here."""
    dev = SimpleNamespace(name="NVIDIA H200", held=2**30, fast=frozenset({"attention"}))
    dev.free_bytes = lambda: (150 * 2**30 - dev.held, 150 * 2**30)
    launches = [[("rmsnorm_forward of rmsnorm-a", 0.5)] * 2 + [("8192x8192x8192-TN-bf16-bf16-0", 2.0)]]
    monkeypatch.setattr(bench, "CudaTransformerTrainer", FakeTrainer)
    monkeypatch.setattr(bench, "step_times", lambda dev, trainer, batches: launches)
    monkeypatch.setattr(bench, "Lab", lambda dev: dev)
    monkeypatch.setattr(bench, "ceilings", lambda lab: RATES)
    monkeypatch.setattr(registry, "paths", lambda c, storage, fast: dict.fromkeys(fast, "sm_90a"))
    monkeypatch.setattr(command, "TimedDevice", lambda ordinal, warn: dev)
    monkeypatch.setattr(command, "choose_device", lambda word: SimpleNamespace(ordinal=0))
    return dev


SMALL = ["--preset", "tiny", "--batch-size", "2", "--seq-length", "16"]


def test_a_step_in_json_has_rate_memory_and_groups_beside_floors(gpu, capsys):
    assert main(["bench", "step", *SMALL, "--rounds", "2", "--steps", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    step, *groups = [json.loads(line) for line in out.splitlines()]
    assert step["gib"] == 3 and step["off_plan"] == pytest.approx(0.01, abs=1e-6) and step["context_gib"] == 1
    assert step["tok_s"] * step["ms"] == pytest.approx(32000) and step["paths"] == {"attention": "sm_90a"}
    assert step["mfu"] * 989.4e12 == pytest.approx(step["tok_s"] * flops_per_token(tiny, 16))
    by = {row["group"]: row for row in groups}
    assert by["norm + residual"]["ms"] == 1.0 and by["rope"]["ms"] == 0.0 and by["rope"]["floor_ms"] > 0
    assert by["attention forward"]["path"] == "sm_90a" and by["rope"]["path"] == "general"
    assert "rounds of 3 steps" in err and "NVIDIA H200" in err


def test_ops_are_listed_with_their_kernels_and_one_can_be_asked_for(gpu, capsys):
    assert main(["bench", "op", *SMALL, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["op"] for row in rows} == {"linear", "rmsnorm"}
    assert rows[0]["kernels"] == [{"kernel": "8192x8192x8192-TN-bf16-bf16-0", "launches": 1, "us": 2000.0,
                                   "tflops": pytest.approx(2 * 8192**3 / 2e-3 / 1e12)}]
    assert main(["bench", "op", "rmsnorm", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "rmsnorm_forward" in out and "2 x     500.0 us" in out and "8192" not in out


def test_a_step_for_people(gpu, capsys):
    assert main(["bench", "step", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "MFU = tokens/s" in out and "memory 3.00 GiB, planned 2.97 (+1.0%)" in out and "fused" in out
    assert "paths: attention sm_90a" in out


def test_generation(gpu, capsys, monkeypatch):
    monkeypatch.setattr(bench, "CudaEngine", lambda *arguments: "engine")
    monkeypatch.setattr(bench.decode_speed, "step_seconds", lambda *arguments: 0.5)
    monkeypatch.setattr(bench.decode_speed, "generate_seconds", lambda *arguments: 1.0)
    monkeypatch.setattr(bench.decode_speed, "first_seconds", lambda engine, prompt, repeats: (2.0, 1.5))
    assert main(["bench", "decode", "--preset", "tiny", "--batch-size", "2", "--json"]) == 0
    rows = {row["what"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["step"]["tok_s"] == 4 and rows["generate"]["tok_s"] == 2 and rows["first"]["tok_s"] == 256
    assert rows["step"]["of_roof"] == pytest.approx(rows["step"]["tok_s"] / rows["step"]["roof_tok_s"])


@pytest.mark.parametrize(("arguments", "says"), [
    (["step", "--preset", "nonesuch"], "nonesuch"), (["op", "nonesuch"], "known: "), (["op", "ropes"], "'rope'"),
    (["op", "--rounds", "2"], "rounds 2"), (["decode", "--seq-length", "8"], "apr bench step"),
    (["step", "--batch-size", "0"], "--batch-size"), (["step", "--seq-length", "99999"], "max_seq_len"),
    (["nonesuch"], "nonesuch"), (["step", "--device", "cpu"], "make bench"), (["step", "rope"], "apr bench op"),
    (["step", "--device", "gpu"], "--device")])
def test_bad_arguments_are_refused_with_2_before_a_gpu_is_looked_for(arguments, says, capsys):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err


@pytest.mark.parametrize("word", [None, "auto", "cuda:0"])
@pytest.mark.parametrize("what", ["step", "op", "decode"])
def test_without_a_gpu_it_is_one_line_and_9(what, word, monkeypatch, capsys):
    def choose(asked):
        return device.choose_device(asked, lambda: DriverInfo(False, "no driver here", "", ()))
    monkeypatch.setattr(command, "choose_device", choose)
    assert main(["bench", what, *(["--device", word] if word else [])]) == 9
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no driver here" in err
