"""Bisect: the first place where a GPU departs from the reference, what it did there, and the contract that this breaks.

A model goes through the GPU as `apr run` would put it (a prompt, then decoding over the key/value cache), or as a
training would (forward, loss, backward, two updates). Then, in the order of the data:

    H4D.1  every parameter on the GPU against the file, byte for byte
    H4D.2  every stage against the reference's op on the inputs that the GPU had there
    H4D.3  the cross-entropy, in training and in evaluation, and the buffer that both share
    H4D.4  gradient norm, clipping and AdamW

The numbers are upstream's (docs/debugging.md). Inputs of a stage were outputs of stages already found right, so what
fails first is what is wrong; `explain` then looks for the fault that would have made this very result.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from apr.config import IGNORE, TransformerConfig, TransformerTrainConfig
from apr.data.batch import LMBatch
from apr.formats.source import ModelSource
from apr.params import ParamSpec, param_specs
from apr.strict import plain
from apr.taps import Recorder, Tap
from apr.tools.causes import Cause, contract_of, explain
from apr.tools.checks import Check, run_steps
from apr.tools.compare import Difference, difference
from apr.tools.dataflow import decoding_checks, exact, forward_checks
from apr.tools.formulas import FORMULAS
from apr.tools.gate import Limit
from apr.tools.gradient_flow import backward_checks, loss_checks, optimizer_checks, sample
from apr.tools.weights import TensorFault, Weights

LENGTH, STEPS, LONGER = 70, 8, 100  # tokens of the prompt, decoding steps, tokens of the sequence before it
ROWS, TOKENS = 2, 33  # of the training batch
UPDATES = 2  # the second starts from moments that are not zero
UPLOAD = 1e-6  # relative L2 from which a pattern is looked for in a parameter that differs
RATE = 0.05  # so large that the rounding of a parameter does not hide its change

# Of healthy models the worst is a third of these (docs/numerics.md). Gradients of attention are differences of numbers
# that nearly cancel, so they have limits of their own.
LIMITS = {"fp32": Limit(1e-5, 2e-6), "bf16": Limit(6e-3, 2e-3)}
CANCELLING = {"fp32": Limit(2e-5, 4e-6), "bf16": Limit(3e-2, 5e-3)}
CANCELLING_OPS = ("attention_dq", "attention_dk", "attention_dv")


def limit_of(check: Check, precision: str) -> Limit:
    """The limit of a check in a precision."""
    limits = CANCELLING if check.steps[-1].op in CANCELLING_OPS else LIMITS
    return limits["fp32" if check.exact else precision]


@dataclass(frozen=True)
class Finding:
    """A stage that is wrong."""

    phase: str
    stage: str
    relative_l2: float
    scale: float
    max_abs: float
    not_finite: int
    limit: float
    cause: Cause
    contract: str


@dataclass
class Phase:
    """One part of the search: how many checks it made, how many it could not (their inputs are not finite), the worst
    that passed, and what it found.

    `floors`: the worst relative L2 that passed of each kind of stage, all layers together (`attn_norm`, `grad`, …).
    """

    name: str
    checks: int = 0
    unjudged: int = 0
    worst_stage: str = ""
    worst: float = 0.0  # relative L2
    floors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)


class Subject(Protocol):
    """A model on a GPU."""

    precision: str

    def byte_faults(self, source: ModelSource) -> Iterator[tuple[str, TensorFault | None]]:
        """As weights.byte_faults."""

    def stored(self, spec: ParamSpec) -> np.ndarray:
        """A parameter as the kernels read it."""


class Generating(Subject, Protocol):
    """One that generates: CudaEngine, through subjects.EngineSubject."""

    S: int

    def record(self, ids: list[int], cached: int, tap: Tap | None) -> dict[str, np.ndarray]:
        """ids through slot 0, the first `cached` as a prompt.

        Returns what is then in the cache, by `L00.k_cache`, `L00.v_cache` and so on: (1, T, NKV, HS).
        """

    def generate(self, ids: list[int], count: int) -> list[int]:
        """The tokens that follow ids, the likeliest each time, by the path that `apr run` takes."""


class Training(Subject, Protocol):
    """One that trains: CudaTransformerTrainer, through subjects.TrainerSubject."""

    config: TransformerTrainConfig

    def gradients(self, batch: LMBatch, dloss: float, tap: Tap) -> np.ndarray:
        """Forward and backward; the losses (N,) by row."""

    def evaluate(self, batch: LMBatch) -> tuple[np.ndarray, float]:
        """The losses (N,) by row, and their sum, without gradients."""

    def scores(self, ids: np.ndarray) -> np.ndarray:
        """Logits (B, T, V), float32."""

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """master, m and v, each by parameter, copies."""

    def grads(self) -> dict[str, np.ndarray]:
        """The last gradients by parameter, copies."""

    def update(self, batch: LMBatch, lr: float) -> tuple[float, int]:
        """One step of training: the gradient norm that it found, and the number of the update."""


def judge(check: Check, phase: str, limit: Limit) -> tuple[float, Finding | None]:
    """The check's relative L2, and a Finding where that or the scale is beyond the limit."""
    truth = np.asarray(run_steps(check, FORMULAS))
    check = replace(check, got=check.got.reshape(truth.shape),
                    before=None if check.before is None else check.before.reshape(truth.shape))
    d = difference(check.got, truth)
    if d.relative_l2 <= limit.error and abs(d.scale - 1) <= limit.scale:
        return d.relative_l2, None
    cause = explain(check, limit.error) or Cause("unknown", "the scale is off by more than the limit", d.scale,
                                                 d.relative_l2, check.steps[-1].op)
    return d.relative_l2, finding_of(phase, check.stage, d, limit.error, cause, contract_of(cause.op, cause.kind))


