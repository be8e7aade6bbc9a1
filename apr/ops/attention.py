"""Causal grouped-query attention and its gradient, by the kernels of one of three families:

    attention.cu   bf16, tensor cores      attention_f32.cu   float32
    attention_sm90.cu, attention_sm90_backward.cu   bf16 on Hopper, head sizes 64 and 128: the fast path
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apr import driver
from apr.config import TransformerConfig
from apr.device import Device
from apr.errors import UnavailableError
from apr.kernel import Baked, KernelSpec, blocks, floatx

BAKED = ("FLOATX", "HS", "NH", "NKV")
BF16_HEADS, SM90_HEADS = (32, 64, 80, 96, 128), (64, 128)
LARGEST_HEAD = 128
DELTA_ROWS = 16
BOX = 64  # rows and columns of a box of attention_sm90.cu's tensor maps
LARGEST_CLUSTER = 8  # blocks, on every GPU that has clusters
SM90_ROWS, SM90_KEYS = {64: 192, 128: 128}, 128  # queries of a block of forward and dq; keys of a block of dkv


@dataclass(frozen=True)
class Family:
    """The four kernels of one storage type, and their launch shapes as in the LAUNCH lines of the source."""

    source: str
    forward_rows: int
    forward_threads: int
    rows: int

    def spec(self, entry: str, *args: str) -> KernelSpec:
        """A kernel of this family."""
        return KernelSpec(self.source, entry, BAKED, args)

    @property
    def specs(self) -> tuple[KernelSpec, KernelSpec, KernelSpec, KernelSpec]:
        """Forward, delta, dkv, dq."""
        gradient = ("dqkv:floatX*", "qkv:const floatX*", "dout:const floatX*", "lse:const f32*", "delta:const f32*",
                    "T:i32", "scale:f32")
        return (self.spec("attention_forward", "out:floatX*", "lse:f32*", "qkv:const floatX*", "T:i32", "scale:f32"),
                self.spec("attention_backward_delta", "delta:f32*", "out:const floatX*", "dout:const floatX*", "T:i32"),
                self.spec("attention_backward_dkv", *gradient), self.spec("attention_backward_dq", *gradient))

    def shared(self, HS: int) -> tuple[int, int, int]:
        """Dynamic shared bytes of forward, dkv and dq."""
        if self is BF16:
            return 512 * (HS + 8), 512 * (HS + 8) + 1024, 512 * (HS + 8)
        return 384 * (HS + 4) + 4608, 512 * (HS + 4) + 9472, 512 * (HS + 4) + 4608


BF16 = Family("attention.cu", 128, 256, 64)
F32 = Family("attention_f32.cu", 32, 128, 32)
FAMILIES = {"bf16": BF16, "f32": F32}
_GRADIENT = ("dqkv:floatX*", "tokens:map", "douts:map", "lse:const f32*")
SM90_FORWARD = KernelSpec("attention_sm90.cu", "attention_forward", BAKED,
                          ("out:floatX*", "lse:f32*", "tokens:map", "B:i32", "T:i32", "scale:f32"))
SM90_DKV = KernelSpec("attention_sm90_backward.cu", "attention_backward_dkv", BAKED,
                      (*_GRADIENT, "delta:const f32*", "T:i32", "scale:f32"))
SM90_DQ = KernelSpec("attention_sm90_backward.cu", "attention_backward_dq", BAKED,
                     (*_GRADIENT, "delta:f32*", "out:const floatX*", "dout:const floatX*", "B:i32", "T:i32",
                      "scale:f32"))
SM90 = (SM90_FORWARD, SM90_DKV, SM90_DQ)
SPECS = (*BF16.specs, *F32.specs, *SM90)


def fast(c: TransformerConfig, storage: str, paths: frozenset[str]) -> bool:
    """Whether attention_sm90.cu takes this model; `paths` is Device.fast."""
    return "attention" in paths and storage == "bf16" and c.HS in SM90_HEADS


def variants(c: TransformerConfig, storage: str, paths: frozenset[str]) -> list[tuple[KernelSpec, Baked]]:
    """The kernels that this model's attention launches, with their baked values. Raises UnavailableError."""
    baked = attention_baked(c, storage)
    return [(spec, baked) for spec in (SM90 if fast(c, storage, paths) else FAMILIES[storage].specs)]


def attention_baked(c: TransformerConfig, storage: str) -> Baked:
    """The baked values of all kernels. Raises UnavailableError for a head size that they do not cover."""
    covered = c.HS in BF16_HEADS if storage == "bf16" else c.HS <= LARGEST_HEAD
    if not covered:
        sizes = ", ".join(map(str, BF16_HEADS)) if storage == "bf16" else f"up to {LARGEST_HEAD}"
        raise UnavailableError("head_dim", f"a head size of the {storage} attention kernels ({sizes})", str(c.HS),
                               "use --precision fp32, or --device cpu")
    return {"FLOATX": storage, "HS": c.HS, "NH": c.NH, "NKV": c.NKV}


