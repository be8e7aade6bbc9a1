"""Every kernel of apr, and which of their variants a model needs: what is warmed up is exactly what a run asks for."""

from collections.abc import Iterable

from apr.config import TransformerConfig
from apr.kernel import FAST_PATHS, Baked, KernelSpec, is_fast
from apr.ops import (
    adamw,
    attention,
    cross_entropy,
    decode_attention,
    decode_linear,
    embedding,
    global_norm,
    linear,
    rmsnorm,
    rope,
    sampling,
    swiglu,
)
from apr.ptx_cache import PtxCache

Variant = tuple[KernelSpec, Baked]

KERNELS: tuple[KernelSpec, ...] = (
    *embedding.SPECS, *rmsnorm.SPECS, *linear.SPECS, *rope.SPECS, *attention.SPECS, *swiglu.SPECS, *cross_entropy.SPECS,
    *global_norm.SPECS, *adamw.SPECS, *decode_linear.SPECS, *decode_attention.SPECS, *sampling.SPECS)


def variants(config: TransformerConfig, storage: str, fast: frozenset[str] = frozenset()) -> list[Variant]:
    """Every kernel that training or evaluating this model in `storage` (f32 or bf16) launches, with its baked values.

    `fast`: the ops whose fast path the GPU has (Device.fast); it is taken where it covers this model.

    Raises ConfigError or UnavailableError for a model that the kernels do not cover.
    """
    c = config
    return _forward(c, storage, fast) + cross_entropy.variants(c.V, c.Vp, storage, fast) + _each([
        (global_norm.SPECS, global_norm.global_norm_baked(storage)),
        (adamw.SPECS, adamw.adamw_baked(storage)),
        (linear.SPECS if c.use_bias else (), linear.linear_baked(c.QKV, storage)),
    ])


def inference_variants(config: TransformerConfig, storage: str, B: int,
                       fast: frozenset[str] = frozenset()) -> list[Variant]:
    """Every kernel that generating B sequences with this model launches. Raises as variants."""
    c, eps = config, config.rms_norm_eps
    linear_of = decode_linear.decode_linear_baked
    return _forward(c, storage, fast) + _each([
        (decode_attention.SPECS, decode_attention.decode_attention_baked(c, storage)),
        ([decode_linear.QKV], linear_of(B, c.QKV, c.C, eps, storage)),
        ([decode_linear.ADD], linear_of(B, c.C, c.NH * c.HS, eps, storage)),
        ([decode_linear.GATE_UP], linear_of(B, 2 * c.F, c.C, eps, storage)),
        ([decode_linear.ADD], linear_of(B, c.C, c.F, eps, storage)),
        ([decode_linear.HEAD], linear_of(B, c.V, c.C, eps, storage)),
        (sampling.SPECS, sampling.sampling_baked(c, B, decode_linear.head_blocks(c, B, storage), storage)),
    ])


def paths(config: TransformerConfig, storage: str, fast: frozenset[str]) -> dict[str, str]:
    """The path of each op that has a fast one, in training: "general", or the architecture that its fast path is for.

    An op that is "general" on that architecture is one whose fast path does not cover the model, or was turned off.
    Raises as variants.
    """
    return _paths(variants(config, storage, fast))


def inference_paths(config: TransformerConfig, storage: str, B: int, fast: frozenset[str]) -> dict[str, str]:
    """The same in generation, of the ops that it has. Raises as variants."""
    return _paths(inference_variants(config, storage, B, fast))


def _paths(needed: list[Variant]) -> dict[str, str]:
    out = {}
    for op, arch in FAST_PATHS.items():
        own = [spec for spec, _ in needed if spec.source.startswith((f"{op}.", f"{op}_"))]
        if own:
            out[op] = arch if any(is_fast(op, spec) for spec in own) else "general"
    return out


def _forward(c: TransformerConfig, storage: str, fast: frozenset[str]) -> list[Variant]:
    """The kernels of the layers, with their gradients, which come in the same files."""
    groups: list[tuple[Iterable[KernelSpec], Baked]] = [
        (embedding.SPECS, embedding.embedding_baked(c.C, storage)),
        (rmsnorm.SPECS, rmsnorm.rmsnorm_baked(c.C, c.rms_norm_eps, storage)),
        (rope.SPECS, rope.rope_baked(c, storage)),
        (swiglu.SPECS, swiglu.swiglu_baked(c.F, storage)),
    ]
    return _each(groups) + attention.variants(c, storage, fast)


def _each(groups: Iterable[tuple[Iterable[KernelSpec], Baked]]) -> list[Variant]:
    return [(spec, baked) for specs, baked in groups for spec in specs]


def warmup(cache: PtxCache, needed: list[Variant]) -> None:
    """Compile, or find on disk, and load every kernel in `needed`; from then on the cache is frozen."""
    cache.warm(needed)
    for spec, baked in needed:
        cache.get(spec, baked)
    cache.freeze()
