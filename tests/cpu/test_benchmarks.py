"""The benchmarks of kernels without a GPU: imports, formulas against the headers of the .cu files, launches, turns."""

import csv
import importlib
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apr import driver, kernel
from apr.device import Device
from apr.tools import timing

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_all  # noqa: E402
import bench_decode  # noqa: E402
import bench_pretrain  # noqa: E402
import bench_step  # noqa: E402
import harness  # noqa: E402
import loss_curve  # noqa: E402
import step_sweep  # noqa: E402

OPS = {module.__name__.removeprefix("bench_"): module for module in bench_all.MODULES}
ALL_CASES = [(op, case) for op, cases in bench_all.OPS.items() for case in cases()]
# What each formula says of the header of its kernel file, as "the words there: the terms that they mean".
QUOTES = {
    ("embedding", "forward_bytes"): ["forward 2NCs + 4N bytes: 2NCs + 4N"],
    ("embedding", "backward_bytes"): ["backward NCs + 8UC + 8N for U different tokens: NCs + 8UC + 8N"],
    ("embedding", "backward_flops"): ["backward NC: NC"],
    ("rmsnorm", "forward_bytes"): ["4NCs + 4N bytes with an update (2NCs without): 2NCs + 4N"],
    ("rmsnorm", "backward_bytes"): ["backward 5NCs + 4N + 4PC: 5NCs + 4N + 4PC - NCs",
                                    "weight_backward 4PC + 8C: 4PC + 8C"],
    ("rmsnorm", "forward_flops"): ["forward 5NC: 5NC"],
    ("rmsnorm", "backward_flops"): ["backward 12NC: 12NC"],
    ("residual", "forward_bytes"): ["forward 4NCs + 4N bytes with an update: 4NCs + 4N"],
    ("residual", "backward_bytes"): ["backward 5NCs + 4N + 4PC: 5NCs + 4N + 4PC", "weight_backward 4PC + 8C: 4PC + 8C"],
    ("residual", "forward_flops"): ["forward 5NC: 5NC"],
    ("residual", "backward_flops"): ["backward 12NC: 12NC"],
    ("linear", "bias_backward_bytes"): ["backward NOs + 4PO bytes: NOs + 4PO", "sum 4PO + 8O: 4PO + 8O"],
    ("linear", "bias_flops"): ["NO: NO"],
    ("rope", "forward_bytes"): ["forward, backward 2 N (NH+NKV) HS s bytes: 2 N (NH+NKV) HS s"],
    ("rope", "forward_flops"): ["3 N (NH+NKV) HS, with norms 8: 3 N (NH+NKV) HS"],
    ("attention", "forward_bytes"): ["forward 2BT(QKV + NH*HS): 2BT(QKV + NH*HS)"],
    ("attention", "backward_bytes"): ["delta 4BT*NH*HS: 4BT*NH*HS",
                                      "dkv and dq 2BT(QKV + NH*HS) and what each writes: 4BT(QKV + NH*HS) + 2BT*QKV"],
    ("attention", "forward_flops"): ["B*NH*HS*T^2 times 2 (forward), 4 (dkv), 3 (dq): 2*B*NH*HS*T^2"],
    ("attention", "backward_flops"): ["score and dprob twice: 4*B*NH*HS*T^2 + 3*B*NH*HS*T^2 - 2*B*NH*HS*T^2"],
    ("swiglu", "forward_bytes"): ["forward 3NFs bytes: 3NFs"],
    ("swiglu", "backward_bytes"): ["backward 6NFs, s = bytes of floatX: 6NFs"],
    ("swiglu", "forward_flops"): ["forward 5NF: 5NF"],
    ("swiglu", "backward_flops"): ["backward 11NF: 11NF"],
    ("cross_entropy", "forward_bytes"): ["forward NVs bytes: NVs"],
    ("cross_entropy", "backward_bytes"): ["forward_backward 2NVs: 2NVs"],
    ("cross_entropy", "flops"): ["about 10NV: 10NV"],
    ("adamw", "update_bytes"): ["update 28 bytes per parameter, 30 with a bf16 copy: 28 size + 2 size copy"],
    ("adamw", "flops"): ["about 15 per parameter: 15 size"],
    ("global_norm", "norm_bytes"): ["4 size bytes: 4 size"],
    ("global_norm", "flops"): ["2 size: 2 size"],
    ("decode_linear", "weight_bytes"): ["OIs bytes of weights once, for all B inputs: OIs"],
    ("decode_linear", "flops"): ["2BOI: 2BOI"],
    ("decode_attention", "attention_bytes"): ["2 T NKV HS s bytes per sequence: 2 T NKV HS s"],
    ("decode_attention", "attention_flops"): ["4 T NH HS per sequence: 4 T NH HS"],
    ("sampling", "greedy_bytes"): ["8 B BESTS bytes: 8 B BESTS"],
    ("sampling", "drawn_bytes"): ["where it draws, 4 B V bytes 2 to 11 times: 4 B V"],
}
SOURCES = {"residual": "rmsnorm.cu"}
VALUES = {"N": 11, "C": 13, "F": 17, "U": 5, "V": 19, "P": 7, "O": 23, "I": 29, "B": 3, "T": 31, "NH": 6, "NKV": 2,
          "HS": 8, "QKV": 80, "BESTS": 41, "s": 2, "size": 37, "copy": 1}


