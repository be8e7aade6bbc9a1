"""The start gate: before a GPU's text is believed, a short forward of the loaded weights is held against NumPy's.

A few tokens go through the GPU twice, as a prompt and as decoding steps. The reference, on the weights of the file,
computes each layer three times at once: from its own input, and from what the GPU had there as prompt and in decoding;
the last two are judged stage by stage, so the first that differs names the fault and roundings do not pile up. Then the
scores are judged from end to end, at every position.

The verdict is remembered by what it depends on: weights, apr's sources, device, driver, library, precision, overrides.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apr import driver, paths
from apr.errors import FormatError, GateError, StorageError
from apr.files import write_atomic
from apr.formats.source import ModelSource
from apr.infer.cuda_engine import CudaEngine
from apr.params import EMBED, NORM
from apr.reference.block import block_forward
from apr.reference.linear import linear_forward
from apr.reference.model import head_name
from apr.reference.rmsnorm import rmsnorm_forward
from apr.reference.rope import rope_tables
from apr.strict import read_json
from apr.taps import Recorder, expected_names, layer_tap, tap_name
from apr.tools.compare import relative
from apr.tools.weights import Weights

ID = "FALSIFY-CPU-GPU-003"  # the gate at the start of `apr run`, in apr-cpu-vs-gpu-output-parity-v1
REMEDY = "do not use what this GPU writes: --no-gpu runs on the CPU, 'apr doctor' shows what is here"
TOKENS = 8
FUSED = {"attn_norm", "q_linear", "k_linear", "v_linear", "q_norm", "k_norm", "q_rope", "attn_out", "ffn_norm",
         "ffn_gate", "ffn_up", "ffn_silu", "ffn_out", "final_norm"}  # stages inside a kernel of decoding
NEAR = 0.02  # of the spread of the scores: two that are closer may change places in bf16


@dataclass(frozen=True)
class Limit:
    """What a stage may differ by, given its inputs: relative L2, and the scale of the whole, where roundings cancel."""

    error: float
    scale: float


# Of one layer, from equal inputs. fp32: sums in another order. bf16: in a prompt every stage is rounded to 8 bits,
# which leaves about 3e-3; in decoding only the cache is.
LIMITS = {("fp32", "prompt"): Limit(5e-5, 2e-5), ("fp32", "decoding"): Limit(5e-5, 2e-5),
          ("bf16", "prompt"): Limit(2e-2, 5e-3), ("bf16", "decoding"): Limit(1e-2, 3e-3)}
WHOLE = {"fp32": 1e-3, "bf16": 0.25}  # scores, from end to end, at each position


def start_gate(engine: CudaEngine, source: ModelSource, warn: Callable[[str], None]) -> dict[str, Any]:
    """Hold the engine against the reference, unless this was done before or SKIP_PARITY_GATE=1 says not to.

    Returns what is to be reported: status (passed, remembered or skipped), worst stage, worst position, seconds. `warn`
    is told of a gate that was skipped. Raises GateError naming the first layer and stage that differs.
    """
    if paths.skip_parity_gate():
        warn("the start gate is skipped (SKIP_PARITY_GATE=1): this GPU's output was not checked against the reference")
        return {"status": "skipped", "reason": "SKIP_PARITY_GATE=1"}
    begin, key = time.monotonic(), _key(engine)
    folder = engine.dev.cache.store.path
    remembered = _recall(folder, key)
    if remembered is not None:
        return {**remembered, "status": "remembered"}
    report = check(engine, source)
    report["seconds"] = round(time.monotonic() - begin, 3)
    if folder is not None:
        try:
            write_atomic(folder / f"gate-{key}.json", json.dumps(report).encode())
        except StorageError as e:
            warn(f"the start gate's verdict is not kept: {e}")
    return {**report, "status": "passed"}


def check(engine: CudaEngine, source: ModelSource) -> dict[str, Any]:
    """The comparison itself. Raises GateError."""
    c, length = source.config, min(TOKENS, engine.S)  # what the file says, not what the engine made of it
    ids = np.random.default_rng(0).integers(0, c.V, length).tolist()
    prompt, steps = Recorder(), Recorder()
    engine.scores([ids], [length], prompt)
    engine.scores([ids], [0], steps)
    seen = {way: {name: array[0] for name, array in recorder.arrays().items()}
            for way, recorder in (("prompt", prompt), ("decoding", steps))}
    _check_names(engine, seen)
    judge = _Judge(engine.precision, seen)
    weights = Weights(source, engine.precision)
    table = weights.read(EMBED)
    x = np.stack([table[ids]] * 3)
    judge.stage("embedding", x)
    tables = rope_tables(np.arange(length), c.HS, c.rope_theta, c.rope_scaling, x.dtype)
    for layer, params in weights.layers(c.L):
        given = tap_name("output", layer - 1) if layer else "embedding"
        x[1], x[2] = seen["prompt"][given], seen["decoding"][given]
        x = block_forward(params, c, layer, x, tables, None, layer_tap(judge.stage, layer))
    last = tap_name("output", c.L - 1)
    x[1], x[2] = seen["prompt"][last], seen["decoding"][last]
    normed = rmsnorm_forward(x, weights.read(NORM), c.rms_norm_eps)[0]
    scores = linear_forward(normed, table if head_name(c) == EMBED else weights.read(head_name(c)))
    judge.stage("logits", scores)
    return {"tokens": length, "worst_stage": judge.worst, **judge.whole(scores[0])}


def _check_names(engine: CudaEngine, seen: dict[str, dict[str, np.ndarray]]) -> None:
    """A stage that was not seen is not a stage that agrees."""
    names = expected_names(engine.config.L, engine.config.qk_norm)
    for which, wanted in (("prompt", names), ("decoding", [n for n in names if n.split(".")[-1] not in FUSED])):
        missing = [n for n in wanted if n not in seen[which]]
        if missing:
            raise GateError(f"{ID} {which}", "every stage to be seen", f"{len(missing)} missing, {missing[0]} first",
                            "this is a defect of apr: report it")


class _Judge:
    """Holds the stages of the GPU against those of the reference, as these come."""

    def __init__(self, precision: str, seen: dict[str, dict[str, np.ndarray]]) -> None:
        self.precision, self.seen = precision, seen
        self.worst: dict[str, Any] = {"stage": None, "way": None, "relative_l2": 0.0}
        self.share = 0.0

    def stage(self, name: str, array: np.ndarray) -> None:
        """The reference's stage (3, T, …): by itself, from the prompt's input, from decoding's."""
        for row, way in ((1, "prompt"), (2, "decoding")):
            if name in self.seen[way]:
                self._judge(name, way, self.seen[way][name], array[row])

    def _judge(self, name: str, way: str, gpu: np.ndarray, truth: np.ndarray) -> None:
        limit = LIMITS[self.precision, way]
        gpu = gpu.reshape(truth.shape)
        error, scale = relative(gpu, truth)
        if not (error <= limit.error and abs(scale - 1) <= limit.scale):
            raise GateError(f"{ID} {name} ({way})",
                            f"the GPU within {limit.error:g} of the reference, its scale within {limit.scale:g} of 1",
                            f"relative L2 {error:.3g}, scale {scale:.5f}",
                            REMEDY)
        if error / limit.error >= self.share:
            self.share = error / limit.error
            self.worst = {"stage": name, "way": way, "relative_l2": error, "limit": limit.error}

    def whole(self, truth: np.ndarray) -> dict[str, Any]:
        """Scores (T, V) from end to end: every position, and its largest score; ties are counted."""
        worst, ties = 0.0, 0
        for way, stages in self.seen.items():
            for position, (gpu, cpu) in enumerate(zip(stages["logits"], truth, strict=True)):
                error, _ = relative(gpu, cpu)
                mine, theirs = int(gpu.argmax()), int(cpu.argmax())
                near = float(cpu[theirs] - cpu[mine]) <= NEAR * float(np.ptp(cpu))
                if not (error <= WHOLE[self.precision] and near):
                    raise GateError(f"{ID} logits at position {position} ({way})",
                                    f"relative L2 at most {WHOLE[self.precision]:g} and token {theirs} the likeliest",
                                    f"{error:.3g} and token {mine}", REMEDY)
                worst, ties = max(worst, error), ties + (mine != theirs)
        return {"logits_relative_l2": worst, "near_ties": ties}


def _key(engine: CudaEngine) -> str:
    """Everything that the verdict depends on."""
    found, cupy = driver.probe(), driver.cupy_distributions()
    facts = [engine.weights_sha256, _sources_sha256(), engine.dev.name, found.driver_version, engine.net.gemm.version,
             sorted(cupy.items()), engine.dev.cache.toolchain, engine.precision, engine.B, paths.overrides()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _sources_sha256() -> str:
    """Of every source of apr and of the kernels."""
    digest, package = hashlib.sha256(), Path(paths.__file__).parent
    for path in sorted([*package.rglob("*.py"), *paths.kernels_dir().glob("*.cu*"), *package.rglob("*.json")]):
        digest.update(f"{path.name} {path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _recall(folder: Path | None, key: str) -> dict[str, Any] | None:
    """The verdict of before, from the kernel cache's folder, which is the user's alone."""
    if folder is None or not (folder / f"gate-{key}.json").is_file():
        return None
    try:
        found = read_json(folder / f"gate-{key}.json")
    except (FormatError, StorageError):
        return None
    return found if isinstance(found, dict) else None
