"""The live gate: while a run trains on a GPU, a step now and then is held against the reference.

Of that step a window of one sequence in one layer is computed again, each stage from what the GPU has stored as its
input: embedding, q k v after rotation, attention over every key before it, both additions to the residual stream, the
final norm, some losses; then the weight gradient of some units over every row of the batch, and AdamW on two slices.
Layers take turns. What the step changes is read before it, the rest after; nothing is written.

It does not see what a step leaves no input of: the backward pass of attention, norms and the products' inputs, for
which there is `apr bisect --train`; and with several micro-batches the gradients of those before the last.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apr.data.batch import LMBatch
from apr.dtypes import BY_NAME
from apr.errors import MeasureError
from apr.params import EMBED, NORM, ParamSpec
from apr.reference.adamw import adamw_update
from apr.reference.attention import attention_forward
from apr.reference.block import Weights, block_forward
from apr.reference.cross_entropy import cross_entropy_forward_backward
from apr.reference.global_norm import clip_factor
from apr.reference.linear import linear_forward
from apr.reference.model import head_name
from apr.reference.rmsnorm import rmsnorm_forward
from apr.reference.rope import rope_tables
from apr.reference.swiglu import swiglu_forward
from apr.rng import generator, permutation
from apr.taps import tap_name
from apr.tools.live_judge import GRADIENT, GRAIN, ID, LOSS, MOMENT, SCORE, STAGE, TOTAL, UPDATE, Judge
from apr.train.base import Trainer
from apr.train.step_view import StepView

POSITIONS = 128  # of the window, at most
SCORES = 1 << 18  # of attention in a head, window times keys: the window of a long sequence is shorter
LOSSES = 16
UNITS = 16  # whose weight gradient is computed
ROWS = 1024  # of the batch in memory at a time
TOKENS = 8192  # rows of the head that are float32 at a time
SLICE = 4096  # elements of master, m and v
FFN_NORM = "model.layers.{}.post_attention_layernorm.weight"
GATE = "model.layers.{}.mlp.gate_proj.weight"


@dataclass(frozen=True)
class Moments:
    """A slice of the optimizer's state: where it lies in flat memory, and float32 copies from before the step."""

    spec: ParamSpec
    start: int
    master: np.ndarray
    m: np.ndarray
    v: np.ndarray


@dataclass(frozen=True)
class Taken:
    """What was chosen for a step and read before it. `params`: the layer's and the final norm, float32, by name."""

    view: StepView
    part: LMBatch
    whole: bool  # the step is this one part
    layer: int
    sequence: int
    start: int
    stop: int
    units: np.ndarray
    params: dict[str, np.ndarray]
    head: np.ndarray
    embedded: np.ndarray
    moments: list[Moments]


