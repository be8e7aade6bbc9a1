"""The watchdog: a step that does not end ends its process, with one line, exit code 10 and the checkpoint before it."""

import json
import subprocess
import sys
import time

import pytest
from models import YAML

from apr.train import checkpoint
from apr.train.watchdog import Watchdog

HANGS = """
import sys, time
from apr.train.trainer import TransformerTrainer
real, calls = TransformerTrainer._step, []

def step(trainer, *arguments):
    calls.append(1)
    if len(calls) == 11:
        time.sleep(10**6)
    return real(trainer, *arguments)

TransformerTrainer._step = step
TransformerTrainer.doing = lambda self: "; launched last: a kernel"
from apr.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("more", [[], ["--grad-accum", "1"]])
def test_E5_a_step_that_hangs_ends_the_process(folder, tmp_path, more):
    (tmp_path / "run.yaml").write_text(YAML)
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", HANGS, "pretrain", "--config", str(tmp_path / "run.yaml"), "--dataset",
                          str(folder / "texts"), "--run-dir", str(tmp_path / "run"), "--device", "cpu",
                          "--step-timeout", "1.5", *more], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 10, run.stderr
    assert time.monotonic() - start < 30
    line = run.stderr.strip().splitlines()[-1]
    assert line == ("apr: step 10: expected its end within 1.5 s (--step-timeout), found none; launched last: a "
                    "kernel; the process ends; resume from the last checkpoint")
    assert checkpoint.latest(tmp_path / "run" / "ckpt", print).state["step"] == 8
    end = json.loads((tmp_path / "run" / "train.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["status"], end["steps_recorded"]) == ("end", "ABORTED", 10)


class Ended(BaseException):
    """Instead of the end of the process."""


@pytest.fixture
def dog(monkeypatch):
    """A watchdog without its thread, and whose process does not end."""
    def end(code):
        raise Ended(code)

    monkeypatch.setattr("apr.train.watchdog.os._exit", end)
    monkeypatch.setattr("apr.train.watchdog.threading.Thread", lambda **_: type("", (), {"start": lambda self: None})())
    with Watchdog(0.02, lambda: "") as dog:
        yield dog


def test_only_a_step_is_watched_and_each_anew(dog):
    def ends():
        over = iter([False, True])
        dog._over.wait = lambda _seconds: next(over)
        try:
            dog._watch()
        except Ended:
            return True
        return False

    told = []
    assert not ends()
    with dog.step(3, told.append):
        assert not ends()
        time.sleep(0.03)
        with dog.step(4, told.append):
            assert not ends()
            time.sleep(0.03)
            assert ends()
    assert len(told) == 1 and told[0].startswith("step 4: ")
    time.sleep(0.03)
    assert not ends()


def test_the_process_ends_although_the_log_cannot_be_written(dog):
    def broken(text):
        raise RuntimeError("no log")

    try:
        dog._end(1, broken)
    except BaseException as e:
        assert isinstance(e, Ended)


def test_no_limit_starts_no_thread(monkeypatch):
    monkeypatch.setattr("apr.train.watchdog.threading.Thread", None)
    with Watchdog(0, lambda: "") as dog, dog.step(1, print):
        pass
