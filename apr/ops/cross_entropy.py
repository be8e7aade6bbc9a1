"""Cross-entropy in nats and its gradient over the logits, in place: kernels/cross_entropy.cu, cross_entropy_sm90.cu.

Two kernels for the same sums: the general one reads a row again for its gradient; on Hopper (`Device.fast`) a cluster
of blocks keeps a row in shared memory, where it fits.
"""

from typing import Any

import numpy as np

from apr.buffers import SIZES
from apr.config import IGNORE
from apr.device import Device
from apr.kernel import Baked, KernelSpec, floatx

BAKED = ("FLOATX", "IGNORE", "V", "VP")
FORWARD_ARGS = ("losses:f32*", "logits:const floatX*", "targets:const i32*", "N:i32")
BACKWARD_ARGS = ("losses:f32*", "logits:floatX*", "targets:const i32*", "dloss:const f64*", "N:i32")
FORWARD = KernelSpec("cross_entropy.cu", "cross_entropy_forward", BAKED, FORWARD_ARGS)
FORWARD_BACKWARD = KernelSpec("cross_entropy.cu", "cross_entropy_forward_backward", BAKED, BACKWARD_ARGS)
SUM = KernelSpec("cross_entropy.cu", "cross_entropy_sum", BAKED, ("total:f64*", "losses:const f32*", "N:i32"))
FAST_BAKED = ("CLUSTER", *BAKED)
FAST_FORWARD = KernelSpec("cross_entropy_sm90.cu", "cross_entropy_forward", FAST_BAKED, FORWARD_ARGS)
FAST_FORWARD_BACKWARD = KernelSpec("cross_entropy_sm90.cu", "cross_entropy_forward_backward", FAST_BAKED, BACKWARD_ARGS)
GENERAL = (FORWARD, FORWARD_BACKWARD, SUM)
FAST = (FAST_FORWARD, FAST_FORWARD_BACKWARD, SUM)  # the sum is the same kernel
SPECS = (*GENERAL, *FAST[:2])
CLUSTERS = (1, 2, 4, 8)  # blocks that share a row; 8 is the most that every Hopper takes
FEW_BYTES = 40 << 10  # of a row in one block: then five blocks are on an SM
MOST_BYTES = 76 << 10  # two blocks
FAST_BLOCK = 256


def cluster_of(Vp: int, storage: str) -> int:
    """Blocks of the fast path that share a row of Vp scores: the fewest that keep FEW_BYTES each; 0 if none can."""
    row = Vp * SIZES[storage]
    fitting = [c for c in CLUSTERS if row <= c * FEW_BYTES]
    return fitting[0] if fitting else CLUSTERS[-1] if row <= CLUSTERS[-1] * MOST_BYTES else 0


def cross_entropy_baked(V: int, Vp: int, storage: str) -> Baked:
    """The baked values of the general kernels and of the sum."""
    return {"FLOATX": storage, "IGNORE": IGNORE, "V": V, "VP": Vp}


def variants(V: int, Vp: int, storage: str, fast: frozenset[str]) -> list[tuple[KernelSpec, Baked]]:
    """The kernels that rows of Vp scores, V of them counted, launch, with their baked values: forward,
    forward_backward, sum.
    """
    baked = cross_entropy_baked(V, Vp, storage)
    cluster = cluster_of(Vp, storage) if "cross_entropy" in fast else 0
    if cluster == 0:
        return [(spec, baked) for spec in GENERAL]
    shared = {**baked, "CLUSTER": cluster}
    return [(spec, baked if spec is SUM else shared) for spec in FAST]


def cross_entropy_forward(dev: Device, losses: Any, logits: Any, targets: Any, V: int) -> None:
    """losses (N,) f32 = of logits (N, Vp), whose first V columns are scores; targets (N,) i32, IGNORE for none."""
    n, vp = logits.shape
    forward, _, _ = variants(V, vp, floatx(logits), dev.fast)
    _launch(dev, *forward, logits, (losses, logits, targets, np.int32(n)))


def cross_entropy_forward_backward(dev: Device, losses: Any, logits: Any, targets: Any, dloss: Any, V: int) -> None:
    """As cross_entropy_forward, and dlogits of dloss (1,) f64 times the sum of losses replaces logits, padding 0."""
    n, vp = logits.shape
    _, both, _ = variants(V, vp, floatx(logits), dev.fast)
    _launch(dev, *both, logits, (losses, logits, targets, dloss, np.int32(n)))


def _launch(dev: Device, spec: KernelSpec, baked: Baked, logits: Any, args: tuple[Any, ...]) -> None:
    n, vp = logits.shape
    if cluster := int(baked.get("CLUSTER", 0)):
        dev.launch(spec, baked, (n * cluster,), (FAST_BLOCK,), args, vp * logits.itemsize // cluster)
    else:
        dev.launch(spec, baked, (n,), (1024,), args)


def cross_entropy_sum(dev: Device, total: Any, losses: Any, V: int, Vp: int, storage: str) -> None:
    """total (1,) f64 += sum of losses (N,) f32."""
    dev.launch(SUM, cross_entropy_baked(V, Vp, storage), (1,), (1024,), (total, losses, np.int32(losses.size)))
