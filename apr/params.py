"""Every parameter of a model: one table that initialisation, AdamW, checkpoints and the GPU arena all loop over.

Names and shapes are Hugging Face's: matrices are [out, in], used as x · Wᵀ. In flat memory the decayed matrices come
first, then the rest, so that AdamW is two ranges; q, k, v (and gate, up) follow each other without a gap, so that a
merged product is a view; a matrix of V rows has room for Vp, so that the padded head is one too.
"""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from apr.config import TransformerConfig
from apr.rng import generator

ALIGNMENT = 64  # elements; 256 bytes of float32, what vector loads and TMA want
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
INIT_THREADS = 8
VOCABULARY = (EMBED, HEAD)  # the matrices of V rows
GLUED = re.compile(r"\.(k_proj|v_proj|up_proj)\.\w+$")  # these begin where their neighbour ends, aligned or not


@dataclass(frozen=True)
class ParamSpec:
    """A parameter: name, shape, how it starts (normal(0, 0.02), ones or zeros), whether weight decay applies.

    `room` is the elements kept for it, more than its size for a matrix of V rows; what is beyond its size stays zero.
    """

    name: str
    shape: tuple[int, ...]
    init: str
    decay: bool
    room: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def param_specs(config: TransformerConfig) -> list[ParamSpec]:
    """Every parameter of the model in flat-memory order: matrices (decayed), then norms and biases."""
    c, heads, kv = config, config.NH * config.HS, config.NKV * config.HS
    matrices = [(EMBED, (c.V, c.C))]
    vectors: list[tuple[str, int, str]] = []
    for i in range(c.L):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        matrices += [(attn + "q_proj.weight", (heads, c.C)), (attn + "k_proj.weight", (kv, c.C)),
                     (attn + "v_proj.weight", (kv, c.C)), (attn + "o_proj.weight", (c.C, heads)),
                     (mlp + "gate_proj.weight", (c.F, c.C)), (mlp + "up_proj.weight", (c.F, c.C)),
                     (mlp + "down_proj.weight", (c.C, c.F))]
        vectors.append((f"model.layers.{i}.input_layernorm.weight", c.C, "ones"))
        if c.use_bias:
            vectors += [(attn + f"{p}_proj.bias", n, "zeros") for p, n in (("q", heads), ("k", kv), ("v", kv))]
        if c.qk_norm:
            vectors += [(attn + f"{p}_norm.weight", c.HS, "ones") for p in "qk"]
        vectors.append((f"model.layers.{i}.post_attention_layernorm.weight", c.C, "ones"))
    vectors.append((NORM, c.C, "ones"))
    if not c.tie_word_embeddings:
        matrices.append((HEAD, (c.V, c.C)))
    return ([ParamSpec(name, shape, "normal", True, (c.Vp if name in VOCABULARY else shape[0]) * shape[1])
             for name, shape in matrices]
            + [ParamSpec(name, (n,), init, False, n) for name, n, init in vectors])


def parameter_count(config: TransformerConfig, untied: bool = False) -> int:
    """Parameters of the model. `untied` counts the head apart even where it is tied, as upstream's 370M gate does."""
    count = sum(spec.size for spec in param_specs(config))
    return count + (config.V * config.C if untied and config.tie_word_embeddings else 0)


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in flat memory. Offsets are in elements; what is between parameters stays zero."""

    specs: tuple[ParamSpec, ...]
    offsets: tuple[int, ...]
    size: int
    decay_end: int  # [0, decay_end) is decayed, [decay_end, size) is not

    def views(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters by name, as views of `flat` (size,)."""
        return {s.name: flat[o:o + s.size].reshape(s.shape) for s, o in zip(self.specs, self.offsets, strict=True)}

    def offset(self, name: str) -> int:
        """Where a parameter begins."""
        return self._places[name]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {s.name: o for s, o in zip(self.specs, self.offsets, strict=True)}


def layout(config: TransformerConfig) -> Layout:
    """The flat-memory layout of the model's parameters."""
    specs = param_specs(config)
    offsets, position, decay_end = [], 0, 0
    for spec in specs:
        if not GLUED.search(spec.name):
            position = -(-position // ALIGNMENT) * ALIGNMENT
        offsets.append(position)
        position += spec.room
        if spec.decay:
            decay_end = -(-position // ALIGNMENT) * ALIGNMENT
    return Layout(tuple(specs), tuple(offsets), -(-position // ALIGNMENT) * ALIGNMENT, decay_end)


def init_params(config: TransformerConfig, seed: int, out: dict[str, np.ndarray]) -> None:
    """Write initial values into `out`: normal(0, 0.02) for matrices, 1 for norms, 0 for biases.

    Each tensor's stream is keyed by (seed, name), so a tensor's values do not depend on which others exist, nor on how
    many threads make them.
    """
    def fill(spec: ParamSpec) -> None:
        if spec.init == "normal":
            noise = generator(seed, "init", spec.name).standard_normal(spec.shape, dtype=np.float32)
            np.multiply(noise, np.float32(0.02), out=out[spec.name])
        else:
            out[spec.name][...] = 1.0 if spec.init == "ones" else 0.0

    with ThreadPoolExecutor(INIT_THREADS) as pool:
        list(pool.map(fill, param_specs(config)))
