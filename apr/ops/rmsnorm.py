"""The residual addition and RMSNorm in one pass, and their gradient: kernels/rmsnorm.cu."""

from typing import Any

import numpy as np

from apr.buffers import SIZES
from apr.device import Device
from apr.kernel import Baked, KernelSpec, blocks, floatx, vector_width

BAKED = ("BLOCK", "C", "EPS", "FLOATX")
FORWARD = KernelSpec("rmsnorm.cu", "rmsnorm_forward", BAKED,
                     ("out:floatX*", "rstd:f32*", "residual:floatX*?", "inp:const floatX*", "update:const floatX*?",
                      "weight:const floatX*", "N:i32"))
BACKWARD = KernelSpec("rmsnorm.cu", "rmsnorm_backward", BAKED,
                      ("dinp:floatX*", "out:floatX*", "partial:f32*", "dout:const floatX*", "dresidual:const floatX*?",
                       "inp:const floatX*", "weight:const floatX*", "rstd:const f32*", "N:i32"))
WEIGHT_BACKWARD = KernelSpec("rmsnorm.cu", "rmsnorm_weight_backward", BAKED,
                             ("dweight:f32*", "partial:const f32*", "parts:i32"))
FEW = 4  # vectors of 16 bytes of a row that a thread holds
SPECS = (FORWARD, BACKWARD, WEIGHT_BACKWARD)


def rmsnorm_baked(C: int, eps: float, storage: str) -> Baked:
    """The baked values of all three kernels; a thread takes up to four vectors of a row of up to 2048 of them."""
    vectors = _vectors(C, storage)
    return {"BLOCK": 128 if vectors <= 128 * FEW else 256 if vectors <= 256 * FEW else 512, "C": C, "EPS": float(eps),
            "FLOATX": storage}


def _vectors(C: int, storage: str) -> int:
    """Accesses of at most 16 bytes to a row."""
    return C // vector_width(C, SIZES[storage])


def _rows(baked: Baked) -> int:
    """Rows of a block, as ROWS in the source."""
    block, threads = int(baked["BLOCK"]), 32
    while threads < block and threads * FEW < _vectors(int(baked["C"]), str(baked["FLOATX"])):
        threads *= 2
    return block // threads


def rmsnorm_forward(dev: Device, out: Any, rstd: Any, residual: Any, inp: Any, update: Any, weight: Any, *,
                    eps: float) -> None:
    """residual = inp + update; out = residual / rms(residual) * weight.

    out, residual, inp, update (N, C), weight (C,) of one storage type; rstd (N,) f32. Without an update (None) residual
    is None and inp is what is normalised.
    """
    n, c = out.shape
    baked = rmsnorm_baked(c, eps, floatx(out))
    dev.launch(FORWARD, baked, (blocks(n, _rows(baked)),), (int(baked["BLOCK"]),),
               (out, rstd, residual, inp, update, weight, np.int32(n)))


def rmsnorm_backward(dev: Device, dinp: Any, dweight: Any, out: Any, partial: Any, dout: Any, dresidual: Any, inp: Any,
                     weight: Any, rstd: Any, *, eps: float) -> None:
    """Gradient of rmsnorm_forward with respect to the residual stream, whose two branches meet here.

    dinp (N, C) = dresidual + what comes through the norm, and may be dresidual, which may be None; dweight (C,) f32 +=;
    out (N, C) is written again; partial (PARTS, C) f32 is scratch; dout, inp (N, C), weight, rstd as in forward.
    """
    n, c = dinp.shape
    baked, parts = rmsnorm_baked(c, eps, floatx(dinp)), partial.shape[0]
    dev.launch(BACKWARD, baked, (parts,), (int(baked["BLOCK"]),),
               (dinp, out, partial, dout, dresidual, inp, weight, rstd, np.int32(n)))
    dev.launch(WEIGHT_BACKWARD, baked, (blocks(c, 32),), (32, 32), (dweight, partial, np.int32(parts)),
               programmatic=True)
