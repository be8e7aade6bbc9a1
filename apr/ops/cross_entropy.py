"""Cross-entropy in nats and its gradient over the logits, in place: kernels/cross_entropy.cu."""

from typing import Any

import numpy as np

from apr.config import IGNORE
from apr.device import Device
from apr.kernel import Baked, KernelSpec, floatx

BAKED = ("FLOATX", "IGNORE", "V", "VP")
FORWARD = KernelSpec("cross_entropy.cu", "cross_entropy_forward", BAKED,
                     ("losses:f32*", "logits:const floatX*", "targets:const i32*", "N:i32"))
FORWARD_BACKWARD = KernelSpec("cross_entropy.cu", "cross_entropy_forward_backward", BAKED,
                              ("losses:f32*", "logits:floatX*", "targets:const i32*", "dloss:const f64*", "N:i32"))
SUM = KernelSpec("cross_entropy.cu", "cross_entropy_sum", BAKED, ("total:f64*", "losses:const f32*", "N:i32"))
SPECS = (FORWARD, FORWARD_BACKWARD, SUM)


def cross_entropy_baked(V: int, Vp: int, storage: str) -> Baked:
    """The baked values of all three kernels."""
    return {"FLOATX": storage, "IGNORE": IGNORE, "V": V, "VP": Vp}


def cross_entropy_forward(dev: Device, losses: Any, logits: Any, targets: Any, V: int) -> None:
    """losses (N,) f32 = of logits (N, Vp), whose first V columns are scores; targets (N,) i32, IGNORE for none."""
    n, vp = logits.shape
    dev.launch(FORWARD, cross_entropy_baked(V, vp, floatx(logits)), (n,), (1024,),
               (losses, logits, targets, np.int32(n)))


def cross_entropy_forward_backward(dev: Device, losses: Any, logits: Any, targets: Any, dloss: Any, V: int) -> None:
    """As cross_entropy_forward, and dlogits of dloss (1,) f64 times the sum of losses replaces logits, padding 0."""
    n, vp = logits.shape
    dev.launch(FORWARD_BACKWARD, cross_entropy_baked(V, vp, floatx(logits)), (n,), (1024,),
               (losses, logits, targets, dloss, np.int32(n)))


def cross_entropy_sum(dev: Device, total: Any, losses: Any, V: int, Vp: int, storage: str) -> None:
    """total (1,) f64 += sum of losses (N,) f32."""
    dev.launch(SUM, cross_entropy_baked(V, Vp, storage), (1,), (1024,), (total, losses, np.int32(losses.size)))
