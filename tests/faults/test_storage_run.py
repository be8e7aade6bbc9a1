"""A3, A4, A14 through whole runs: a disk that fails or a crash at any call costs steps; the end has the same bits."""

import errno
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from broken_disk import GROWING, Disk, Fault
from power_loss import crashes, plant

from apr.cli.main import build
from apr.cli.pretrain import build_config
from apr.errors import AprError, NotFoundError, StorageError
from apr.formats.model_file import load_model
from apr.train import checkpoint, saver
from apr.train.real_run import saved_state
from apr.train.run import pretrain, read_run, resume
from apr.train.snapshot import sha256_of

OF_THE_CLOCK = ("tokens_per_sec", "wall_ms", "wall_seconds")
COMPARED = ("step", "eval", "end")
FLAGS = ["--num-steps", "4", "--steps-per-epoch", "2", "--grad-accum", "1", "--batch-size", "2"]


@pytest.fixture(scope="module")
def config(folder):
    """A run of two epochs of two steps."""
    return build_config(build("pretrain").parse_args(["--config", str(folder / "run.yaml"), "--dataset",
                                                      str(folder / "texts"), "--run-dir", "unused", *FLAGS]))


@pytest.fixture(scope="module")
def whole(config, folder):
    """The undisturbed run: how many calls it makes, and its end state."""
    run_dir = folder / "whole"
    with Disk(folder, kinds=GROWING) as disk:
        pretrain(config, run_dir, "cpu", [])
    return disk.count, end_state(run_dir)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting before a save is tried again."""
    monkeypatch.setattr(saver, "RETRY_SECONDS", (0.0, 0.0))


def end_state(run_dir: Path):
    """What must be equal bit for bit: the final hashes, the epochs' files, and the log without times."""
    state = checkpoint.latest(run_dir / "ckpt", pytest.fail).state
    events = [json.loads(line) for line in (run_dir / "train.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in e.items() if k not in OF_THE_CLOCK} for e in events if e["event"] in COMPARED]
    models = {p.name: p.read_bytes() for p in (run_dir / "ckpt").glob("epoch-*.apr")}
    return state["step"], state["parameters_sha256"], state["optimizer_sha256"], log, models


def go_on(run_dir: Path, whole, must: bool) -> bool:
    """Resume a run to its end, which must be that of the undisturbed one; False when there is no run, nor must be."""
    try:
        resume(read_run(run_dir), run_dir, "cpu", [], lambda _text: None)
    except NotFoundError:
        assert not must
        return False
    assert end_state(run_dir) == whole[1]
    return True


@pytest.mark.parametrize("lasting", [False, True], ids=["transient", "persistent"])
@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.long)])
def test_A4_a_run_on_a_full_disk(config, whole, tmp_path, lasting, every):
    """Each call of a run fails in its turn: the run ends with 7, or had tried again; and it goes on to the same end."""
    ends = []
    for at in range(2 % every, whole[0], every):
        run_dir, error = tmp_path / f"run-{at}", None
        with Disk(tmp_path, Fault(at, errno.ENOSPC, lasting=lasting), GROWING) as disk:
            try:
                pretrain(config, run_dir, "cpu", [])
            except StorageError as e:
                error = e
        assert disk.struck
        if error is None:
            assert not lasting and end_state(run_dir) == whole[1]
            ends.append("tried again")
            continue
        assert error.exit_code == 7 and "No space left" in str(error)
        saved = any(call.kind == "rename" and "/ckpt/step-" in call.to for call in disk.calls)
        ends.append("resumed" if go_on(run_dir, whole, saved) else "no run")
    assert {"resumed", "no run"} <= {*ends}, ends


