"""What a process holds while it runs, memory, file handles, threads, memory of the GPU; and whether that grows.

Growth is judged by medians: that of the last quarter of the samples against that of the second, which leaves out what a
process does to warm up and any single peak, such as the copy that is held during a save. It grows when the medians are
further apart than GROWTH: 2 % or 8 MiB of memory, whichever is more, since allocators keep and return some MiB as they
like, and 2 handles or threads, since a save that was sampled half-way has so many open. A leak of a handle or of a copy
of the model in each epoch is beyond that in any soak of some minutes. The slope is least squares over all but the first
quarter; it is for the reader: over a short time it is mostly noise, so nothing is judged by it.
"""

import os
import subprocess
from pathlib import Path
from statistics import linear_regression, median

MIB, PAGE = 1 << 20, os.sysconf("SC_PAGE_SIZE")
GROWTH = {"host memory": (0.02, 8 * MIB), "device memory": (0.02, 8 * MIB), "handles": (0.0, 2), "threads": (0.0, 2)}
FEWEST = 8  # samples that are judged at all: two in each quarter


def sample(pid, device):
    """What a process has now, by the names of GROWTH; memory in bytes. Nothing of one that has ended."""
    proc = Path("/proc", str(pid))
    try:
        found = {"host memory": int((proc / "statm").read_text().split()[1]) * PAGE,
                 "handles": len(list((proc / "fd").iterdir())), "threads": len(list((proc / "task").iterdir()))}
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # the last of one that is just ending
        return {}
    return found if device == "cpu" or not found["host memory"] else {**found, "device memory": device_memory(device)}


def device_memory(device):
    """Bytes in use on a GPU, by whomever: inside a container the driver does not tell processes apart."""
    index = device.partition(":")[2] or "0"
    told = subprocess.run(["nvidia-smi", "-i", index, "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                          capture_output=True, text=True, check=True).stdout
    return int(told) * MIB


def grows(name, values):
    """Whether a series goes up beyond noise; None for one too short to say."""
    if len(values) < FEWEST:
        return None
    quarter = len(values) // 4
    before, after = median(values[quarter:2 * quarter]), median(values[-quarter:])
    share, least = GROWTH[name]
    return after - before > max(share * before, least)


def summary(samples):
    """Of (seconds, sample) pairs, by name: first, last, max, slope per hour, number of samples, whether it grows."""
    out = {}
    samples = [(seconds, found) for seconds, found in samples if found]
    for name in samples[0][1] if samples else ():
        seconds, values = [s for s, _ in samples], [found[name] for _, found in samples]
        warm = len(values) // 4
        slope = linear_regression(seconds[warm:], values[warm:]).slope if len(values) - warm > 1 else 0.0
        out[name] = {"first": values[0], "last": values[-1], "max": max(values), "per_hour": 3600 * slope,
                     "samples": len(values), "grows": grows(name, values)}
    return out


def table(title, series):
    """Lines for a reader."""
    lines = [f"{title:34}{'first':>10}{'last':>10}{'max':>10}{'per hour':>12}{'samples':>9}  grows"]
    for name, s in series.items():
        unit, scale = (", MiB", MIB) if "memory" in name else ("", 1)
        numbers = "".join(f"{s[key] / scale:10.{1 if unit else 0}f}" for key in ("first", "last", "max"))
        verdict = {None: "too few to say", True: "YES", False: "no"}[s["grows"]]
        lines.append(f"  {name + unit:32}{numbers}{s['per_hour'] / scale:+12.2f}{s['samples']:9}  {verdict}")
    return lines