def attention_forward(dev: Device, out: Any, lse: Any, qkv: Any, B: int, T: int, config: TransformerConfig, *,
                      scale: float) -> None:
    """out (B*T, NH*HS) = causal attention of qkv (B*T, QKV), its heads turned already; lse (B, NH, T) f32 =.

    scale is 1/sqrt(HS). out and qkv of one storage type.
    """
    storage = floatx(out)
    family, baked = FAMILIES[storage], attention_baked(config, storage)
    if fast(config, storage, dev.fast):
        dev.launch(SM90_FORWARD, baked, *_by_rows(dev, B, T, config),
                   (out, lse, _map(qkv, B, T), np.int32(B), np.int32(T), np.float32(scale)), sm90_shared(config.HS)[0])
        return
    dev.launch(family.specs[0], baked, (blocks(T, family.forward_rows), config.NH, B), (family.forward_threads,),
               (out, lse, qkv, np.int32(T), np.float32(scale)), family.shared(config.HS)[0])


def attention_backward(dev: Device, dqkv: Any, delta: Any, dout: Any, qkv: Any, out: Any, lse: Any, B: int, T: int,
                       config: TransformerConfig, *, scale: float) -> None:
    """Gradient of attention_forward: dqkv (B*T, QKV) = all of it; delta (B, NH, T) f32 is scratch.

    dout (B*T, NH*HS); qkv, out, lse, scale as in forward.
    """
    storage, c = floatx(dqkv), config
    family, baked = FAMILIES[storage], attention_baked(c, storage)
    if fast(c, storage, dev.fast):
        _, dkv_shared, dq_shared = sm90_shared(c.HS)
        maps, numbers = (dqkv, _map(qkv, B, T), _map(dout, B, T), lse, delta), (np.int32(T), np.float32(scale))
        dev.launch(SM90_DQ, baked, *_by_rows(dev, B, T, c), (*maps, out, dout, np.int32(B), *numbers), dq_shared)
        key_blocks = blocks(T, SM90_KEYS)
        shares = c.G if c.G <= LARGEST_CLUSTER and key_blocks * c.NKV * B < dev.sm_count else 1
        dev.launch(SM90_DKV, baked, (key_blocks, c.NKV * shares, B), (384,), (*maps, *numbers), dkv_shared,
                   cluster=(1, shares, 1))
        return
    _, delta_spec, dkv, dq = family.specs
    dev.launch(delta_spec, baked, (blocks(T, DELTA_ROWS), c.NH, B), (128,), (delta, out, dout, np.int32(T)))
    _, dkv_shared, dq_shared = family.shared(c.HS)
    arguments = (dqkv, qkv, dout, lse, delta, np.int32(T), np.float32(scale))
    dev.launch(dkv, baked, (blocks(T, family.rows), c.NKV, B), (128,), arguments, dkv_shared)
    dev.launch(dq, baked, (blocks(T, family.rows), c.NH, B), (128,), arguments, dq_shared)


def sm90_shared(HS: int) -> tuple[int, int, int]:
    """Dynamic shared bytes of attention_sm90.cu's forward, dkv and dq: the structures there, and room to align them."""
    row, rows, dkv, dq = 2 * HS, SM90_ROWS[HS], 4 if HS == 64 else 2, 4 if HS == 64 else 3
    return (row * (rows + 4 * SM90_KEYS) + 80 + 1024,
            row * (2 * SM90_KEYS + 2 * dkv * BOX) + dkv * (8 * BOX + 16) + 8 + 1024,
            row * (2 * rows + 2 * dq * BOX) + 16 * dq + 16 + 1024)


def _by_rows(dev: Device, B: int, T: int, c: TransformerConfig) -> tuple[Sequence[int], Sequence[int]]:
    """Grid and block of forward and dq: blocks that stay and take one piece of work after another."""
    rows = SM90_ROWS[c.HS]
    return (min(dev.sm_count, blocks(T, rows) * c.NH * B),), (2 * rows + 128,)


def _map(array: Any, B: int, T: int) -> bytes:
    """The tensor map of (B*T, width) as (B, T, width), for boxes of 64 x 64."""
    width = array.shape[-1]
    return driver.tensor_map(int(array.data.ptr), "bf16", (width, T, B), (2 * width, 2 * T * width), (BOX, BOX, 1), 128)
