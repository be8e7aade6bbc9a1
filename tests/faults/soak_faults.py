"""What befalls the runs of soak.py: how a process is ended, and what happens to its files before the next one.

An end takes the soak, the child and the step from which on it may come, does the deed and returns the exit codes that
are right for it. An injury takes random numbers and a path. Both have the id of the row of the list of faults in front.
"""

import contextlib
import json
import os
import queue
import resource
import signal
import subprocess
import threading
import time

SILENCE = 180.0  # seconds without an event after which a child hangs


class Child:
    """A process of apr with --json: its events as they come, the last step it made, what it resumed from."""

    def __init__(self, command, folder, environment):
        self.process = subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)
        self.pid, self.stderr, self.resumed, self.reached = self.process.pid, "", None, 0
        self.lines = queue.SimpleQueue()
        self.readers = [threading.Thread(target=read) for read in (self._events, self._messages)]
        for reader in self.readers:
            reader.start()

    def _events(self):
        for line in self.process.stdout:
            self.lines.put((time.monotonic(), line))
        self.lines.put((time.monotonic(), ""))

    def _messages(self):
        self.stderr = self.process.stderr.read()

    def next(self):
        """The next event, None after the last; TimeoutError from a child that hangs. `when` is when it came."""
        try:
            self.when, line = self.lines.get(timeout=SILENCE)
        except queue.Empty:
            raise TimeoutError(f"process {self.pid} has told nothing for {SILENCE} s") from None
        if not line.endswith("\n"):  # the end, perhaps in mid-line
            self.lines.put((self.when, ""))
            return None
        event = json.loads(line)
        if event["event"] == "step":
            self.reached = event["step"] + 1
        elif event["event"] == "resume":
            self.resumed = self.reached = event["step"]
        return event

    def until(self, kind, step=0):
        """The next event of this kind, of this step or a later one; None where the process ends before."""
        while (event := self.next()) is not None:
            if event["event"] == kind and event["step"] >= step:
                return event
        return None

    def finish(self):
        """The exit code, once it has ended by itself or by what was sent; `stderr` is what it said."""
        while self.next() is not None:
            pass
        self.readers[1].join(SILENCE)
        return self.process.wait(SILENCE)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for reader in self.readers:
            reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


def by_itself(soak, child, _step):
    """The run comes to its end."""
    soak.arrive(child, 0)
    return {0}


def by_signal(number):
    """Ended by one signal between two events."""
    def end(soak, child, step):
        soak.arrive(child, step)
        child.process.send_signal(number)
        return {-9} if number == signal.SIGKILL else {75}
    return end


def by_second_signal(soak, child, step):
    """Asked to stop, and told to at once, while it may be saving what the first asked for."""
    soak.arrive(child, step)
    child.process.send_signal(soak.rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]))
    soak.wait(2 * soak.pace.step + soak.pace.save)
    child.process.terminate()
    return {75, -15}


def at_start(number):
    """Ended before its first step, most likely."""
    def end(soak, child, _step):
        soak.wait(soak.pace.start)
        child.process.send_signal(number)
        return {-9} if number == signal.SIGKILL else {75, -15}
    return end


def in_save(soak, child, step):
    """Killed while it saves: after a validation it does nothing else."""
    if step:
        soak.arrive(child, step)
    child.until("eval", step)
    soak.wait(soak.pace.save)
    child.process.kill()
    return {-9}


def log_full(soak, child, step):
    """No room for another line of the log or two; the last one may be torn."""
    soak.arrive(child, step)
    limit(child, (soak.run / "train.jsonl").stat().st_size + soak.rng.randrange(400))
    return {7}


def save_full(seconds):
    """No room for a checkpoint; after so many seconds there is again, which is soon enough unless the log was hit."""
    def end(soak, child, step):
        soak.arrive(child, step)
        child.until("eval", step)
        limit(child, soak.rng.randrange(1024, soak.largest()))
        if seconds is None:
            return {7}
        soak.wait(seconds)
        limit(child, resource.RLIM_INFINITY)
        if child.until("step", step) is not None:
            child.process.terminate()
        return {7, 75}
    return end


def limit(child, size):
    """From now on no file of the child may grow beyond `size`; a process that has ended has no limit."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def second_process(soak, child, step):
    """Another --resume of the same folder: refused, and nothing touched of the first, which stands still meanwhile."""
    soak.arrive(child, step)
    child.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    before = soak.listing()
    code, said = soak.resumed_in_vain()
    soak.demand(code == 2 and f"pid {child.pid}" in said, f"a second process ended with {code}: {said}")
    soak.demand(soak.listing() == before, "a second process changed the run's folder")
    child.process.send_signal(signal.SIGCONT)
    child.process.terminate()
    return {75}


def cut(rng, path):
    """The file ends early."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip(rng, path):
    """A bit of the file is another."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def empty(_rng, path):
    """The file has no bytes."""
    os.truncate(path, 0)


def lose(_rng, path):
    """The file is gone."""
    path.unlink()


def leftovers(rng, run):
    """What killed writers leave, one of a step that is yet to come."""
    for step in (0, rng.randrange(10**6)):
        folder = run / "ckpt" / f"step-{step:08d}.tmp-999-{rng.randrange(2**32):08x}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(rng.randbytes(1000))
    (run / "ckpt" / f".epoch-000.apr.tmp-999-{rng.randrange(2**32):08x}").write_bytes(rng.randbytes(1000))


def clocks(rng, run):
    """Times of change that say nothing."""
    for path in [run, *run.rglob("*")]:
        os.utime(path, (rng.randrange(2**31), rng.randrange(2**31)))


def stale_lock(_rng, run):
    """A lock file that names a process of another machine."""
    (run / "lock").write_text("pid 1 on another-machine\n")


def torn_log(rng, run):
    """A line of the log of which only the beginning was written."""
    line = json.dumps({"event": "step", "step": rng.randrange(10**6), "train_loss": rng.random()})
    with open(run / "train.jsonl", "a") as f:
        f.write(line[:rng.randrange(1, len(line))])


ENDS = {
    "A1 SIGKILL": by_signal(signal.SIGKILL), "A1 SIGKILL in a save": in_save,
    "A1 SIGKILL at the start": at_start(signal.SIGKILL), "A4 no room in the log": log_full,
    "A4 no room for a while": save_full(0.5), "A10 second process": second_process,
    "E1 SIGTERM": by_signal(signal.SIGTERM), "E1 SIGINT": by_signal(signal.SIGINT),
    "E1 SIGUSR1": by_signal(signal.SIGUSR1), "E1 SIGTERM at the start": at_start(signal.SIGTERM),
    "E2 second signal": by_second_signal}
SLOW = {"A4 no room": save_full(None)}  # saving is tried again for some ten seconds
FILES = {"A7 {} cut": cut, "A8 {} with a bit flipped": flip, "A7 {} emptied": empty, "A7 {} lost": lose}
DATA = {kind.format("file"): injury for kind, injury in FILES.items()}  # to any file of a checkpoint but its manifest
MANIFEST = {"A6 manifest emptied": empty, "A6 manifest lost": lose}
RUN = {"A6 leftovers": leftovers, "A12 clocks": clocks, "A10 stale lock": stale_lock, "A1 torn log": torn_log}
KERNELS = {kind.format("kernel").replace("A7", "F3").replace("A8", "F3"): injury for kind, injury in FILES.items()}
