"""`python tests/faults/soak.py --seconds 1800 --device cpu`: a run that is ended and damaged at random, and resumed.

First a run of N steps that nobody disturbs, then the same run in many incarnations: each is ended by one of ENDS at a
random moment, and then injuries befall what lies on the disk (soak_faults.py). Never are both checkpoints damaged: one
must carry the run. Each incarnation must end with an exit code of its fault, without a traceback, lose at most the
steps since the last checkpoint, and resume from the newest one that is sound, by a second reading of the manifests. At
the end parameters, AdamW's m and v, the .apr file of every epoch and the log are those of the undisturbed run, bit for
bit, and nothing that a process holds has grown (slopes.py). Exit code 0 when all of that holds, else 1, and then a
temporary folder is left as it is. A seed plans the same faults again; the moments within a step are the machine's.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import slopes
from models import YAML, write_texts
from soak_faults import DATA, ENDS, KERNELS, MANIFEST, RUN, SILENCE, SLOW, Child, by_itself, in_save
from soak_report import end_state, judge, log_difference, report, wrong_exits

from apr.cli.progress import counting

ROOT = Path(__file__).resolve().parents[2]
CONFIG = (YAML.replace("head_dim: 8", "head_dim: 32").replace("lr: 5e-3", "lr: 5e-4")  # bf16 needs such heads
          .replace("target_val_loss: 0.1", "target_val_loss: 1e-6, patience: 1000000000"))
TO_THE_END = "the last process"
FOR_SLOW = 120  # seconds of a soak that has time for SLOW ends
EPOCHS = 4  # of a round, from one end to the next: what one of them loses is made again well before the next


@dataclass(frozen=True)
class Pace:
    """Seconds of a step, of a save, and from a process's start to its first step."""

    step: float
    save: float
    start: float


@dataclass(frozen=True)
class Plan:
    """Ends; injuries, all of them after the first end; steps in all and in an epoch."""

    rounds: int
    injuries: int
    steps: int
    every: int


