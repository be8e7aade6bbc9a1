"""Receipts of runs of the falsifiers, and the standing of each contract that follows from them.

A receipt is recorded together with a digest of the sources: every module of apr, kernel, contract and test. Where that
digest is not the checkout's any more, what the receipt says was true of other code.
"""

import datetime
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from apr.contract import Contract, FalsifierId
from apr.driver import DriverInfo, cupy_distributions, import_cupy
from apr.errors import FormatError
from apr.files import write_atomic
from apr.strict import read_json
from apr.tools.falsify import FAULTS, NOT_RUN, Outcome, resting

RECEIPTS = ("docs/evidence/falsify-cpu.json", "docs/evidence/falsify-gpu.json")
SOURCES = ("apr/**/*.py", "apr/gemm_tables/*", "kernels/*", "contracts/*.yaml", "tests/**/*.py")
# The run of all GPU tests, which tests/gpu/receipt.py records: none failed and none was skipped.
GPU_TESTS = "docs/evidence/gpu-tests.json"
GPU_SOURCES = ("kernels/*", "apr/**/*.py", "apr/gemm_tables/*.json", "tests/gpu/*.py")
STANDINGS = {"proven": "every falsifier was run on these sources, and none is against it",
             "stale": "as proven, on sources that have changed since", "partial": "some falsifiers were not run",
             "unproven": "none was run", "red": "a falsifier survived, or its test fails"}


@dataclass(frozen=True)
class Ran:
    """What a receipt says of one falsifier."""

    outcome: Literal["killed", "held", "equivalent", "survived", "broken", "not equivalent", "not by assertion"]
    test: str
    seconds: Annotated[float, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class Receipt:
    """A run of falsifiers: the machine, the day, the digest of what was tested, and every outcome by id."""

    machine: dict[str, str]
    date: str
    digest: str
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    counts: dict[str, int]
    falsifiers: dict[FalsifierId, Ran]


@dataclass(frozen=True)
class Standing:
    """A contract's status (of STANDINGS) and the outcome of each of its falsifiers, by id."""

    status: str
    outcomes: Mapping[str, str] = field(default_factory=dict)


def digest(root: Path, patterns: Iterable[str] = SOURCES) -> str:
    """SHA-256 over the names and contents of the files that match, in the order of the names."""
    files = {p.relative_to(root).as_posix(): p for pattern in patterns for p in root.glob(pattern) if p.is_file()}
    total = hashlib.sha256()
    for name in sorted(files):
        data = files[name].read_bytes()
        total.update(f"{name}\0{len(data)}\0".encode())  # lengths, so that no two trees look alike
        total.update(data)
    return total.hexdigest()


def machine(gpu: DriverInfo | None) -> dict[str, str]:
    """What a receipt says of this machine; of its first GPU too, where one was used."""
    facts = {"python": platform.python_version(), "numpy": np.__version__, "platform": platform.platform()}
    if gpu is None:
        return facts
    cuda = ".".join(map(str, import_cupy().cuda.nvrtc.getVersion()))
    return facts | {"device": gpu.devices[0].name, "driver": gpu.driver_version, "cuda": cuda,
                    "cupy": " ".join(cupy_distributions().values())}


def write_receipt(path: Path, facts: dict[str, str], tested: str, seconds: float, counts: dict[str, int],
                  outcomes: Iterable[Outcome]) -> None:
    """Record a run; `tested` is the digest taken before it. Raises StorageError."""
    ran = {o.id: {"outcome": o.outcome, "test": o.test, "seconds": o.seconds}
           for o in sorted(outcomes, key=lambda o: o.id)}
    record = {"machine": facts, "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "digest": tested,
              "seconds": round(seconds, 1), "counts": counts, "falsifiers": ran}
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())


def read_receipt(path: Path) -> Receipt | None:
    """A receipt, None if there is no such file. Raises FormatError for a damaged one."""
    if not path.exists():
        return None
    values = read_json(path)
    try:
        receipt = msgspec.convert(values, Receipt, strict=True)
    except msgspec.ValidationError as e:
        raise _damaged(path, str(e)) from None
    if asdict(receipt) != values:  # msgspec drops keys that it does not know
        raise _damaged(path, f"other keys than {', '.join(f.name for f in fields(Receipt))}")
    return receipt


def gpu_tests_hold(root: Path) -> bool | None:
    """Whether the recorded run of all GPU tests is of these sources; None if there is none. Raises FormatError."""
    path = root / GPU_TESTS
    if not path.exists():
        return None
    values: Any = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("digest"), str):
        raise _damaged(path, "no digest")
    if [values.get(key) for key in ("failed", "skipped")] != [0, 0] or not values.get("passed"):
        raise _damaged(path, "a run in which not everything passed")
    return bool(values["digest"] == digest(root, GPU_SOURCES))


def standings(root: Path | None, contracts: Iterable[Contract]) -> dict[str, Standing]:
    """The standing of every contract, by name: computed from the receipts in the checkout, and from nothing else.

    Without a checkout (an installed package) nothing is known to have been run. Raises FormatError.
    """
    contracts = tuple(contracts)
    outcomes, fresh = dict[str, str](), dict[str, bool]()
    if root is not None:
        now, held = digest(root), gpu_tests_hold(root)
        for receipt in filter(None, (read_receipt(root / name) for name in RECEIPTS)):
            outcomes |= {name: ran.outcome for name, ran in receipt.falsifiers.items()}
            fresh |= dict.fromkeys(receipt.falsifiers, receipt.digest == now)
        for falsifier in (f for c in contracts for f in c.falsifiers if f.suite == "gpu" and f.mutant is None):
            known = outcomes.get(falsifier.id, NOT_RUN)
            if held is not None and (known == NOT_RUN or (known == "held" and not fresh[falsifier.id])):
                outcomes[falsifier.id], fresh[falsifier.id] = "held", held
    return {c.name: _standing(c, outcomes, fresh) for c in contracts}


def _standing(contract: Contract, outcomes: Mapping[str, str], fresh: Mapping[str, bool]) -> Standing:
    words = {f.id: resting(f, outcomes) for f in contract.falsifiers}
    if FAULTS.keys() & words.values():
        status = "red"
    elif set(words.values()) == {NOT_RUN}:
        status = "unproven"
    elif NOT_RUN in words.values():
        status = "partial"
    else:
        every = [name for f in contract.falsifiers for name in f.rests_on or (f.id,)]
        status = "proven" if all(fresh[name] for name in every) else "stale"
    return Standing(status, words)


def _damaged(path: Path, found: str) -> FormatError:
    return FormatError(str(path), "a receipt", found, "write it again with 'apr contracts falsify --receipt'")