class LiveGate:
    """Watch of a run (apr/train/real_run.py): checks every `every`-th step, from 1 on, and the first that it sees.

    What it looks at is a pure function of `seed` and the step.
    """

    def __init__(self, every: int, seed: int) -> None:
        self.every, self.seed = every, seed
        self.first, self.seconds = True, 0.0
        self.taken: Taken | None = None

    def due(self, step: int) -> bool:
        """Whether this step is to be checked."""
        return self.first or step % self.every == 0

    def before(self, trainer: Trainer, step: int, micro: Sequence[LMBatch]) -> None:
        """Choose, and read what the step is going to change. Raises MeasureError for a trainer that shows nothing."""
        begin, self.first, view = time.perf_counter(), False, trainer.view()
        if view is None:
            raise MeasureError(f"{ID} at step {step}", "a trainer whose buffers can be read", type(trainer).__name__,
                               "leave --parity-every to a GPU")
        self.taken = self._take(trainer, view, step, view.parts(micro))
        self.seconds = time.perf_counter() - begin

    def after(self, trainer: Trainer, step: int, lr: float) -> dict[str, Any] | None:
        """Check the step; `lr` is what it was given. None where nothing was applied: other guards say why.

        Raises GateError naming the first stage that differs.
        """
        begin, taken, stats = time.perf_counter(), self.taken, trainer.last_stats
        self.taken = None
        if taken is None or stats is None or not stats.applied:
            return None
        judge = Judge(f"at step {step}, layer {taken.layer}, sequence {taken.sequence}, positions {taken.start} to "
                      f"{taken.stop - 1}")
        check = Check(trainer, taken, judge)
        check.layer()
        check.losses()
        if taken.whole:
            check.gradient()
        check.optimizer(lr)
        self.seconds += time.perf_counter() - begin
        return {"event": "parity", "step": step, "layer": taken.layer, "sequence": taken.sequence,
                "positions": [taken.start, taken.stop], "worst": judge.worst, "checks": len(judge.stages),
                "gradient": taken.whole, "ms": round(self.seconds * 1000, 1)}

    def _take(self, trainer: Trainer, view: StepView, step: int, parts: Sequence[LMBatch]) -> Taken:
        c, part, rng = trainer.model, parts[-1], generator(self.seed, "parity", step)
        layer = int(permutation(c.L, self.seed, "parity layers")[step // self.every % c.L])
        length = min(part.seq_len, POSITIONS, max(LOSSES, SCORES // part.seq_len))
        start = int(rng.integers(part.seq_len - length + 1))
        sequence, stop = int(rng.integers(part.batch_size)), start + length
        own = [s for s in trainer.layout.specs if s.name.startswith(f"model.layers.{layer}.")]
        params = {s.name: view.stored(s).astype(np.float32) for s in trainer.layout.specs if s in own or s.name == NORM}
        begin = trainer.layout.offset(EMBED)
        embedded = [view.flat("params", begin + int(i) * c.C, begin + (int(i) + 1) * c.C)
                    for i in part.inputs[sequence, start:stop]]
        head = next(s for s in trainer.layout.specs if s.name == head_name(c))
        shared = [s for s in trainer.layout.specs if not s.name.startswith("model.layers.")]
        slices = [_moments(trainer, view, rng, [s for s in own + shared if s.decay is decay])
                  for decay in (True, False)]
        units = np.sort(rng.choice(2 * c.F, min(UNITS, 2 * c.F), replace=False))
        return Taken(view, part, len(parts) == 1, layer, sequence, start, stop, units, params, view.stored(head),
                     np.stack(embedded), slices)


def _moments(trainer: Trainer, view: StepView, rng: np.random.Generator, specs: Sequence[ParamSpec]) -> Moments:
    """A slice of one of the parameters."""
    spec = specs[int(rng.integers(len(specs)))]
    size = min(SLICE, spec.size)
    start = trainer.layout.offset(spec.name) + int(rng.integers(spec.size - size + 1))
    master, m, v = (np.array(view.flat(name, start, start + size)) for name in ("master", "m", "v"))
    return Moments(spec, start, master, m, v)


class Check:
    """The checks of one step: what was taken before it against what it left. Each raises GateError."""

    def __init__(self, trainer: Trainer, taken: Taken, judge: Judge) -> None:
        self.trainer, self.taken, self.judge, self.view = trainer, taken, judge, taken.view
        self.config, self.precision = trainer.model, taken.view.precision
        first = taken.sequence * taken.part.seq_len
        self.begin, self.rows = first, (first + taken.start, first + taken.stop)

    def layer(self) -> None:
        """The window through one layer, and the final norm."""
        c, t, limit = self.config, self.taken, STAGE[self.precision]
        self.judge.same("embedding", self._window("residual", 0), t.embedded)
        x, middle, out = (self._window("residual", 2 * t.layer + i).astype(np.float32) for i in range(3))
        heads = self.view.rows("qkv", t.layer, self.begin, self.rows[1]).astype(np.float32)  # from the first key on
        q, k, v = np.split(heads, [c.NH * c.HS, (c.NH + c.NKV) * c.HS], axis=1)
        atty = self._window("atty", t.layer).astype(np.float32)
        got = {"q_rope": q[t.start:], "k_rope": k[t.start:], "v_bias": v[t.start:]}

        def look(stage: str, array: np.ndarray) -> None:
            if stage in got:
                self.judge.hold(tap_name(stage, t.layer), got[stage], array[0], limit)
            elif stage == "attn_out":
                self._added(stage, x, array[0], middle)

        def attend(q_own: np.ndarray, _k: np.ndarray, _v: np.ndarray,
                   scale: float) -> tuple[np.ndarray, np.ndarray]:
            want, prob = attention_forward(q[None, t.start:].reshape(q_own.shape), k.reshape(1, -1, c.NKV, c.HS),
                                           v.reshape(1, -1, c.NKV, c.HS), scale)
            self.judge.hold(tap_name("attn_heads", t.layer), atty, want[0], limit)
            return atty.reshape(q_own.shape), prob

        tables = rope_tables(np.arange(t.start, t.stop), c.HS, c.rope_theta, c.rope_scaling, x.dtype)
        block_forward(t.params, c, t.layer, x[None], tables, None, look, attend)
        w = Weights(t.params, t.layer)  # the MLP again, from the stream that the GPU has in the middle of the layer
        norm = rmsnorm_forward(middle, w["post_attention_layernorm.weight"], c.rms_norm_eps)[0]
        act = swiglu_forward(linear_forward(norm, w["gate_proj.weight"]), linear_forward(norm, w["up_proj.weight"]))
        self._added("ffn_out", middle, linear_forward(act, w["down_proj.weight"]), out)
        last = self._window("residual", 2 * c.L).astype(np.float32)
        want = rmsnorm_forward(last, t.params[NORM], c.rms_norm_eps)[0]
        self.judge.hold("final_norm", self._window("final_norm"), want, limit)

    def _added(self, stage: str, given: np.ndarray, branch: np.ndarray, stored: np.ndarray) -> None:
        """`stored` is `given` and `branch`: both sides round, which swallows what is small beside the stream."""
        want = self._as_stored(given + self._as_stored(branch)) - given
        self.judge.hold(tap_name(stage, self.taken.layer), stored - given, want, STAGE[self.precision],
                        GRAIN[self.precision] * np.abs(stored))

    def losses(self) -> None:
        """The losses at the window's last positions, and the sum that the step reported."""
        t, stats, stop = self.taken, self.trainer.last_stats, self.rows[1]
        start = max(self.rows[0], stop - LOSSES)
        final = self.view.rows("final_norm", None, start, stop).astype(np.float32)
        scores = np.concatenate([final @ t.head[i:i + TOKENS].astype(np.float32).T
                                 for i in range(0, self.config.V, TOKENS)], axis=1)
        noise = SCORE[self.precision] * np.abs(scores).max(axis=1, keepdims=True)
        targets = t.part.targets.reshape(-1)[start:stop]
        want = cross_entropy_forward_backward(self._as_stored(scores), targets, None)
        got = self.view.rows("losses", None, 0, t.part.inputs.size)
        for i, row in enumerate(range(start, stop)):
            self.judge.hold(f"loss of position {row - self.begin}", got[row:row + 1], want[i:i + 1],
                            LOSS[self.precision], noise[i])
        if t.whole and stats is not None:
            self.judge.hold("sum of the losses", np.array([stats.loss * stats.tokens]),
                            got.sum(dtype=np.float64, keepdims=True), TOTAL)

    def gradient(self) -> None:
        """The weight gradient of some gate and up units: their gradient times the normalised input, over all rows."""
        c, t, norm = self.config, self.taken, self.taken.params[FFN_NORM.format(self.taken.layer)]
        want, n = np.zeros((t.units.size, c.C)), t.part.inputs.size
        for start in range(0, n, ROWS):
            stop = min(start + ROWS, n)
            middle = self.view.rows("residual", 2 * t.layer + 1, start, stop).astype(np.float32)
            dunits = self.view.rows("gate_up", t.layer, start, stop)[:, t.units].astype(np.float32)
            want += dunits.T @ self._as_stored(rmsnorm_forward(middle, norm, c.rms_norm_eps)[0])
        begin = self.trainer.layout.offset(GATE.format(t.layer))
        got = np.stack([self.view.flat("grads", begin + int(u) * c.C, begin + (int(u) + 1) * c.C) for u in t.units])
        self.judge.hold(tap_name("gate_up weight gradient", t.layer), got, want, GRADIENT[self.precision])

    def optimizer(self, lr: float) -> None:
        """AdamW on the slices, with the gradients that the step left and the norm that it reported."""
        c, stats = self.trainer.config, self.trainer.last_stats
        assert stats is not None
        for s in self.taken.moments:
            master, m, v = s.master.copy(), s.m.copy(), s.v.copy()
            now = {name: self.view.flat(name, s.start, s.start + master.size)
                   for name in ("master", "m", "v", "grads", "params")}
            adamw_update(master, m, v, now["grads"], lr=lr, beta1=c.beta1, beta2=c.beta2, eps=c.adam_eps,
                         weight_decay=c.weight_decay if s.spec.decay else 0.0, step=self.trainer.step,
                         grad_scale=clip_factor(stats.grad_norm, c.max_grad_norm))
            for name, want in (("m", m), ("v", v)):
                self.judge.hold(f"AdamW's {name} of {s.spec.name}", now[name][None], want[None], MOMENT,
                                np.full((1, want.size), np.finfo(np.float32).tiny))
            self.judge.hold(f"update of {s.spec.name}", (now["master"] - s.master)[None], (master - s.master)[None],
                            UPDATE, GRAIN["fp32"] * np.abs(master))
            self.judge.same(f"copy of {s.spec.name} that kernels read", now["params"].astype(np.float32),
                            self._as_stored(now["master"]))

    def _window(self, name: str, layer: int | None = None) -> np.ndarray:
        return self.view.rows(name, layer, *self.rows)

    def _as_stored(self, array: np.ndarray) -> np.ndarray:
        """Rounded to what the GPU keeps it as, in float32."""
        return array.astype(BY_NAME["BF16"].numpy).astype(np.float32) if self.precision == "bf16" else array