def lost(run_dir: Path, promised: list[str]) -> str:
    """What resuming would miss, in a word; '' when nothing that was promised is lost."""
    if not promised:
        return ""
    try:
        read_run(run_dir)
        saved = saved_state(checkpoint.latest(run_dir / "ckpt", lambda _text: None))
        if saved.step < int(promised[-1]):
            return f"step {saved.step} where {promised[-1]} was promised"
        size, names = (run_dir / "train.jsonl").stat().st_size, {p.name for p in run_dir.iterdir()}
    except (AprError, OSError) as e:
        return str(e)
    return "" if size >= saved.log_bytes and "tokenizer.json" in names else f"log of {size} bytes in {sorted(names)}"


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.long)])
def test_A3_power_loss_in_a_run(config, whole, tmp_path, every):
    """The power goes at any call: from each checkpoint that was announced on, the run can be resumed."""
    (tmp_path / "disk").mkdir()
    with Disk(tmp_path / "disk") as disk:
        pretrain(config, tmp_path / "disk" / "run", "cpu",
                 [lambda event: disk.promise(str(event["step"])) if event["event"] == "checkpoint" else None])
    states, found = [state for state in crashes({}, disk.calls) if state[1]][::every], {}
    assert len(states) > 100
    for i, (n, promised, tree) in enumerate(states):
        folder = plant(tree, tmp_path / f"{i}")
        if said := lost(folder / "run", promised):
            found.setdefault(said.replace(str(folder), ""), f"call {n}, promised {promised}, there {sorted(tree)}")
        elif i % 50 == 0:
            assert go_on(folder / "run", whole, must=True)
        shutil.rmtree(folder)
    assert found == {}


def test_A13_what_is_saved_is_of_the_step_it_was_saved_at(config, tmp_path):
    """On the CPU a snapshot is views of what training changes: the hashes in a checkpoint are of the numbers in it."""
    found = {}

    def look(event):
        if event["event"] == "checkpoint":
            saved = checkpoint.latest(tmp_path / "run" / "ckpt", pytest.fail)
            assert saved.state["step"] == event["step"]
            assert sha256_of(saved.params) == saved.state["parameters_sha256"]
            assert sha256_of(saved.optimizer, saved.state["optimizer_step"]) == saved.state["optimizer_sha256"]
            found[event["step"]] = sha256_of(saved.params)
            if "epoch" in event:
                _, params, _ = load_model(tmp_path / "run" / "ckpt" / f"epoch-{event['epoch']:03d}.apr")
                assert sha256_of(params) == saved.state["parameters_sha256"]
                assert event["optimizer_state_sha"] == saved.state["optimizer_sha256"]

    pretrain(config, tmp_path / "run", "cpu", [look])
    assert [*found] == [0, 2, 4] and len({*found.values()}) == 3


def limited(limit: int):
    """Before a child runs: no file of it may become larger."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


PLACES = {"below a file": ("texts/000.txt/run", None), "in /proc": ("/proc/run", None), "in /sys": ("/sys/run", None),
          "a file": ("texts/000.txt", None), "in a loop of links": ("loop/run", None),
          "where no lock fits": ("a", 1), "where no checkpoint fits": ("b", 20_000)}


@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize("place", PLACES)
def test_A14_a_place_that_cannot_be_written(folder, place):
    """These fail for root too. The command ends before the first step, in one line, and leaves no checkpoint."""
    path, limit = PLACES[place]
    run_dir, loop = folder / path, folder / "loop"
    if not loop.is_symlink():
        loop.symlink_to("loop")
    done = subprocess.run([sys.executable, "-m", "apr", "pretrain", "--config", str(folder / "run.yaml"), "--dataset",
                           str(folder / "texts"), "--run-dir", str(run_dir), "--device", "cpu", "--json", *FLAGS],
                          text=True, timeout=60, capture_output=True, preexec_fn=limit and limited(limit))
    assert done.returncode in (2, 3, 7) and (limit is None or done.returncode == 7), done.stderr
    *before, line = done.stderr.splitlines()
    assert line.startswith("apr: ") and str(run_dir) in line and not [b for b in before if b.startswith("apr: ")]
    assert "Traceback" not in done.stderr
    assert '"event": "step"' not in done.stdout
    assert not (run_dir / "ckpt").exists() or not list((run_dir / "ckpt").iterdir())
