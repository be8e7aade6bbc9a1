"""Causal grouped-query attention and its gradient: kernels/attention.cu (bf16, tensor cores), attention_f32.cu."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from apr.config import TransformerConfig
from apr.device import Device
from apr.errors import UnavailableError
from apr.kernel import Baked, KernelSpec, blocks, floatx

BAKED = ("FLOATX", "HS", "NH", "NKV")
BF16_HEADS = (32, 64, 80, 96, 128)
LARGEST_HEAD = 128
DELTA_ROWS = 16


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
SPECS = (*BF16.specs, *F32.specs)


def specs(c: TransformerConfig, storage: str, fast: frozenset[str]) -> tuple[KernelSpec, ...]:
    """The kernels that this model's attention launches."""
    return FAMILIES[storage].specs


def attention_baked(c: TransformerConfig, storage: str) -> Baked:
    """The baked values of all four kernels. Raises UnavailableError for a head size that they do not cover."""
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
    dev.launch(family.specs[0], baked, (blocks(T, family.forward_rows), config.NH, B), (family.forward_threads,),
               (out, lse, qkv, np.int32(T), np.float32(scale)), family.shared(config.HS)[0])


def attention_backward(dev: Device, dqkv: Any, delta: Any, dout: Any, qkv: Any, out: Any, lse: Any, B: int, T: int,
                       config: TransformerConfig, *, scale: float) -> None:
    """Gradient of attention_forward: dqkv (B*T, QKV) = all of it; delta (B, NH, T) f32 is scratch.

    dout (B*T, NH*HS); qkv, out, lse, scale as in forward.
    """
    storage = floatx(dqkv)
    family, baked = FAMILIES[storage], attention_baked(config, storage)
    _, delta_spec, dkv, dq = family.specs
    _, dkv_shared, dq_shared = family.shared(config.HS)
    dev.launch(delta_spec, baked, (blocks(T, DELTA_ROWS), config.NH, B), (128,), (delta, out, dout, np.int32(T)))
    arguments = (dqkv, qkv, dout, lse, delta, np.int32(T), np.float32(scale))
    dev.launch(dkv, baked, (blocks(T, family.rows), config.NKV, B), (128,), arguments, dkv_shared)
    dev.launch(dq, baked, (blocks(T, family.rows), config.NH, B), (128,), arguments, dq_shared)
