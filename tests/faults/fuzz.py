"""`python tests/faults/fuzz.py --format gguf --cases 200000 --seed 1`: files that are valid but for a few fields.

Each case makes a small valid file, field by field, changes some of its fields (counts, lengths, offsets, types, sizes,
names), then perhaps some bytes, makes the checksums of an .apr fit again, and gives it to the reader. Refused means an
AprError; accepted files must be valid and hold the same bytes by the oracles, and by the safetensors package.
"""

import argparse
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fuzz_models
import oracles
import safetensors
from fuzz_files import mutated

from apr.errors import AprError
from apr.formats.apr_file import open_apr
from apr.formats.gguf_file import STORED, open_gguf
from apr.formats.safetensors import open_safetensors

SECONDS, MEMORY = 2.0, 2**26  # for one case, and for all of them above what the process has at the start
ADDRESSES = 2**29  # an allocation beyond these is refused by the system, and a crash
ENDS = ("tried", "refused", "accepted", "crash", "hang", "accepted-though-invalid", "refused-though-valid")


class Late(Exception):
    """A case took longer than SECONDS."""


def read_apr(path):
    with open_apr(path) as opened:
        return {name: array.tobytes() for name, array in opened.read_all().items()}


def read_safetensors(path):
    with open_safetensors(path) as opened:
        return {name: array.tobytes() for name, array in opened.read_all().items()}


def read_gguf(path):
    """The bytes of every tensor; of blocks what lies in the file, once their values have been read."""
    out = {}
    with open_gguf(path) as opened:
        for name, entry in opened.entries.items():
            array = opened.read(name)
            assert array.shape == entry.shape
            out[name] = path.read_bytes()[entry.start:entry.start + entry.nbytes]
            if entry.type in STORED:
                assert array.tobytes() == out[name]
    return out


READ = {"apr": (read_apr, oracles.apr_tensors), "safetensors": (read_safetensors, oracles.safetensors_tensors),
        "gguf": (read_gguf, oracles.gguf_tensors), "gguf-model": (fuzz_models.read_model, None)}


def verdict(form, path, data):
    """How a case ended: refused, accepted, crash, hang or accepted though invalid; and the exception, if any."""
    read, oracle = READ[form]
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = read(path)
    except AprError:
        return "refused", None
    except Late:
        return "hang", None
    except AssertionError as e:
        return "accepted-though-invalid", e
    except BaseException as e:
        return "crash", e
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if oracle is None:  # the reader's own conditions were all there are
        return "accepted", None
    try:
        valid = oracle(data)
        if form == "safetensors":
            assert {name: bytes(t["data"]) for name, t in safetensors.deserialize(data)} == valid
        assert valid == found
    except Exception as e:
        return "accepted-though-invalid", e
    return "accepted", None


def refused_though_valid(form, data):
    """Whether the oracle takes a file that the reader did not."""
    if READ[form][1] is None:
        return False
    try:
        READ[form][1](data)
    except (ValueError, KeyError, struct.error, AttributeError, TypeError, OverflowError):
        return False
    return True


def late(*_):
    raise Late


def run(form, cases, seed):
    """The number of cases by how they ended, and the processor time of the slowest."""
    counts, slowest = Counter(tried=cases), 0.0
    before = signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / f"x.{form}"
        for i in range(cases):
            data = mutated(random.Random(f"{form} {seed} {i}"), form)
            start = time.process_time()
            end, error = verdict(form, path, data)
            slowest = max(slowest, time.process_time() - start)
            if end == "refused" and refused_though_valid(form, data):
                end = "refused-though-valid"
            counts[end] += 1
            if end not in ENDS[1:3] and counts[end] <= 5:
                print(f"{end}: case {i}: {type(error).__name__}: {error}", file=sys.stderr)
    signal.signal(signal.SIGALRM, before)
    return counts, slowest


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", choices=READ, required=True)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES, hard))
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts, slowest = run(args.format, args.cases, args.seed)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - began
    print(f"{args.format}: " + ", ".join(f"{name} {counts[name]}" for name in ENDS)
          + f", slowest {slowest * 1e3:.1f} ms, memory +{memory >> 20} MiB")
    return int(counts["refused"] + counts["accepted"] != args.cases or memory > MEMORY)


if __name__ == "__main__":
    raise SystemExit(main())
