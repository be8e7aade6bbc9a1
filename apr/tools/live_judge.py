"""What a step of training on a GPU may differ by from the reference, stage by stage, and the verdict.

Each stage is judged from the GPU's own input to it, so that roundings do not pile up: by relative L2, and by scale,
where roundings cancel. Rows count alike: one token of huge values must not hide the others. Where a sum was stored (the
residual stream after a small addition, a weight after a small update), what rounding it can cost is allowed for,
element by element.
"""

from typing import Any

import numpy as np

from apr.errors import GateError
from apr.tools.compare import relative
from apr.tools.gate import LIMITS, Limit

ID = "INV-TRAIN-PARITY"
REMEDY = ("the run ended here, the last checkpoint is from before this step; resume it on another GPU, or with "
          "--parity-every 0 to go on without this check")
STAGE = {precision: LIMITS[precision, "prompt"] for precision in ("fp32", "bf16")}  # of one layer, as the start gate's
# A sum over all rows: fp32 in another order, about 1e-5 for 16384 rows that cancel. In bf16 both factors are rounded
# alike on both sides; the limit is about what it would be if one were not.
GRADIENT = {"fp32": Limit(5e-5, 2e-5), "bf16": Limit(5e-3, 2e-3)}
LOSS = {"fp32": Limit(5e-5, 5e-5), "bf16": Limit(2e-3, 2e-3)}  # one row's: error and scale are the same here
MOMENT = Limit(1e-6, 1e-6)  # a few float32 operations, which a GPU may contract to fused ones
UPDATE = Limit(1e-5, 1e-5)  # the same with a root and a quotient
TOTAL = Limit(1e-6, 1e-6)  # losses are added in float64
# Of a stored sum, element by element. Both sides round it, but what differs in a small addition makes some elements
# fall to the other side, a unit in the last place away (2^-7 of it at most in bf16, 2^-23 in fp32). Of simulated layers
# whose additions are 1 to 1/1000 of the stream the worst used a third of limit and grain together.
GRAIN = {"fp32": 2.0**-22, "bf16": 2.0**-9}
# Of the largest score of a row: one that falls to the other side moves a loss by as much as a unit, and two may.
SCORE = {"fp32": 2.0**-18, "bf16": 2.0**-6}
FLOOR = 0.3  # of the median row: a smaller row counts as this large, where terms that cancel leave rounding


class Judge:
    """Holds stages of a step against the reference as they come; `where` is which step and what of it."""

    def __init__(self, where: str) -> None:
        self.where, self.stages = where, list[str]()
        self.worst: dict[str, Any] = {"stage": None, "relative_l2": 0.0, "limit": 0.0}
        self._share = -1.0

    def hold(self, stage: str, got: np.ndarray, want: np.ndarray, limit: Limit,
             noise: np.ndarray | None = None) -> None:
        """`got` from the GPU against `want`, (rows, …) of as many elements; `noise`, like them, is what storing cost.

        Raises GateError.
        """
        rows = want.shape[0]
        a, t = got.reshape(rows, -1).astype(np.float64), want.reshape(rows, -1).astype(np.float64)
        grain = np.zeros_like(t) if noise is None else noise.reshape(rows, -1).astype(np.float64)
        with np.errstate(all="ignore"):  # what is not finite fails below
            size = np.sqrt(np.mean(t * t, axis=1, keepdims=True))
            unit = np.maximum(grain + np.maximum(size, FLOOR * np.median(size)), np.finfo(float).tiny)
            error, scale = relative(a / unit, t / unit)
            share = float(np.linalg.norm(grain / unit)) / (float(np.linalg.norm(t / unit)) or 1.0)
        allowed, slack = limit.error + share, limit.scale + 4 * share / t.size**0.5  # roundings cancel in the scale
        if not (error <= allowed and abs(scale - 1) <= slack):
            raise GateError(f"{ID} {stage} {self.where}",
                            f"the GPU within {allowed:.3g} of the reference, its scale within {slack:.3g} of 1",
                            f"relative L2 {error:.3g}, scale {scale:.5f}", REMEDY)
        self.stages.append(stage)
        if error / allowed > self._share:
            self._share = error / allowed
            self.worst = {"stage": stage, "relative_l2": error, "limit": allowed}

    def same(self, stage: str, got: np.ndarray, want: np.ndarray) -> None:
        """`got` must be `want` to the last bit. Raises GateError."""
        if not np.array_equal(got, want):
            bad = int(np.count_nonzero(~(got == want)))
            raise GateError(f"{ID} {stage} {self.where}", "the GPU's values to be the reference's to the last bit",
                            f"{bad} of {want.size} that are not", REMEDY)
        self.stages.append(stage)