def evaluate(terms: str) -> int:
    """The value of "2NCs + 4N": symbols side by side are multiplied."""
    tokens = re.findall(r"size|copy|BESTS|QKV|NKV|NH|HS|\d+|[A-Z]|s|[-+*^()]", terms)
    assert "".join(tokens) == terms.replace(" ", "")
    text = ""
    for before, token in zip(["+", *tokens], tokens, strict=False):
        text += "*" if before not in "+-*^(" and token not in "+-*^)" else ""
        text += "**" if token == "^" else str(VALUES.get(token, token))
    return eval(text)


def header(source: str) -> str:
    """The comment at the top of a kernel file, on one line."""
    lines = (ROOT / "kernels" / source).read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("//").strip() for line in lines if line.startswith("//"))


@pytest.mark.parametrize(("op", "formula"), QUOTES)
def test_formulas_are_those_of_the_headers(op, formula):
    function, text = getattr(OPS[op], formula), header(SOURCES.get(op, f"{op}.cu"))
    quotes = [quote.rsplit(": ", 1) for quote in QUOTES[op, formula]]
    assert [words for words, _ in quotes if words not in text] == []
    symbols = {name: VALUES[name] for name in inspect.signature(function).parameters}
    assert function(**symbols) == sum(evaluate(terms) for _, terms in quotes)


def test_every_formula_is_checked():
    """But those of the products, which no kernel of ours does."""
    named = {(op, name) for op, module in OPS.items() for name, value in vars(module).items()
             if name.endswith(("bytes", "flops")) and getattr(value, "__module__", "") == module.__name__}
    products = {("linear", name) for name in ("forward_bytes", "dweight_bytes", "flops")}
    same = {("rope", "backward_bytes"), ("rope", "backward_flops")}
    assert OPS["rope"].backward_bytes is OPS["rope"].forward_bytes
    assert named - products - same == set(QUOTES)
    assert evaluate("2NCs + 4N") == 2 * 11 * 13 * 2 + 44 and evaluate("T^2") == 961


def test_attention_in_f32_moves_twice_the_bytes():
    text = header("attention_f32.cu")
    assert "forward 4BT(QKV + NH*HS), delta 8BT*NH*HS, dkv and dq 4BT(QKV + NH*HS)" in text
    for formula in (OPS["attention"].forward_bytes, OPS["attention"].backward_bytes):
        assert formula(3, 31, 6, 2, 8, 4) == 2 * formula(3, 31, 6, 2, 8, 2)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_cases_of_both_models(op):
    cases = OPS[op].cases()
    assert len({(c.name, c.dtype) for c in cases}) == len(cases)
    assert all(c.bytes > 0 and c.flops >= 0 and c.dtype in ("bf16", "f32") and len(c.name) < 30 for c in cases)
    assert all(any(model in c.name for c in cases) for model in harness.MODELS)
    assert all(c.flops > 0 for c in cases if c.compute)


