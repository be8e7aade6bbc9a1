"""`apr qa`: the gates that a model file must pass before it is used, and the report of which ran and what they found.

A gate has passed, failed or not run; one that did not run says why and is never counted as passed. The names are
upstream's.
"""

import datetime
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from apr import driver, paths
from apr.errors import AprError, DeviceFault, FormatError, GateError, MeasureError, OutOfMemoryError, UnavailableError
from apr.strict import read_json

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
# What decides each gate, in one place; a gate that is not here has a yes or no of its own. --assert-tps,
# --assert-gpu-speedup and --regression-threshold replace the three that are the user's to set.
THRESHOLDS = {
    "tokens_per_second_cpu": 10.0,   # throughput
    "tokens_per_second_gpu": 100.0,  # throughput
    "gpu_speedup": 2.0,              # tokens per second on the GPU over those on the CPU
    "regression_percent": 10.0,      # that throughput may fall below the previous report's
    "share_of_limit": 1.0,           # parity, format_parity, golden_output: the worst error over its limit
    "std": 1e-8,                     # tensor_contract: a matrix of smaller deviation is dead (vectors may be constant)
    "max_abs_matrix": 100.0,
    "max_abs_vector": 1000.0,        # key biases of trained Qwen2 models are in the hundreds
    "mean": 10.0,
}
NOT_APPLICABLE = {"ollama_parity": "not applicable: apr has no ollama to compare with",
                  "classifier_head": "not applicable: apr computes decoders, which have none"}


@dataclass(frozen=True)
class Finding:
    """What a gate found: the verdict in words, and what was compared with what threshold, if numbers decide."""

    ok: bool
    message: str
    value: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class GateResult:
    """A gate's line in the report; `duration_ms` is 0 for one that did not run."""

    name: str
    status: str
    message: str
    value: float | None
    threshold: float | None
    duration_ms: float


class NotRun(Exception):
    """Raised by a gate that cannot run here; its text is the reason."""


@dataclass(frozen=True)
class QaReport:
    """Every gate's result, in order."""

    model: str
    device: str
    precision: str
    gates: tuple[GateResult, ...]
    min_executed: int
    total_duration_ms: float

    @property
    def executed(self) -> list[GateResult]:
        """The gates that passed or failed."""
        return [g for g in self.gates if g.status != NOT_RUN]

    @property
    def failed(self) -> list[GateResult]:
        """Those that failed."""
        return [g for g in self.gates if g.status == FAILED]

    @property
    def passed(self) -> bool:
        """Whether none failed and enough ran."""
        return not self.failed and len(self.executed) >= self.min_executed

    def plain(self) -> dict[str, Any]:
        """For JSON, with upstream's names."""
        return {"model": self.model, "passed": self.passed, "device": self.device, "precision": self.precision,
                "gates": [asdict(g) for g in self.gates], "gates_executed": len(self.executed),
                "gates_not_run": len(self.gates) - len(self.executed), "min_executed": self.min_executed,
                "total_duration_ms": self.total_duration_ms,
                "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "system_info": system_info(), **paths.override_record()}

    def require(self) -> None:
        """Raise GateError naming the gates that failed, or MeasureError when too few ran."""
        if self.failed:
            first = self.failed[0]
            others = f"; also {', '.join(g.name for g in self.failed[1:])}" if self.failed[1:] else ""
            raise GateError(f"qa {first.name}", "a gate that passes", first.message + others,
                            "the report says what each gate found")
        if len(self.executed) < self.min_executed:
            raise MeasureError("qa --min-executed", f"at least {self.min_executed} gates to run",
                               f"{len(self.executed)} of {len(self.gates)}", "the report says why the others did not")


def run_gates(model: str, device: str, precision: str, gates: Mapping[str, Callable[[], Finding]], skip: Sequence[str],
              min_executed: int) -> QaReport:
    """Run the gates in order. A DeviceFault ends it: after one nothing can be measured."""
    begin, results = time.perf_counter(), []
    for name, gate in gates.items():
        results.append(not_run(name, "skipped on request") if name in skip else run_gate(name, gate))
    results += [not_run(name, reason) for name, reason in NOT_APPLICABLE.items()]
    return QaReport(model, device, precision, tuple(results), min_executed, _milliseconds(begin))


def run_gate(name: str, gate: Callable[[], Finding]) -> GateResult:
    """One gate. What the machine lacks is a reason not to run; any other error of the model is a failure."""
    begin = time.perf_counter()
    try:
        f = gate()
    except NotRun as e:
        return not_run(name, str(e))
    except (UnavailableError, MeasureError, OutOfMemoryError) as e:
        return not_run(name, f"could not be measured: {e}")
    except DeviceFault:
        raise
    except AprError as e:
        return GateResult(name, FAILED, str(e), None, None, _milliseconds(begin))
    return GateResult(name, PASSED if f.ok else FAILED, f.message, f.value, f.threshold, _milliseconds(begin))


def not_run(name: str, reason: str) -> GateResult:
    """The line of a gate that did not run."""
    return GateResult(name, NOT_RUN, reason, None, None, 0.0)


def previous_throughput(path: Path) -> dict[str, Any]:
    """device, precision, system_info and tokens per second (`value`, None if it did not run) of an earlier report.

    Raises NotFoundError, StorageError, and FormatError for what `apr qa --json` did not write.
    """
    found = read_json(path)
    gates = found.get("gates") if isinstance(found, dict) else None
    rows = [g for g in gates if isinstance(g, dict) and g.get("name") == "throughput"] \
        if isinstance(gates, list) else []
    value: Any = rows[0].get("value") if len(rows) == 1 else False
    kinds = {"device": str, "precision": str, "system_info": dict}
    if not (value is None or (type(value) in (int, float) and value > 0)) \
            or not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise FormatError(str(path), "a report of 'apr qa --json' with its throughput", "something else",
                          "give what an earlier run printed")
    return {"value": value, **{key: found[key] for key in kinds}}


def system_info() -> dict[str, Any]:
    """The machine: cpu_model, cpu_count, gpu_model and gpu_driver (None without a GPU)."""
    cpu = platform.machine()
    with suppress(OSError):
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.M)
        cpu = named[1] if named else cpu
    found = driver.probe()
    return {"cpu_model": cpu, "cpu_count": os.cpu_count(),
            "gpu_model": found.devices[0].name if found.devices else None,
            "gpu_driver": found.driver_version if found.devices else None}


def _milliseconds(begin: float) -> float:
    return round(1e3 * (time.perf_counter() - begin), 3)
