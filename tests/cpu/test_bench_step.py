"""The benchmarks of whole steps, whole runs and loss curves without a GPU: turns, rows, verdicts, processes."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apr import driver
from apr.errors import MeasureError, OutOfMemoryError
from apr.presets import qwen2_0_5b, tiny
from apr.tools.device import choose_device

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_pretrain  # noqa: E402
import bench_step  # noqa: E402
import first_step  # noqa: E402
import loss_curve  # noqa: E402
import loss_judge  # noqa: E402
import step_peer  # noqa: E402
import step_sweep  # noqa: E402
from loss_judge import Curve  # noqa: E402

NONE = driver.DriverInfo(False, "no driver here", "", ())


@pytest.mark.parametrize(("module", "arguments"), [
    (bench_step, ["--rows"]), (bench_step, []), (bench_step, ["--sweep", "length"]), (bench_step, ["--first-step"]),
    (bench_pretrain, []), (loss_curve, [])])
def test_without_a_gpu_it_is_one_line_and_exit_code_9(module, arguments, monkeypatch, capsys):
    monkeypatch.setattr(module, "choose_device", lambda word: choose_device(word, lambda: NONE))
    assert module.main(arguments) == 9
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("apr: ") and err.count("\n") == 1 and "no driver here" in err


class FakeOurs:
    """Our side: half a second a step; `log` keeps whose turn it was."""

    model, batch, length, precision, context_gib = tiny, 2, 16, "bf16", 0.5
    trainer = None

    def __init__(self, log=None, seconds=0.5, off=0.01):
        self.log, self.seconds, self.off = log if log is not None else [], seconds, off

    def round(self):
        self.log.append("ours")
        return self.seconds

    def memory(self):
        return {"gib": 1 + self.off, "plan_gib": 1.0, "off_plan": self.off}


class FakePeer:
    """The peer in a mode; reduce-overhead is the quicker."""

    def __init__(self, mode, log):
        self.mode, self.log, self.about = mode, log, {"peer_gib": 4.0, "torch": "2"}

    def round(self):
        self.log.append(self.mode)
        return 1.0 if self.mode == "default" else 0.75

    def close(self):
        self.log.append("closed")


def test_both_modes_take_turns_with_ours_and_the_faster_is_the_peer(monkeypatch):
    log = []
    monkeypatch.setattr(step_peer, "attempt", lambda mode, ours, steps: FakePeer(mode, log))
    args, ours = bench_step.parse(["--batch", "2", "--length", "16", "--rounds", "2"]), FakeOurs(log)
    turns = bench_step.compare(args, ours)
    assert log == ["ours", "default"] * 2 + ["closed"] + ["ours", "reduce-overhead"] * 2 + ["closed"]
    row = bench_step.row_of(args, ours, turns)
    assert row["mode"] == "reduce-overhead" and row["ratio"] == pytest.approx(1.5) and row["peer_gib"] == 4
    assert row["default_tok_s"] == 32 and row["reduce_overhead_tok_s"] == pytest.approx(32 / 0.75)
    assert row["ours_tok_s"] == 64 and row["ours_ms"] == row["ours_p80_ms"] == 500 and row["ours_gib"] == 1.01
    assert set(row) <= set(bench_step.COLUMNS)


def test_a_mode_that_cannot_is_left_out_and_ours_stands_alone(monkeypatch):
    log = []
    monkeypatch.setattr(step_peer, "attempt",
                        lambda mode, ours, steps: FakePeer(mode, log) if mode == "default" else None)
    args = bench_step.parse(["--rounds", "1"])
    assert list(bench_step.compare(args, FakeOurs(log))) == ["default"]
    args = bench_step.parse(["--rounds", "1", "--no-peer"])
    row = bench_step.row_of(args, FakeOurs(), bench_step.compare(args, FakeOurs()))
    assert "mode" not in row and "ratio" not in row and row["ours_ms"] == 500


def test_no_pytorch_here_is_no_peer_and_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert step_peer.attempt("default", FakeOurs(), 1) is None
    assert "no peer in mode default" in capsys.readouterr().err


def test_rows_are_processes_one_after_the_other(monkeypatch, capsys):
    seen = []

    def run(command, check):
        seen.append(command[2:])
        return SimpleNamespace(returncode=9 if "llama_370m" in command else 0)
    monkeypatch.setattr(subprocess, "run", run)
    given = ["--rounds", "3", "--rows", "qwen-1x512", "llama-8x2048", "--mode", "default"]
    rest = bench_step.without(given, "--rows", ["qwen-1x512", "llama-8x2048"])
    assert rest == ["--rounds", "3", "--mode", "default"]
    assert bench_step.run_rows(["qwen-1x512", "llama-8x2048"], rest) == 9
    assert seen == [[*bench_step.ROWS[name], *rest] for name in ("qwen-1x512", "llama-8x2048")]
    assert bench_step.run_rows([], []) == 9 and len(seen) == 2 + len(bench_step.ROWS)
    for name, arguments in bench_step.ROWS.items():
        assert bench_step.parse(arguments).first_step is (name == "first-step")
    assert bench_step.parse(["--rows"]).rows == []


def test_rows_and_their_groups_are_kept_and_shown(tmp_path, capsys):
    row = {"gpu": "NVIDIA H200", "preset": "tiny", "ours_mfu": 0.5}
    groups = [{"group": "rope", "path": "general", "ms": 2.0, "floor_ms": 1.0, "of_floor": 2.0},
              {"group": "other", "path": "general", "ms": 1.0, "floor_ms": None, "of_floor": None}]
    bench_step.show(row, groups)
    out = capsys.readouterr().out
    assert "MFU = tokens/s" in out and "3.000     1.000" in out
    bench_step.record(row, tmp_path, groups)
    bench_step.record(row, tmp_path)
    with open(tmp_path / "nvidia-h200" / "step_groups.csv", newline="") as file:
        kept = list(csv.DictReader(file))
    assert [(r["group"], r["floor_ms"], r["preset"]) for r in kept] == [("rope", "1", "tiny"), ("other", "", "tiny")]


def test_a_sweep_holds_memory_against_the_plan(monkeypatch, tmp_path, capsys):
    made = []

    def ours(dev, model, batch, length, precision, steps, weights):
        made.append((batch, length))
        if batch == 128:
            raise OutOfMemoryError("training", "much", "little", "lower it")
        return FakeOurs(off=0.04 if length == 8192 else -0.02)
    monkeypatch.setattr(step_sweep, "OurStep", ours)
    dev, about = SimpleNamespace(name="NVIDIA H200"), {"gpu": "NVIDIA H200", "preset": "tiny", "precision": "bf16"}
    said = []
    args = bench_step.parse(["--preset", "tiny", "--sweep", "batch", "--results", str(tmp_path)])
    assert step_sweep.sweep(args, dev, about, said.append) == 0 and len(said) == 1
    assert "within 3%" in capsys.readouterr().out
    args = bench_step.parse(["--preset", "tiny", "--sweep", "length", "--results", str(tmp_path)])
    assert step_sweep.sweep(args, dev, about, said.append) == 5
    assert "OFF THE PLAN: at most +4.00%, at 2 x 8192" in capsys.readouterr().out
    assert all(b * t == 16384 for b, t in step_sweep.SWEEPS["length"]) and made[:1] == [(1, 512)]
    with open(tmp_path / "nvidia-h200" / "step_sweep.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 7 + 5


def test_a_sweep_with_the_peer_says_its_rate(monkeypatch):
    monkeypatch.setattr(step_peer, "attempt", lambda mode, ours, steps: FakePeer(mode, []))
    ours = FakeOurs()
    ours.trainer = "in the way"
    row = step_sweep.peer_row(bench_step.parse([]), ours, 64.0)
    assert row == {"peer_tok_s": 32.0, "ratio": 2.0, "torch": "2"} and ours.trainer is None


def test_first_steps_are_of_fresh_processes_with_folders_of_their_own(monkeypatch, capsys):
    seen = []

    def run(command, env, **options):
        side = command[command.index("--one-step") + 1]
        seen.append((side, env["APR_CACHE_DIR"], env["TORCHINDUCTOR_CACHE_DIR"], env["TRITON_CACHE_DIR"]))
        if side == "default" and len(seen) == 4:
            raise subprocess.CalledProcessError(1, command, stderr="a\nno memory")
        return SimpleNamespace(stdout=f"x\n{first_step.time.time() + 10}\n")
    monkeypatch.setattr(subprocess, "run", run)
    found = first_step.first_steps(bench_step.parse([]), lambda text: None)
    assert set(found) == {"first_step_cold_s", "first_step_warm_s", "peer_first_step_cold_s", "mode"}
    assert found["first_step_cold_s"] == pytest.approx(10, abs=1)
    assert "default warm: no memory" in capsys.readouterr().err
    assert seen[0][1:] == seen[1][1:] != seen[2][1:] and set(found) <= set(bench_step.COLUMNS)
    assert len(first_step.first_steps(bench_step.parse(["--no-peer"]), lambda text: None)) == 2


LINES = [{"event": "start"}, {"event": "parity", "step": 0, "ms": 500.0},
         *({"event": "step", "step": i, "tokens_per_sec": 1100.0 if i else 9.0} for i in range(30))]


def child(lines, after=""):
    """A process that prints events, then does `after`."""
    code = f"import json,time,sys\nfor e in {lines!r}: print(json.dumps(e), flush=True)\n{after}"
    return [sys.executable, "-c", code]


def test_a_run_is_read_to_its_last_step_and_then_ended():
    ticks = iter(range(100))
    found = bench_pretrain.run_events(child(LINES, "time.sleep(600)"), 25, lambda: float(next(ticks)))
    assert len(found) == 27 and found[-1][1]["step"] == 24
    rates = bench_pretrain.rates(found, 1000)
    assert rates["tok_s"] == 1000 and rates["logged_tok_s"] == 1100 and rates["gate_ms"] == 500
    assert rates["tok_s_with_gate"] == pytest.approx(1000 / 1.001)


def test_a_run_that_ends_too_early_is_no_measurement():
    with pytest.raises(MeasureError, match="code 5: no luck"):
        bench_pretrain.run_events(child(LINES, "print('no luck', file=sys.stderr); sys.exit(5)"), 99)


def test_more_than_two_percent_slower_is_5():
    def run(rate):
        return {"tok_s": rate + 1, "logged_tok_s": rate + 2, "gate_ms": 1.0, "tok_s_with_gate": rate}
    row, text, code = bench_pretrain.judge(run(98.5), [99.0, 101.0])
    assert code == 0 and row["ratio"] == 0.985 and "within 2%" in text and row["step_tok_s"] == 100
    assert bench_pretrain.judge(run(97.9), [100.0])[2] == 5 and set(row) <= set(bench_pretrain.COLUMNS)


def test_the_shard_is_one_that_pretrain_takes(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(bench_pretrain, "run_events", lambda command, steps: seen.append(json.dumps(command)) or [
        (float(i), e) for i, e in enumerate(LINES)])
    args = SimpleNamespace(preset="tiny", batch=2, length=16, steps=60)
    assert bench_pretrain.pretrain(args)["tok_s"] == 32
    bench_pretrain.write_shard(tmp_path / "x.bin", 1000, 5000)
    command = [*json.loads(seen[0])]
    command[command.index("--dataset") + 1] = str(tmp_path / "x.bin")
    command[command.index("--run-dir") + 1] = str(tmp_path / "run")
    command[command.index("--device") + 1], command[command.index("--num-steps") + 1] = "cpu", "2"
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def curves(apart=0.0, spread=0.0, steps=100, held=0.0):
    """Falling losses: ours `apart` from the peer's, whose second curve is `spread` from its first."""
    losses = np.linspace(12, 5, steps)
    return (Curve(losses * (1 + apart), 5 * (1 + held), 1.0), Curve(losses, 5.0, 1.0),
            Curve(losses * (1 + spread), 5.0, 1.0))


