"""`python tests/faults/fuzz.py --format gguf --cases 200000 --seed 1`: files that are valid but for a few fields.

`--seconds 60` is a time box instead of a number, `--format all` takes every format in turn. A case is a pure function
of format, seed and number: a small valid file or folder, put together field by field, some of its fields changed, then
perhaps some bytes, and most checksums made to fit again. Refused means an AprError; what is accepted must be valid and
mean the same by the oracles. A format runs in a child process: its memory is its own, and a case that kills it counts.
`--keep` adds the cases that ended badly to the corpus (fuzz_corpus.py).
"""

import argparse
import ctypes
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fuzz_corpus
from fuzz_forms import FORMS, put
from fuzz_rules import INVALID

from apr.errors import AprError

SECONDS, MEMORY = 2.0, 2**26  # for one case
ADDRESSES = 2**29  # above what the process has at the start; an allocation beyond these is refused by the system
STALL = 20.0  # seconds after which a child that no signal wakes is killed
ENDS = ("refused", "accepted", "crash", "hang", "over-memory", "accepted-though-invalid", "refused-though-valid")
COLUMNS = ("format", "cases", *ENDS, "seconds", "slowest ms", "its case", "memory MiB")


class Late(Exception):
    """A case took longer than SECONDS."""


class Tally(ctypes.Structure):
    """What a child has counted so far, in memory that it shares with its parent."""

    _fields_ = [("number", ctypes.c_long), ("ends", ctypes.c_long * len(ENDS)), ("slowest", ctypes.c_double),
                ("slowest_number", ctypes.c_long), ("memory", ctypes.c_long), ("finished", ctypes.c_bool)]

    def counts(self):
        """The number of cases by how they ended."""
        return dict(zip(ENDS, self.ends, strict=True))

    def bad(self):
        """How many cases ended as none should."""
        return sum(self.ends[2:])


def case(form, seed, number):
    """A case."""
    return FORMS[form].make(random.Random(f"{form} {seed} {number}"))


def late(*_):
    raise Late


def peak(forget=False):
    """The most memory that this process has had, in bytes, since the last call that told the system to forget it."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def verdict(form, files, home):
    """How a case ends, one of ENDS; the exception, if any; and the memory that reading it took."""
    path, before = put(form, files, home), peak(forget=True)
    how, found = outcome(form, path)
    memory = peak() - before
    if how in ENDS[:2] and memory > MEMORY:
        return "over-memory", None, memory
    return *judged(form, files, how, found), memory


def outcome(form, path):
    """What the reader makes of a case: accepted and what it read, or how else it ended and the exception."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return "accepted", FORMS[form].read(path)
    except AprError as e:
        return "refused", e
    except Late:
        return "hang", None
    except MemoryError as e:
        return "over-memory", e
    except AssertionError as e:
        return "accepted-though-invalid", e
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # a panic of Rust is no Exception
        return "crash", e
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def judged(form, files, how, found):
    """How a case ended, by the oracle, and the exception."""
    try:
        valid = FORMS[form].meaning(files) if FORMS[form].meaning else None
    except INVALID as e:
        return ("accepted-though-invalid", e) if how == "accepted" else (how, found)
    if how == "refused" and valid is not None:
        return "refused-though-valid", found
    if how == "accepted" and valid is not None and valid != found:
        return "accepted-though-invalid", ValueError(f"it means another thing: {first_difference(found, valid)}")
    return how, None if how == "accepted" else found


def first_difference(found, valid):
    """Where two values differ first, and how."""
    if isinstance(found, dict) and isinstance(valid, dict):
        name = next(k for k in {**valid, **found} if found.get(k, ...) != valid.get(k, ...))
        return f"{name}: {first_difference(found.get(name), valid.get(name))}"
    if isinstance(found, tuple) and isinstance(valid, tuple):
        return first_difference(*next((a, b) for a, b in zip(found, valid, strict=True) if a != b))
    return f"{str(found)[:80]}, not {str(valid)[:80]}"


def run(form, cases, seed, seconds=None, tally=None, keep=False):
    """Cases from tally.number on, so many or as many as the time allows; returns the tally."""
    tally = Tally() if tally is None else tally
    before, end = signal.signal(signal.SIGALRM, late), time.monotonic() + (seconds or 0)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        while tally.number < cases if seconds is None else time.monotonic() < end:
            files = case(form, seed, tally.number)
            start = time.process_time()
            how, error, memory = verdict(form, files, Path(folder))
            spent = time.process_time() - start
            if spent > tally.slowest:
                tally.slowest, tally.slowest_number = spent, tally.number
            tally.ends[ENDS.index(how)] += 1
            if how not in ENDS[:2]:
                complain(tally, how, f"case {tally.number}: {type(error).__name__}: {str(error)[:300]}")
                if keep:
                    fuzz_corpus.keep(form, files, f"{how}-{seed}-{tally.number}")
            tally.memory = max(tally.memory, memory)
            tally.number += 1
    signal.signal(signal.SIGALRM, before)
    return tally


def complain(tally, how, text):
    """Say how a case ended, for the first few that ended so."""
    if tally.counts()[how] <= 5:
        print(f"{how}: {text}", file=sys.stderr, flush=True)


def limited(*arguments):
    """run in a process with so much memory and no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES, hard))
    run(*arguments)
    arguments[4].finished = True


def watched(form, cases, seed, seconds, keep):
    """run in a child; one that dies or stalls costs a case, and another goes on after it."""
    context, end = multiprocessing.get_context("fork"), time.monotonic() + (seconds or 0)
    tally = context.Value(Tally, lock=False)
    while not tally.finished and (seconds is None or time.monotonic() < end):
        left = None if seconds is None else end - time.monotonic()
        child = context.Process(target=limited, args=(form, cases, seed, left, tally, keep), daemon=True)
        child.start()
        last, since = -1, time.monotonic()
        while child.is_alive() and time.monotonic() - since < STALL:
            child.join(0.2)
            if tally.number != last:
                last, since = tally.number, time.monotonic()
            if sys.stderr.isatty():
                print(f"\r{form}: {tally.number}", end="\r", file=sys.stderr, flush=True)
        how = "hang" if child.is_alive() else "crash"
        child.kill()
        child.join()
        if not tally.finished:
            tally.ends[ENDS.index(how)] += 1
            complain(tally, how, f"case {tally.number}: the process ended with {child.exitcode}")
            if keep:
                fuzz_corpus.keep(form, case(form, seed, tally.number), f"{how}-{seed}-{tally.number}")
            tally.number += 1
    return tally


def line(cells):
    """A row of the table."""
    return "  ".join(str(cell).rjust(max(len(name), 7)) for cell, name in zip(cells, COLUMNS, strict=True))


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=(*FORMS, "all"), required=True)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="add cases that ended badly to the corpus")
    args = parser.parse_args(arguments)
    print(line(COLUMNS))
    bad = 0
    for form in FORMS if args.format == "all" else [args.format]:
        start = time.monotonic()
        tally = watched(form, args.cases, args.seed, args.seconds, args.keep)
        print(line([form, tally.number, *tally.ends, f"{time.monotonic() - start:.1f}", f"{tally.slowest * 1e3:.1f}",
                    tally.slowest_number, tally.memory >> 20]), flush=True)
        bad += tally.bad()
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
