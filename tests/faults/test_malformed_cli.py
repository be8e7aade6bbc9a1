"""Malformed files through the real command: exit code, one line on stderr, bounded time, memory bounded by the file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hostile import SLOW, all_cases, good
from hostile_tokenizers import WORDS, tokenizer

CASES = [c for c in all_cases() if c.cli]
AT_ONCE = 2
HANGS = 20  # seconds
# A refusal takes no longer than SLOW, U2 of the fault list, and no longer than QUICK, or twice what the command takes
# on a good file where the machine is so slow that this is more.
QUICK = 2.0  # seconds
ROOM = 64 * 2**20  # bytes beyond the file's size and what the command takes on a good small file: U3 of the fault list
# A child's peak counts the memory that its parent had when it forked, so a process smaller than apr has to start it.
LAUNCH = """
import json, os, resource, sys, time
out, err, *command = sys.argv[1:]
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
if hard == resource.RLIM_INFINITY or hard > 2**34:  # a bomb that does go off is not to take the machine with it
    resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
began = time.monotonic()
files = [(os.POSIX_SPAWN_OPEN, fd, name, os.O_WRONLY | os.O_CREAT, 0o600) for fd, name in ((1, out), (2, err))]
pid = os.posix_spawn(command[0], command, os.environ, file_actions=files)
_, status, usage = os.wait4(pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, time.monotonic() - began]))
"""


class Run(NamedTuple):
    """What a command did: exit code (None: it hung), peak memory, size of its input, seconds, stderr, files left."""

    code: int | None
    memory: int
    size: int
    seconds: float
    errors: list[str]
    left: list[str]


def arguments(kind, path, folder):
    """The command that reads a file of this kind."""
    if kind in ("yaml", "corpus"):
        return ["pretrain", "--config", str(path), "--run-dir", str(folder / "run")]
    if kind == "model":
        ids = np.arange(4000, dtype="<u4") % 16
        (folder / "ids.bin").write_bytes(ids.tobytes())
        return ["pretrain", "--init", str(path), "--dataset", str(folder / "ids.bin"), "--run-dir", str(folder / "run"),
                "--force-init-loss", "--num-steps", "12", "--warmup-steps", "0", "--batch-size", "64",
                "--seq-length", "16"]
    if kind == "hf":
        return ["import", str(path), "-o", str(folder / "run")]
    if kind in ("tokenizer", "text"):
        (folder / "text.txt").write_text(WORDS, encoding="utf-8")
        (folder / "good.json").write_text(json.dumps(tokenizer()), encoding="utf-8")
        text, words = (path, folder / "good.json") if kind == "text" else (folder / "text.txt", path)
        return ["tokenize", str(text), "--tokenizer", str(words), "--output", str(folder / "run")]
    return ["inspect", str(good()["apr"](folder) if kind == "env" else path)]


def run(kind, write) -> Run:
    """Run a command on what `write` makes."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        path = write(folder)
        size = sum(p.lstat().st_size for p in ([path] if not path.is_dir() else path.rglob("*")))
        plain = {k: v for k, v in os.environ.items() if not k.startswith("APR_")}
        environment = dict(line.split("=") for line in path.read_text().splitlines()) if kind == "env" else {}
        command = [sys.executable, "-m", "apr", *arguments(kind, path, folder)]
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCH, str(folder / "out"), str(folder / "err")]
        launch = subprocess.Popen([*launcher, *command], env={**plain, **environment}, stdout=subprocess.PIPE,
                                  start_new_session=True)
        try:
            code, memory, seconds = json.loads(launch.communicate(timeout=HANGS)[0])
        except subprocess.TimeoutExpired:
            os.killpg(launch.pid, signal.SIGKILL)
            launch.communicate()
            code, memory, seconds = None, 0, HANGS
        errors = (folder / "err").read_text(encoding="utf-8").splitlines()
        if "pretrain" in command:  # which says first that --device auto means the CPU
            errors = [line for line in errors if not line.startswith("device: ")]
        left = [p.name for p in folder.iterdir() if p.name in ("run", "pwned") or "tmp" in p.name]
        return Run(code, memory, size, seconds, errors, left)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def runs(request):
    """Every command that this session asks about, AT_ONCE at a time: by case, and by kind for the good file."""
    parameters = [getattr(getattr(item, "callspec", None), "params", {}) for item in request.session.items]
    asked = {id(p["case"]) for p in parameters if "case" in p}
    mine = [c for c in CASES if id(c) in asked]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        started = {kind: pool.submit(run, kind, good()[kind]) for kind in sorted({c.kind for c in mine})}
        started |= {id(c): pool.submit(run, c.kind, c.write) for c in mine}
        yield started


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.row}-{c.kind}-{c.what}")
def test_malformed_command_line(runs, case):
    base, this = runs[case.kind].result(), runs[id(case)].result()
    assert base.code == 0, f"the good file is refused: {base}"
    assert this.code == case.exit, this
    assert len(this.errors) == 1, this
    assert this.errors[0].startswith("apr: ")
    assert case.says in this.errors[0]
    assert not this.left, "a refused input leaves nothing behind"
    more = this.memory - base.memory
    assert more < this.size + ROOM, f"{more >> 20} MB for {this.size >> 20} MB"
    slow = min(SLOW, max(QUICK, 2 * base.seconds))
    if this.seconds >= slow:  # once more: the machine may be busy
        this = run(case.kind, case.write)
    assert this.seconds < slow, f"{this.seconds:.1f} s, against {base.seconds:.1f} s for a good file"
