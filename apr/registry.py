"""Every kernel of apr, and which of their variants a model needs: what is warmed up is exactly what a run asks for."""

from collections.abc import Iterable

from apr.config import TransformerConfig
from apr.kernel import Baked, KernelSpec
from apr.ops import adamw, attention, cross_entropy, embedding, global_norm, linear, rmsnorm, rope, swiglu
from apr.ptx_cache import PtxCache

KERNELS: tuple[KernelSpec, ...] = (
    *embedding.SPECS, *rmsnorm.SPECS, *linear.SPECS, *rope.SPECS, *attention.SPECS, *swiglu.SPECS, *cross_entropy.SPECS,
    *global_norm.SPECS, *adamw.SPECS)


def variants(config: TransformerConfig, storage: str) -> list[tuple[KernelSpec, Baked]]:
    """Every kernel that training or evaluating this model in `storage` (f32 or bf16) launches, with its baked values.

    Raises ConfigError or UnavailableError for a model that the kernels do not cover.
    """
    c = config
    groups: list[tuple[Iterable[KernelSpec], Baked]] = [
        (embedding.SPECS, embedding.embedding_baked(c.C, storage)),
        (rmsnorm.SPECS, rmsnorm.rmsnorm_baked(c.C, c.rms_norm_eps, storage)),
        (rope.SPECS, rope.rope_baked(c, storage)),
        (attention.specs(storage), attention.attention_baked(c, storage)),
        (swiglu.SPECS, swiglu.swiglu_baked(c.F, storage)),
        (cross_entropy.SPECS, cross_entropy.cross_entropy_baked(c.V, c.Vp, storage)),
        (global_norm.SPECS, global_norm.global_norm_baked(storage)),
        (adamw.SPECS, adamw.adamw_baked(storage)),
    ]
    if c.use_bias:
        groups.append((linear.SPECS, linear.linear_baked(c.QKV, storage)))
    return [(spec, baked) for specs, baked in groups for spec in specs]


def warmup(cache: PtxCache, config: TransformerConfig, storage: str) -> None:
    """Compile, or find on disk, and load every kernel that this model needs; from then on the cache is frozen."""
    needed = variants(config, storage)
    cache.warm(needed)
    for spec, baked in needed:
        cache.get(spec, baked)
    cache.freeze()