def finding_of(phase: str, stage: str, d: Difference, limit: float, cause: Cause, contract: str) -> Finding:
    """The finding of a stage that differs by `d`."""
    return Finding(phase, stage, d.relative_l2, d.scale, d.max_abs, d.nans + d.infs, limit, cause, contract)


class Bisection:
    """The search, phase by phase; it stops at the first finding unless `everything`. `say` is told of each phase."""

    def __init__(self, source: ModelSource, subject: Subject, seed: int = 0, everything: bool = False,
                 say: Callable[[Phase], None] = lambda phase: None) -> None:
        self.source, self.subject, self.everything, self.say = source, subject, everything, say
        self.c: TransformerConfig = source.config
        self.rng = np.random.default_rng(seed)
        self.weights = Weights(source, subject.precision)
        self.phases: list[Phase] = []

    @property
    def findings(self) -> list[Finding]:
        """All of them, in the order of the data."""
        return [f for phase in self.phases for f in phase.findings]

    def over(self) -> bool:
        """Whether the search has what it looked for."""
        return bool(self.findings) and not self.everything

    def report(self) -> dict[str, Any]:
        """What was checked and found, for JSON; numbers that are none are null."""
        found: dict[str, Any] = plain({
            "model": str(self.source.path), "precision": self.subject.precision,
            "phases": [{**asdict(p), "findings": len(p.findings)} for p in self.phases],
            "findings": self.findings})
        return found

    def inference(self, subject: Generating) -> None:
        """Prompt and decoding. Raises as the engine."""
        self._uploads()
        if self.over():
            return
        longest = min(subject.S, self.c.max_position_embeddings)
        total = min(LENGTH + STEPS, max(longest - 1, 2))
        n = total - min(STEPS, total - 1)
        ids = self._ids(total)
        before = subject.record(self._ids(min(LONGER, longest)), 0, None)  # by decoding, so that the cache is full
        recorder = Recorder()
        cache = subject.record(ids, n, recorder)
        array, seen = np.array([ids]), {**recorder.arrays(), **cache}
        self._run("H4D.2 prompt", forward_checks({name: a[:, :n] for name, a in seen.items()}, self.c, self.weights,
                                                 array[:, :n]))
        self._run("H4D.2 decoding", decoding_checks(seen, before, self.c, self.weights, array, n))
        self._generation(subject, ids[:n], total - n)

    def _generation(self, subject: Generating, prompt: list[int], count: int) -> None:
        """Tokens that `generate` chose against the scores of decoding, a stage found right: each had the largest."""
        if self.over():
            return
        start, phase, first = time.monotonic(), self._begin("H4D.2 generation"), len(prompt) - 1
        tokens, recorder = subject.generate(prompt, count), Recorder()
        subject.record(prompt + tokens, first, recorder)
        scores = recorder.arrays()["logits"][0, first:-1]
        chosen = scores[np.arange(len(tokens)), tokens]
        d, wrong = difference(chosen, scores.max(-1)), np.flatnonzero(chosen < scores.max(-1))
        phase.checks = len(tokens)
        if wrong.size or len(tokens) != count:
            where = int(wrong[0]) if wrong.size else len(tokens)
            text = f"{len(tokens)} of {count} tokens, token {where} and {max(wrong.size - 1, 0)} more not the likeliest"
            cause = Cause("tokens", text, float(where), d.relative_l2, "sampling")
            phase.findings.append(finding_of(phase.name, "generated", d, 0.0, cause, "sampling-v1"))
        self._end(phase, start)

    def training(self, subject: Training) -> None:
        """Forward, loss, backward and updates. Raises as the trainer."""
        self._uploads()
        if self.over():
            return
        batch, other = self._batch(ROWS, TOKENS), self._batch(1, TOKENS - 2)
        dloss, recorder = 1.0 / batch.num_tokens, Recorder()
        losses = subject.gradients(batch, dloss, recorder)
        grads, seen = subject.grads(), recorder.arrays()
        self._run("H4D.2 forward", forward_checks(seen, self.c, self.weights, batch.inputs))
        self._run("H4D.3 loss", loss_checks(seen, losses, batch.targets, dloss))
        self._run("H4D.2 backward", backward_checks(seen, grads, self.c, self.weights, batch.inputs))
        self._run("H4D.3 evaluation", self._evaluation(subject, (other, batch)))
        self._run("H4D.4 optimizer", self._updates(subject, batch))

    def _evaluation(self, subject: Training, batches: Iterable[LMBatch]) -> Iterator[Check]:
        """A batch smaller than the one before it, whose scores lie where that one's gradients were; then that again."""
        for batch in batches:
            losses, total = subject.evaluate(batch)
            scores = {"logits": subject.scores(batch.inputs)}
            yield from loss_checks(scores, losses, batch.targets, None)
            yield exact("eval_sum", np.array([total]), "loss_sum", losses=losses)

    def _updates(self, subject: Training, batch: LMBatch) -> Iterator[Check]:
        old, specs = subject.state(), tuple(param_specs(self.c))
        for _ in range(UPDATES):
            norm, count = subject.update(batch, RATE)
            new = subject.state()
            yield from optimizer_checks(specs, old, new, subject.grads(), norm, subject.config, count, RATE)
            for spec in specs if subject.precision == "bf16" else ():
                stored = sample(subject.stored(spec))
                yield exact(f"rounded.{spec.name}", stored.astype(np.float32), "identity",
                            x=sample(new["master"][spec.name]).astype(stored.dtype).astype(np.float32))
            old = new

    def _uploads(self) -> None:
        start, phase = time.monotonic(), self._begin("H4D.1 uploads")
        specs = {s.name: s for s in param_specs(self.c)}
        for name, fault in self.subject.byte_faults(self.source):
            phase.checks += 1
            if fault is not None and not self.over():
                phase.findings.append(self._upload(phase.name, specs[name], fault))
        self._end(phase, start)

    def _upload(self, phase: str, spec: ParamSpec, fault: TensorFault) -> Finding:
        """What is wrong with a parameter: which elements, and the pattern that they make if they make one."""
        got, file = self.subject.stored(spec).astype(np.float32), self.weights.read(spec.name)
        check, d = exact(f"upload.{spec.name}", got, "identity", x=file), difference(got, file)
        place = ", ".join(map(str, np.unravel_index(fault.index, spec.shape)))
        text = (f"{fault.count} of {fault.elements} elements are not the file's, the first at [{place}]: "
                f"{fault.found:g} for {fault.expected:g}")
        cause = explain(check, UPLOAD) or Cause("bits", "a few bits differ", None, d.relative_l2, "identity")
        return finding_of(phase, check.stage, d, 0.0, replace(cause, text=f"{cause.text}; {text}"),
                          contract_of("upload", cause.kind))

    def _run(self, name: str, checks: Iterable[Check]) -> None:
        if self.over():
            return
        start, phase = time.monotonic(), self._begin(name)
        for check in checks:
            if not all(bool(np.isfinite(v).all()) for v in check.values.values() if isinstance(v, np.ndarray)):
                phase.unjudged += 1  # what follows from numbers that are none tells nothing
                continue
            error, finding = judge(check, name, limit_of(check, self.subject.precision))
            phase.checks += 1
            if finding is not None:
                phase.findings.append(finding)
                if self.over():
                    break
                continue
            kind = check.stage.partition(".")[2 if check.stage.startswith("L") else 0]
            phase.floors[kind] = max(error, phase.floors.get(kind, 0.0))
            if error >= phase.worst:
                phase.worst, phase.worst_stage = error, check.stage
        self._end(phase, start)

    def _begin(self, name: str) -> Phase:
        phase = Phase(name)
        self.phases.append(phase)
        return phase

    def _end(self, phase: Phase, start: float) -> None:
        phase.seconds = round(time.monotonic() - start, 3)
        self.say(phase)

    def _ids(self, count: int) -> list[int]:
        """Token ids, all different where the vocabulary has as many; the last repeats an early one."""
        ids = self.rng.permutation(self.c.V)[:count] if count <= self.c.V else self.rng.integers(0, self.c.V, count)
        ids[-1] = ids[count // 3]
        return [int(i) for i in ids]

    def _batch(self, rows: int, length: int) -> LMBatch:
        length = min(length, self.c.max_position_embeddings)
        ids = np.array(self._ids(rows * (length + 1)), np.int32).reshape(rows, length + 1)
        targets = ids[:, 1:].copy()
        targets[:, length // 2] = IGNORE
        return LMBatch(ids[:, :-1].copy(), targets)
