"""AdamW with clipping over flat memory, and the copy of the weights that kernels read: kernels/adamw.cu."""

from typing import Any

import numpy as np

from apr.config import TransformerTrainConfig
from apr.device import Device
from apr.kernel import Baked, KernelSpec, blocks

BAKED = ("FLOATX",)
PREPARE = KernelSpec("adamw.cu", "adamw_prepare", BAKED,
                     ("factors:f32*", "stats:f64*", "step:const f64*", "beta1:f64", "beta2:f64", "decay:f64",
                      "max_norm:f64"))
UPDATE = KernelSpec("adamw.cu", "adamw_update", BAKED,
                    ("master:f32*", "m:f32*", "v:f32*", "params:floatX*?", "grads:const f32*", "factors:const f32*",
                     "stats:const f64*", "size:i64", "decay_end:i64", "beta1:f32", "one_minus_beta1:f32", "beta2:f32",
                     "one_minus_beta2:f32", "eps:f32"))
ROUND = KernelSpec("adamw.cu", "adamw_round", BAKED, ("params:floatX*", "master:const f32*", "size:i64"))
SPECS = (PREPARE, UPDATE, ROUND)


def adamw_baked(storage: str) -> Baked:
    """The baked values of all three kernels."""
    return {"FLOATX": storage}


def adamw_update(dev: Device, master: Any, m: Any, v: Any, params: Any, grads: Any, factors: Any, stats: Any, step: Any,
                 decay_end: int, config: TransformerTrainConfig, storage: str) -> None:
    """One update of master, m, v (P,) f32 and their rounded copy params (P,), None where master is what kernels read.

    grads (P,) f32; step (2,) f64: dloss and lr; stats (4,) f64: sum of losses and gradient norm are read, applied and
    the count of updates written; factors (4,) f32 is scratch. The first decay_end elements are decayed. Where loss or
    norm is not finite nothing is changed and applied is 0.
    """
    c, baked, f32, f64 = config, adamw_baked(storage), np.float32, np.float64
    dev.launch(PREPARE, baked, (1,), (1,), (factors, stats, step, f64(c.beta1), f64(c.beta2), f64(c.weight_decay),
                                            f64(c.max_grad_norm)))
    dev.launch(UPDATE, baked, (blocks(master.size, 8 * 256),), (256,),
               (master, m, v, params, grads, factors, stats, np.int64(master.size), np.int64(decay_end), f32(c.beta1),
                f32(1.0 - c.beta1), f32(c.beta2), f32(1.0 - c.beta2), f32(c.adam_eps)))


def adamw_round(dev: Device, params: Any, master: Any) -> None:
    """params (P,) bf16 = master (P,) f32 rounded: after weights were loaded."""
    dev.launch(ROUND, adamw_baked("bf16"), (blocks(master.size, 256),), (256,), (params, master, np.int64(master.size)))
