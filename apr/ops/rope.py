"""Rotary positions of queries and keys, and Qwen3's RMSNorm of each head before them: kernels/rope.cu."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from apr.config import RopeScaling, TransformerConfig, require
from apr.device import Device
from apr.errors import UnavailableError
from apr.kernel import Baked, KernelSpec, blocks, floatx, vector_width

BAKED = ("EPS", "FACTOR", "FLOATX", "HIGH", "HS", "LOW", "NH", "NKV", "ORIGINAL", "QK_NORM", "THETA")
TABLE = KernelSpec("rope.cu", "rope_table", BAKED, ("cos:f32*", "sin:f32*", "T:i32"))
FORWARD = KernelSpec("rope.cu", "rope_forward", BAKED,
                     ("out:floatX*", "head_rstd:f32*?", "inp:const floatX*", "q_weight:const floatX*?",
                      "k_weight:const floatX*?", "cos:const f32*", "sin:const f32*", "N:i32", "T:i32"))
BACKWARD = KernelSpec("rope.cu", "rope_backward", BAKED,
                      ("dinp:floatX*", "partial:f32*", "dout:const floatX*", "inp:const floatX*?",
                       "q_weight:const floatX*?", "k_weight:const floatX*?", "head_rstd:const f32*?", "cos:const f32*",
                       "sin:const f32*", "N:i32", "T:i32"))
WEIGHT_BACKWARD = KernelSpec("rope.cu", "rope_weight_backward", BAKED,
                             ("q_dweight:f32*", "k_dweight:f32*", "partial:const f32*", "parts:i32"))
SPECS = (TABLE, FORWARD, BACKWARD, WEIGHT_BACKWARD)


@dataclass(frozen=True)
class HeadNorm:
    """Qwen3's norm of each head: q and k weights (HS,), and the reciprocal norms (N, NH+NKV) f32."""

    q_weight: Any
    k_weight: Any
    rstd: Any


def rope_baked(c: TransformerConfig, storage: str) -> Baked:
    """The baked values of all four kernels. Raises ConfigError for a theta that 32 bits cannot hold exactly."""
    require("rope_theta", c.rope_theta, "a number that 32-bit floats hold exactly, since it is baked as one",
            float(np.float32(c.rope_theta)) == c.rope_theta)
    if _group(c.HS, 4 if storage == "f32" else 2) > 32:
        raise UnavailableError("head_dim", "half a head of at most 32 vectors, or a multiple of 4 in its half",
                               str(c.HS), "use --device cpu")
    s = c.rope_scaling or RopeScaling(factor=1.0, low_freq_factor=0.5, high_freq_factor=1.0,
                                      original_max_position_embeddings=1)  # a factor of 1 changes nothing
    return {"EPS": float(c.rms_norm_eps), "FACTOR": float(s.factor), "FLOATX": storage,
            "HIGH": float(s.high_freq_factor), "HS": c.HS, "LOW": float(s.low_freq_factor), "NH": c.NH, "NKV": c.NKV,
            "ORIGINAL": s.original_max_position_embeddings, "QK_NORM": int(c.qk_norm), "THETA": float(c.rope_theta)}


def rope_table(dev: Device, cos: Any, sin: Any, config: TransformerConfig, storage: str) -> None:
    """cos, sin (T, HS/2) f32 = of every angle."""
    t, half = cos.shape
    dev.launch(TABLE, rope_baked(config, storage), (blocks(t * half, 256),), (256,), (cos, sin, np.int32(t)))


def rope_forward(dev: Device, out: Any, inp: Any, norm: HeadNorm | None, cos: Any, sin: Any, T: int,
                 config: TransformerConfig) -> None:
    """out (N, QKV) = inp with its query and key heads (normalised and) turned by the position of row n, n % T.

    Without `norm` out may be inp, whose value heads are left alone; with it, out is another array, and norm.rstd is
    written. cos, sin as rope_table made them.
    """
    n, c = out.shape[0], config
    heads = n * (c.NH + (2 if norm else 1) * c.NKV)
    w = norm or HeadNorm(None, None, None)
    dev.launch(FORWARD, rope_baked(c, floatx(out)), (blocks(heads, 256 // _group(c.HS, out.itemsize)),), (256,),
               (out, w.rstd, inp, w.q_weight, w.k_weight, cos, sin, np.int32(n), np.int32(T)))


def rope_backward(dev: Device, dinp: Any, q_dweight: Any, k_dweight: Any, partial: Any, dout: Any, inp: Any,
                  norm: HeadNorm | None, cos: Any, sin: Any, T: int, config: TransformerConfig) -> None:
    """Gradient of rope_forward: dinp (N, QKV) =, and may be dout; value heads are left alone.

    With `norm`: q_dweight, k_dweight (HS,) f32 +=, from inp (N, QKV), what forward normalised; else these are None.
    partial (PARTS, 2HS) f32 is scratch.
    """
    n, parts = dinp.shape[0], partial.shape[0]
    baked, w = rope_baked(config, floatx(dinp)), norm or HeadNorm(None, None, None)
    heads = n * (config.NH + config.NKV)  # without norms nothing is summed over them
    grid = parts if norm is not None else blocks(heads, 256 // _group(config.HS, dinp.itemsize))
    dev.launch(BACKWARD, baked, (grid,), (256,),
               (dinp, partial, dout, inp, w.q_weight, w.k_weight, w.rstd, cos, sin, np.int32(n), np.int32(T)))
    if norm is not None:
        dev.launch(WEIGHT_BACKWARD, baked, (blocks(config.HS, 32), 2), (32, 32),
                   (q_dweight, k_dweight, partial, np.int32(parts)))


def _group(HS: int, itemsize: int) -> int:
    """Lanes per head: GROUP in kernels/rope.cu."""
    lanes = HS // 2 // vector_width(HS // 2, itemsize)
    return 1 << (lanes - 1).bit_length()
