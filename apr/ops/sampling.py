"""The next token of each sequence, chosen on the device, and its embedding for the next step: kernels/sampling.cu."""

from typing import Any

from apr.config import TransformerConfig
from apr.device import Device
from apr.kernel import Baked, KernelSpec, floatx

BAKED = ("B", "BESTS", "C", "FLOATX", "V")
EMBED = KernelSpec("sampling.cu", "embed", BAKED, ("x:f32*", "token:const i32*", "matrix:const floatX*"))
SAMPLE = KernelSpec("sampling.cu", "sample", BAKED,
                    ("x:f32*", "token:i32*", "pos:i32*", "step:i32*", "tokens:i32*", "all_logits:const f32*",
                     "best_score:const f32*", "best_id:const i32*", "matrix:const floatX*", "settings:const i64*",
                     "odds:const f64*"))
SPECS = (EMBED, SAMPLE)


def sampling_baked(c: TransformerConfig, B: int, bests: int, storage: str) -> Baked:
    """The baked values of both kernels; `bests` is the blocks of decode_head."""
    return {"B": B, "BESTS": bests, "C": c.C, "FLOATX": storage, "V": c.V}


def embed(dev: Device, x: Any, token: Any, matrix: Any, bests: int, config: TransformerConfig) -> None:
    """x (B, C) f32 = rows token (B,) i32 of matrix (Vp, C). Ids are not checked here."""
    b = x.shape[0]
    dev.launch(EMBED, sampling_baked(config, b, bests, floatx(matrix)), (b,), (1024,), (x, token, matrix),
               programmatic=True)


def sample(dev: Device, x: Any, token: Any, pos: Any, step: Any, tokens: Any, logits: Any, best_score: Any,
           best_id: Any, matrix: Any, settings: Any, odds: Any, config: TransformerConfig) -> None:
    """Choose token (B,) from logits (B, V) f32, of which decode_head left each block's best (B, BESTS).

    token =, pos and step (B,) i32 += 1, tokens (LIMIT, B) i32 = at the step before, -2 if a score is not a number;
    x (B, C) f32 = the token's row of matrix. settings (5,) i64, odds (2,) f64: kernels/sampling.cu.
    """
    b, bests = best_id.shape
    dev.launch(SAMPLE, sampling_baked(config, b, bests, floatx(matrix)), (b,), (1024,),
               (x, token, pos, step, tokens, logits, best_score, best_id, matrix, settings, odds), programmatic=True)
