"""Matrix products with a weight stored [out, in] and their bias: apr/gemm.py; a bias's gradient: kernels/linear.cu."""

from typing import Any

import numpy as np

from apr.device import Device
from apr.gemm import Gemm
from apr.kernel import Baked, KernelSpec, blocks, floatx, vector_width

BAKED = ("FLOATX", "O")
BIAS_BACKWARD = KernelSpec("linear.cu", "bias_backward", BAKED, ("partial:f32*", "dout:const floatX*", "N:i32"))
BIAS_SUM_BACKWARD = KernelSpec("linear.cu", "bias_sum_backward", BAKED,
                               ("dbias:f32*", "partial:const f32*", "parts:i32"))
SPECS = (BIAS_BACKWARD, BIAS_SUM_BACKWARD)


def linear_baked(width: int, storage: str) -> Baked:
    """The baked values of the kernels of a bias's gradient."""
    return {"FLOATX": storage, "O": width}


def linear_forward(gemm: Gemm, out: Any, inp: Any, weight: Any, bias: Any = None) -> None:
    """out (N, O) = inp (N, I) · weightᵀ, weight (O, I), + bias (O,) before it is rounded; all of one storage type."""
    gemm.linear(out, inp, weight, bias)


def linear_backward(gemm: Gemm, dinp: Any, dweight: Any, dout: Any, inp: Any, weight: Any, *, add: bool) -> None:
    """Gradient of linear_forward: dinp (N, I) =, dweight (O, I) f32 +=, or = where `add` is False.

    dout (N, O), inp, weight as in forward.
    """
    gemm.linear_dinp(dinp, dout, weight)
    gemm.linear_dweight(dweight, dout, inp, add=add)


def bias_backward(dev: Device, dbias: Any, partial: Any, dout: Any) -> None:
    """dbias (O,) f32 += column sums of dout (N, O), the gradient of the bias; partial (PARTS, O) f32 is scratch."""
    (n, o), parts = dout.shape, partial.shape[0]
    baked = linear_baked(o, floatx(dout))
    columns = blocks(o // vector_width(o, dout.itemsize), 32)
    dev.launch(BIAS_BACKWARD, baked, (parts, columns), (128,), (partial, dout, np.int32(n)))
    dev.launch(BIAS_SUM_BACKWARD, baked, (blocks(o, 32),), (32, 32), (dbias, partial, np.int32(parts)),
               programmatic=True)