def planned(seconds, faults, pace):
    """A plan that fills `seconds`: a third of them goes to starting processes, where there are faults enough."""
    rounds = max(3, min(faults // 2, int(0.3 * seconds / pace.start)))
    work = (seconds - (rounds + 5) * pace.start) / 2.3 - EPOCHS * rounds * pace.save  # 1.3 runs are made in pieces
    every = max(4, round(work / pace.step / (EPOCHS * rounds)))
    return Plan(rounds, max(0, faults - rounds), EPOCHS * rounds * every, every)


def deck(rng, kinds, number):
    """So many of these kinds, each as often as any other but for one, in random order."""
    return [kind for _ in range(-(-number // len(kinds))) for kind in rng.sample(sorted(kinds), len(kinds))][:number]


def sound(run):
    """The checkpoints of which every file is as the manifest says, newest first."""
    def whole(folder):
        try:
            files = json.loads((folder / "manifest.json").read_text())["files"]
            return all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
                       for name, entry in files.items())
        except (OSError, ValueError):
            return False
    return [f for f in sorted((run / "ckpt").glob("step-????????"), reverse=True) if whole(f)]


def step_of(folder):
    """The step of a checkpoint, -1 for none."""
    return -1 if folder is None else int(folder.name[5:])


class Soak:
    """The runs of one soak, in `folder`, and what is recorded of them."""

    def __init__(self, folder, device, seed):
        self.folder, self.device, self.rng, self.run = folder, device, random.Random(seed), folder / "disturbed"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("APR_")}
        self.environment["APR_CACHE_DIR"] = str(folder / "cache")
        write_texts(folder / "texts", 200)
        (folder / "run.yaml").write_text(CONFIG)
        self.complaints, self.exits, self.faults, self.lost = [], [], Counter(), defaultdict(list)
        self.samples, self.starts, self.began, self.injured = [], [], time.monotonic(), 0

    def command(self, run, steps, every, *more):
        return [sys.executable, "-m", "apr", "pretrain", "--config", str(self.folder / "run.yaml"), "--dataset",
                str(self.folder / "texts"), "--run-dir", str(run), "--device", self.device, "--num-steps", str(steps),
                "--steps-per-epoch", str(every), "--precision", "fp32" if self.device == "cpu" else "bf16", "--json",
                *more]

    def demand(self, holds, complaint):
        if not holds:
            self.complaints.append(complaint)

    def wait(self, seconds):
        """A random part of a time: the moment of a fault."""
        time.sleep(self.rng.uniform(0, seconds))

    def calibrate(self, seconds):
        """The pace here, from a run that is killed after so many; on a GPU from the second one, its kernels compiled.
        """
        for name in ("calibration",) if self.device == "cpu" else ("kernels", "calibration"):
            began = time.monotonic()
            with Child(self.command(self.folder / name, 10**7, 20), ROOT, self.environment) as child:
                child.until("step")
                first = before = child.when
                steps, saves = [], []
                while len(saves) < 2 or child.when < first + seconds:
                    event = child.next()
                    if event is None:
                        child.finish()
                        raise SystemExit(f"no run can be made here: {child.stderr}")
                    took, before = child.when - before, child.when
                    if event["event"] in ("step", "checkpoint"):
                        (steps if event["event"] == "step" else saves).append(took)
            shutil.rmtree(self.folder / name)
        return Pace(median(steps), median(saves), first - began)

    def undisturbed(self):
        """The run that the other is held against, sampled a hundred times, or each second of a long one."""
        plan, run, due = self.plan, self.folder / "undisturbed", 0.0
        every = min(1.0, plan.steps * self.pace.step / 100)
        with Child(self.command(run, plan.steps, plan.every), ROOT, self.environment) as child:
            while (event := child.next()) is not None:
                if event["event"] == "step" and child.when >= due:
                    due = child.when + every
                    self.samples.append((child.when - self.began, slopes.sample(child.pid, self.device)))
            self.account("undisturbed", child, child.finish(), {0})

    def account(self, kind, child, code, expected):
        """Record how an incarnation ended."""
        self.exits.append({"fault": kind, "code": code, "expected": sorted(expected)})
        self.demand("Traceback" not in child.stderr, f"{kind}: a traceback: {child.stderr[-2000:]}")

    def arrive(self, child, step):
        """Wait until the child has made this step, and a random time of about a step."""
        if child.until("step") is not None:
            self.starts.append((child.when - self.began, slopes.sample(child.pid, self.device)))
        if child.reached <= step:
            child.until("step", step)
        self.wait(2 * self.pace.step)

    def resumed_in_vain(self):
        """Exit code and messages of a --resume that is to be refused."""
        done = subprocess.run(self.command(self.run, self.plan.steps, self.plan.every, "--resume"), cwd=ROOT,
                              env=self.environment, capture_output=True, text=True, timeout=SILENCE)
        return done.returncode, done.stderr

    def largest(self):
        """Bytes of the largest file of a checkpoint."""
        return max(p.stat().st_size for p in sound(self.folder / "undisturbed")[0].iterdir())

    def listing(self):
        """What is in the run's folder: of each path its size, time of change and inode."""
        return {p: (s.st_size, s.st_mtime_ns, s.st_ino) for p in self.run.rglob("*") for s in (p.stat(),)}

    def incarnation(self, kind, end, step):
        """One process of the disturbed run: started, ended, and what is left looked at."""
        before = next(iter(sound(self.run)), None)
        more = [] if before is None else ["--resume"]
        with Child(self.command(self.run, self.plan.steps, self.plan.every, *more), ROOT, self.environment) as child:
            expected = end(self, child, step)
            code = child.finish()
        self.account(kind, child, code, expected)
        self.demand(child.resumed in (None, step_of(before)),
                    f"{kind}: resumed from step {child.resumed}, the newest sound checkpoint was {before}")
        if end is not by_itself:
            self.faults[kind] += 1
        after = next(iter(sound(self.run)), None)
        if after is None:
            return self.begin_again(kind, before)
        lost = max(child.reached, step_of(before)) - step_of(after)
        self.demand(0 <= lost <= (self.plan.every if code in (7, -9, -15) else 0), f"{kind}: {lost} steps lost")
        if end is not by_itself:
            self.lost[kind].append(lost)
        return None

    def begin_again(self, kind, before):
        """Nothing was saved yet: there is nothing to resume from, and the folder is not to be used for another run."""
        code, said = self.resumed_in_vain()
        self.demand(before is None and code == 3 and "Traceback" not in said, f"{kind}: no checkpoint, {code}: {said}")
        shutil.rmtree(self.run, ignore_errors=True)

    def injure(self, kinds, number):
        """So many of the kinds that are left, one of them at most to a checkpoint, and that if there is another."""
        spare = len(found := sound(self.run)) > 1
        for _ in range(number if found else 0):
            kind = next((k for k in kinds if spare or k not in {**DATA, **MANIFEST}), self.rng.choice(sorted(RUN)))
            if kind in kinds:
                kinds.remove(kind)
            files = [p for p in found[0].iterdir() if p.name != "manifest.json"]
            path = (self.rng.choice(sorted(files)) if kind in DATA else found[0] / "manifest.json" if kind in MANIFEST
                    else self.run if kind in RUN else self.rng.choice(sorted(self.folder.glob("cache/*.kernel"))))
            {**DATA, **MANIFEST, **RUN, **KERNELS}[kind](self.rng, path)
            self.faults[kind] += 1
            self.injured += 1
            if kind in DATA or kind in MANIFEST:
                spare, newest = False, sound(self.run)[0]
                self.demand(newest == found[1], f"{kind}: the checkpoint is still sound")
                self.lost[kind].append(step_of(found[0]) - step_of(newest))

    def disturbed(self, seconds):
        """The run in pieces."""
        plan = self.plan
        kinds = {**ENDS, **(SLOW if seconds >= FOR_SLOW else {})}
        ends = deck(self.rng, kinds, plan.rounds - 1)
        injuries = deck(self.rng, {**DATA, **MANIFEST, **RUN, **({} if self.device == "cpu" else KERNELS)},
                        plan.injuries)
        with counting("processes", plan.rounds) as advance:
            self.incarnation("A1 SIGKILL in a save", in_save, 0)
            for number, kind in enumerate(ends, 1):
                advance(kind)
                self.incarnation(kind, kinds[kind], int((number - self.rng.random()) * plan.steps / plan.rounds))
                self.injure(injuries, plan.injuries * number // len(ends) - self.injured)
                if wrong_exits(self.exits) or self.complaints:
                    return
            self.incarnation(TO_THE_END, by_itself, 0)
        left = sorted(p.name for p in (self.run / "ckpt").iterdir() if not p.name.startswith("epoch-"))
        self.demand(left == [f.name for f in sound(self.run)][::-1] and len(left) == 2, f"left in ckpt: {left}")

    def record(self, seed, asked):
        """All that is to be judged and told."""
        runs = [self.folder / "undisturbed", self.run]
        ended = self.exits[-1] == {"fault": TO_THE_END, "code": 0, "expected": [0]}
        one, other = map(end_state, runs) if ended else ({}, {})
        return {"device": self.device, "seed": seed, "seconds": time.monotonic() - self.began, "asked": asked,
                "steps": self.plan.steps, "steps_per_epoch": self.plan.every, "pace": asdict(self.pace),
                "faults": dict(self.faults), "exits": self.exits, "lost": self.lost, "complaints": self.complaints,
                "undisturbed": one, "disturbed": other, "log_difference": log_difference(*runs) if ended else "",
                "slopes": {"the undisturbed run": slopes.summary(self.samples),
                           "processes at their first step": slopes.summary(self.starts)}}


def soak(folder, device, seconds, seed, faults):
    """The record of a soak in an empty folder."""
    work = Soak(folder, device, seed)
    work.pace = work.calibrate(min(10.0, max(0.5, seconds / 50)))
    work.plan = planned(seconds - (time.monotonic() - work.began), faults, work.pace)
    work.undisturbed()
    if not wrong_exits(work.exits):
        work.disturbed(seconds)
    return work.record(seed, faults)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1800, help="how long it takes, about (1800)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (cpu)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=50, help="at least so many (50)")
    parser.add_argument("--folder", type=Path, help="an empty folder for the runs, kept; else a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    args = parser.parse_args(arguments)
    if args.folder is None:
        folder = Path(tempfile.mkdtemp(prefix="apr-soak-"))
    else:
        folder = args.folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
    record = soak(folder, args.device, args.seconds, args.seed, args.faults)
    print("\n".join(report(record)))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1))
    wrong = judge(record)
    if args.folder is None and not wrong:
        shutil.rmtree(folder)
    elif wrong:
        print(f"the runs are in {folder}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