@pytest.mark.parametrize(("given", "precision", "passes"), [
    ({"apart": 0.009, "held": 0.004}, "bf16", [True] * 3), ({"apart": 0.011}, "bf16", [True, False, True]),
    ({"apart": 0.011, "spread": 0.006}, "bf16", [True] * 3), ({"held": 0.006}, "bf16", [False, True, True]),
    ({"held": np.nan}, "bf16", [False, True, True]), ({"apart": np.nan}, "bf16", [True, False, False]),
    ({"apart": 5e-7, "spread": 3e-7}, "fp32", [True] * 3), ({"apart": 1e-6, "spread": 1e-6}, "fp32",
                                                          [False, True, True]),
    ({"apart": 5e-7, "spread": 2e-7}, "fp32", [True, False, True])])
def test_curves_are_judged_by_the_peers_own_spread(given, precision, passes, capsys):
    found = curves(**given)
    assert [check.ok for check in loss_judge.judge(*found, precision)] == passes
    assert loss_curve.report(found, precision) == (0 if all(passes) else 5)
    assert ("FAILED" in capsys.readouterr().out) is not all(passes)


def test_a_flat_curve_fails_and_one_peer_curve_is_enough_in_bf16():
    flat = Curve(np.full(50, 12.0), 12.0, 1.0)
    assert [c.ok for c in loss_judge.judge(flat, flat, None, "bf16")] == [True, True, False]
    rows = loss_judge.table(flat, flat, None)
    assert rows[0]["spread"] == "" and set(rows[0]) <= set(loss_curve.COLUMNS) and len(rows) == 50


def test_weights_move_by_one_unit_and_batches_do_not_touch_what_is_held_out(tmp_path):
    weights = {"a": np.array([1.0, -2.0, 0.5] * 50, np.float32)}
    new = loss_judge.moved(weights)["a"]
    units = np.abs(new.view(np.int32) - weights["a"].view(np.int32))
    assert new.dtype == np.float32 and set(units) == {1} and (new > weights["a"]).any() and (new < weights["a"]).any()
    flat = np.arange(5000, dtype=np.uint16)
    np.save(tmp_path / "t.npy", flat)
    args = loss_curve.parse(["--data", str(tmp_path / "t.npy"), "--make-data"])
    rows = loss_curve.rows_of(loss_curve.tokens_of(args), 9)
    assert rows.shape == (500, 10) and sorted(rows.reshape(-1)) == list(range(5000))
    assert len(loss_curve.held_batches(rows[:7], 2)) == 3
    assert (loss_curve.batch_of(rows, 251, 2).inputs == rows[2:4, :-1]).all()
    assert qwen2_0_5b.V > loss_curve.TOKENS
