"""The gated activation of the feed-forward layer, and its gradient: kernels/swiglu.cu."""

from typing import Any

import numpy as np

from apr.device import Device
from apr.kernel import Baked, KernelSpec, blocks, floatx, vector_width

BAKED = ("F", "FLOATX")
FORWARD = KernelSpec("swiglu.cu", "swiglu_forward", BAKED, ("act:floatX*", "gate_up:const floatX*", "N:i32"))
BACKWARD = KernelSpec("swiglu.cu", "swiglu_backward", BAKED,
                      ("dgate_up:floatX*", "act:floatX*", "dact:const floatX*", "gate_up:const floatX*", "N:i32"))
SPECS = (FORWARD, BACKWARD)


def swiglu_baked(F: int, storage: str) -> Baked:
    """The baked values of both kernels."""
    return {"F": F, "FLOATX": storage}


def swiglu_forward(dev: Device, act: Any, gate_up: Any) -> None:
    """act (N, F) = silu(gate) * up; gate_up (N, 2F): gate in its first F columns, up in the rest."""
    n, f = act.shape
    dev.launch(FORWARD, swiglu_baked(f, floatx(act)), (_grid(n, f, act.itemsize),), (256,), (act, gate_up, np.int32(n)))


def swiglu_backward(dev: Device, dgate_up: Any, act: Any, dact: Any, gate_up: Any) -> None:
    """dgate_up (N, 2F) = gradient, act (N, F) = the activation again; dgate_up may be gate_up, act may be dact."""
    n, f = act.shape
    dev.launch(BACKWARD, swiglu_baked(f, floatx(act)), (_grid(n, f, act.itemsize),), (256,),
               (dgate_up, act, dact, gate_up, np.int32(n)))


def _grid(n: int, f: int, itemsize: int) -> int:
    return blocks(n * f // vector_width(f, itemsize), 256)