@pytest.mark.parametrize("op", [*OPS, "all"])
def test_without_a_gpu_it_is_one_line_and_exit_code_9(op, monkeypatch, capsys):
    monkeypatch.setattr(driver, "probe", lambda: driver.DriverInfo(False, "no driver here", "", ()))
    assert importlib.import_module(f"bench_{op}").main(["--quick"]) == 9
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("apr: ") and err.count("\n") == 1 and "no driver here" in err


def test_a_script_alone_imports_neither_cupy_nor_torch():
    code = ("import sys; sys.modules.update(cupy=None, torch=None); sys.path.insert(0, 'benchmarks')\n"
            "import bench_all; raise SystemExit(bench_all.main([]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (9, "", 1), done.stderr


class FakeArray:
    """What ops ask of a CuPy array, with no memory."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self.itemsize = tuple(shape), np.dtype(dtype), np.dtype(dtype).itemsize
        self.size, self.flags = math.prod(shape), SimpleNamespace(c_contiguous=True)
        self.nbytes, self.data = self.size * self.itemsize, FakePointer()


class FakePointer:
    """Memory that is nowhere."""

    ptr = 4096

    def __add__(self, offset):
        return self

    def copy_from_device_async(self, source, size, stream):
        assert isinstance(source, FakePointer) and size > 0


class FakeDevice:
    """A Device that checks launches as apr/kernel.py does, and keeps what happened, and when."""

    name, ordinal, fast, sm_count = "NVIDIA H200", 0, frozenset(kernel.FAST_PATHS), 132

    def __init__(self):
        self.events, self.stream = [], "stream"
        runtime = SimpleNamespace(Event=lambda: SimpleNamespace(record=lambda s: self.events.append("event")),
                                  get_elapsed_time=lambda a, b: 0.25)
        self.cupy = SimpleNamespace(cuda=runtime, __version__="14")

    def launch(self, spec, baked, grid, block, args, shared=0, programmatic=False, cluster=None):
        spec.check_baked(baked)
        checks = [kernel._argument(arg, str(baked["FLOATX"])) for arg in spec.args]
        assert len([check(spec.entry, arg) for check, arg in zip(checks, args, strict=True)]) == len(args)
        assert min(grid) > 0 and math.prod(block) <= 1024
        self.events.append(spec.entry)

    def empty(self, shape, dtype):
        return FakeArray(shape, kernel.DEVICE_DTYPES[dtype])

    def mapped(self, shape, dtype):
        return np.zeros(shape, kernel.DEVICE_DTYPES[dtype]), self.empty(shape, dtype)

    def upload(self, array, host):
        assert host.size == array.size

    def fill(self, array, byte):
        self.events.append("flush")

    def synchronize(self):
        pass


class FakeGemm:
    """Products whose shapes are checked."""

    def __init__(self, dev, workspace):
        self.dev = dev

    def linear(self, out, inp, weight, bias=None):
        assert bias is None or bias.shape == (out.shape[1],)
        assert (out.shape[0], inp.shape[1]) == (inp.shape[0], weight.shape[1]) and out.shape[1] == weight.shape[0]
        self.dev.events.append("linear")

    def linear_dinp(self, dinp, dout, weight):
        self.linear(dout, dinp, weight)

    def linear_dweight(self, dweight, dout, inp, *, add):
        assert add and dweight.dtype == np.float32
        self.linear(dout, inp, dweight)


@pytest.fixture
def bench(monkeypatch):
    """A Bench on a GPU that is not there."""
    monkeypatch.setattr(timing, "Gemm", FakeGemm)
    monkeypatch.setattr(timing, "BLOCK", 1 << 20)
    monkeypatch.setattr(driver, "tensor_map", lambda *_: bytes(driver.MAP_BYTES))
    return harness.Bench(FakeDevice(), quick=True)


@pytest.mark.parametrize(("op", "case"), ALL_CASES, ids=lambda x: x if isinstance(x, str) else f"{x.name} {x.dtype}")
def test_launches_fit_their_kernels(op, case, bench):
    work = case.setup(bench)
    bench.dev.events.clear()
    work.launch()
    assert bench.dev.events
    if work.reset is not None:
        work.reset()


def test_fake_devices_have_what_real_ones_have():
    methods = {name for name in vars(FakeDevice) if not name.startswith("_")} - {"name", "ordinal", "fast", "sm_count"}
    assert methods <= set(dir(Device))


def test_repetitions_are_in_turns_after_a_reset_and_a_flush():
    dev = FakeDevice()
    log = dev.events
    timings = harness.measure_in_turns(dev, [lambda: log.append("ours"), lambda: log.append("peer")], quick=True,
                                       reset=lambda: log.append("reset"))
    assert timings == [harness.Timing(250.0, 250.0, 250.0)] * 2
    order = [e for i, e in enumerate(log) if e != "flush" or log[i - 1] != "flush"][8:]  # after the warm-up
    turn = ["reset", "flush", "event", "ours", "event", "flush", "event", "peer", "event"]
    assert len(order) >= 5 * len(turn) and order == turn * (len(order) // len(turn))


def test_a_report_is_a_table_and_rows_and_survives_a_case_that_fails(bench, tmp_path, capsys):
    def broken(b):
        raise ValueError("no such thing")
    good = harness.Case("forward x", "bf16", 10**9, 10**12, lambda b: harness.Work(
        lambda: None, lambda p: {"torch eager": lambda: lambda: None, "flash": lambda: 1 / 0}))
    bench.peers = SimpleNamespace(torch=SimpleNamespace(__version__="2", cuda=SimpleNamespace(empty_cache=int)))
    ops = {"some": [good, harness.Case("other", "f32", 1, 1, broken)], "more": [good]}
    assert harness.report(bench, ops, tmp_path) == 1
    out, err = capsys.readouterr()
    assert "torch eager" in out and "1.00" in out and "no peer 'flash'" in err and "some other f32: ValueError" in err
    assert harness.report(bench, {"some": [good]}, tmp_path) == 0
    rows = (tmp_path / "nvidia-h200" / "some.csv").read_text().splitlines()
    assert rows[0] == ",".join(harness.COLUMNS) and len(rows) == 3 and (tmp_path / "nvidia-h200" / "more.csv").exists()
    row = dict(zip(harness.COLUMNS, rows[1].split(","), strict=True))
    assert row["us"] == "250.0" and row["gbps"] == "4000.0" and row["tflops"] == "4000.0" and row["ratio"] == "1.0"


def test_rows_of_whole_steps_stay_under_their_columns(tmp_path):
    """A row without a peer, then one with everything: each value under its own name."""
    whole = {name: i for i, name in enumerate(bench_step.COLUMNS)} | {"gpu": "Some GPU", "ours_ms": 1 / 3}
    alone = {name: value for name, value in whole.items() if "peer" not in name and "first" not in name}
    for row in (alone, whole):
        bench_step.record(row, tmp_path)
    with open(tmp_path / "some-gpu" / "step.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert second == {name: str(value) for name, value in whole.items()} | {"ours_ms": "0.33333"}
    assert first == {name: second[name] if name in alone else "" for name in bench_step.COLUMNS}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results" / "nvidia-h200").glob("*.csv")),
                         ids=lambda p: p.stem)
def test_kept_rows_have_the_columns_of_today(path):
    others = {"step": bench_step.COLUMNS, "step_groups": bench_step.GROUP_COLUMNS, "step_sweep": step_sweep.COLUMNS,
              "decode": bench_decode.COLUMNS, "pretrain": bench_pretrain.COLUMNS, "loss_curve": loss_curve.COLUMNS}
    columns = others.get(path.stem, harness.COLUMNS)
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == columns and len(rows) > 1 and all(len(row) == len(columns) for row in rows)
