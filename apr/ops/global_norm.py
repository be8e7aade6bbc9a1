"""The L2 norm over every gradient of the model: kernels/global_norm.cu."""

from typing import Any

import numpy as np

from apr.device import Device
from apr.kernel import Baked, KernelSpec

BAKED = ("FLOATX",)
PARTIAL = KernelSpec("global_norm.cu", "global_norm", BAKED, ("partial:f64*", "grads:const f32*", "size:i64"))
FINISH = KernelSpec("global_norm.cu", "global_norm_finish", BAKED, ("norm:f64*", "partial:const f64*", "parts:i32"))
SPECS = (PARTIAL, FINISH)


def global_norm_baked(storage: str) -> Baked:
    """The baked values of both kernels."""
    return {"FLOATX": storage}


def global_norm(dev: Device, norm: Any, partial: Any, grads: Any, storage: str) -> None:
    """norm (1,) f64 = L2 norm of grads (size,) f32, size a multiple of 4; partial (parts,) f64 is scratch."""
    parts, baked = partial.size, global_norm_baked(storage)
    dev.launch(PARTIAL, baked, (parts,), (256,), (partial, grads, np.int64(grads.size)))
    dev.launch(FINISH, baked, (1,), (256,), (norm, partial, np.int32(parts)))
