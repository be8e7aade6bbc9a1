"""A1, A2: writers of checkpoints killed at random moments and at every call; the newest whole one always loads."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from broken_disk import Disk, end_of, faults
from models import SMALL, random_batch, train_config
from saves import newest, save, state_of, temporaries

from apr.train import checkpoint
from apr.train.trainer import TransformerTrainer

pytestmark = pytest.mark.filterwarnings("ignore:This process")  # fork beside BLAS threads; the child only writes files
KILLS = [100, pytest.param(1000, marks=pytest.mark.long)]


@pytest.mark.parametrize("kills", KILLS)
def test_A1_kill_at_random_moments(tmp_path, kills):
    """Writers killed by SIGKILL somewhere in a save: afterwards there is always a whole checkpoint that loads."""
    trainer, moment = TransformerTrainer.new(SMALL, train_config()), random.Random(5)
    trainer.train_batch(random_batch(0))

    def write(step):
        checkpoint.write_checkpoint(tmp_path, step, trainer.model, trainer.params, trainer.optimizer_state(),
                                    {"step": step}, "{}")

    start = time.perf_counter()
    write(0)
    seconds = time.perf_counter() - start
    torn = 0
    for kill in range(kills):
        before = checkpoint.steps(tmp_path)[0]
        child = os.fork()
        if child == 0:
            for later in range(1, 100):
                write(int(before.name[5:]) + later)
            os._exit(0)
        time.sleep(moment.uniform(0, 3 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += bool(temporaries(tmp_path)) or any(not (p / "manifest.json").exists()
                                                   for p in checkpoint.steps(tmp_path))
        warnings = []
        found = checkpoint.latest(tmp_path, warnings.append)
        assert found.path >= before, f"kill {kill} lost {before.name}: {warnings}"
        assert all(np.array_equal(found.params[k], v) for k, v in trainer.params.items())
        checkpoint.sweep(tmp_path)
    assert not temporaries(tmp_path)
    assert torn > kills // 4, f"only {torn} of {kills} kills hit a save half-way: the test does not test"


def first(ckpt_dir: Path) -> None:
    """Nothing is there but the folder."""
    ckpt_dir.mkdir()


def later(ckpt_dir: Path) -> None:
    """Two checkpoints, of which one is to be dropped, and what killed writers left."""
    for step in (1, 2):
        save(ckpt_dir, step)
    shutil.copytree(ckpt_dir / "step-00000002", ckpt_dir / "step-00000003.tmp-1-a")
    (ckpt_dir / ".epoch-000.apr.tmp-1-a").write_bytes(b"half")


def damaged(ckpt_dir: Path) -> None:
    """A whole checkpoint, and a damaged one of the step that is saved."""
    for step in (2, 3):
        save(ckpt_dir, step)
    (ckpt_dir / "step-00000003" / "state.json").write_bytes(b"{")


def again(ckpt_dir: Path) -> None:
    """The only checkpoint is a whole one of the step that is saved."""
    save(ckpt_dir, 3)


@pytest.mark.parametrize("half", [False, True], ids=["before", "half-way"])
@pytest.mark.parametrize("prepare", [first, later, damaged, again], ids=lambda f: f.__name__)
def test_A2_kill_at_every_call(tmp_path, prepare, half):
    """SIGKILL before each call of a save, or in the middle of each write: nothing is lost, and the same save works."""
    prepare(tmp_path / "start")
    due, wrong, torn = newest(tmp_path / "start"), [], 0
    for fault in faults(half=half):
        ckpt_dir = shutil.copytree(tmp_path / "start", tmp_path / "killed")
        with Disk(ckpt_dir, fault) as disk:  # inherited by the child; this process makes no call meanwhile
            end = end_of(lambda ckpt_dir=ckpt_dir: save(ckpt_dir, 3))
        assert disk.count == 0 and end in (0, -signal.SIGKILL)
        found = newest(ckpt_dir)
        if found < due:
            wrong.append(f"call {fault.at}: step {found} where {due} was; {sorted(p.name for p in ckpt_dir.iterdir())}")
        torn += bool(temporaries(ckpt_dir))
        save(ckpt_dir, 3)
        left = sorted(p.name for p in ckpt_dir.iterdir())
        if newest(ckpt_dir) != 3 or left != [f"step-{step:08d}" for step in sorted({due, 3} - {-1})]:
            wrong.append(f"call {fault.at}, saved again: {left}")
        shutil.rmtree(ckpt_dir)
        if end == 0:
            break
    assert fault.at > 20 and torn >= 15 and found == 3, "the kills hit the save"
    assert wrong == []


def test_A2_kill_while_a_model_file_is_written(tmp_path):
    """The epoch's .apr: the old one or the new one, whole, whatever the call."""
    from saves import TINY

    from apr.formats.model_file import load_model, save_model

    path, kept = tmp_path / "epoch-000.apr", set()
    for half in (False, True):
        for fault in faults(half=half):
            save_model(path, TINY, state_of(1)[0], "old", "{}", 0)
            with Disk(tmp_path, fault):
                end = end_of(lambda: save_model(path, TINY, state_of(2)[0], "new", "{}", 0))
            _, params, metadata = load_model(path)
            kept.add(metadata["name"])
            assert all(np.array_equal(params[k], v) for k, v in state_of(1 + (metadata["name"] == "new"))[0].items())
            checkpoint.sweep(tmp_path)
            assert os.listdir(tmp_path) == [path.name]
            if end == 0:
                break
        assert fault.at >= 4 and metadata["name"] == "new"
    assert kept == {"old", "new"}
