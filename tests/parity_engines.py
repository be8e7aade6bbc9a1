"""Stand-ins for a GPU's engine: the CPU's with a broken reader, with every stage rounded, with a stale cache."""

import dataclasses

import numpy as np
from models import FAMILIES, random_params, source_of

from apr.infer.cpu_engine import CpuEngine, load_params
from apr.reference.attention import attention_forward
from apr.reference.kv_cache import KVCache
from apr.tools.parity_truth import reference_scores

MODELS = {name: dataclasses.replace(c, head_dim=32, num_hidden_layers=3, vocab_size=307, max_position_embeddings=128,
                                    hidden_size=128 if name == "llama" else 96)
          for name, c in FAMILIES.items()}
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def config_with(**changes):
    """A reader that gets a number of the configuration wrong."""
    return lambda config, params: (dataclasses.replace(config, **changes), params)


def params_with(*names, change):
    """A reader that gets parameters wrong."""
    return lambda config, params: (config, params | {n: change(params[n]) for n in names})


# name: (family, the reader)
FAULTS = {
    "bias dropped": ("qwen2", params_with("model.layers.2.self_attn.k_proj.bias", change=np.zeros_like)),
    "eps": ("llama", config_with(rms_norm_eps=1e-4)),
    "theta": ("llama", config_with(rope_theta=1e6)),
    "O transposed": ("llama", params_with(O_PROJ, change=lambda w: np.ascontiguousarray(w.T))),
    "head scaled": ("llama", params_with("lm_head.weight", change=lambda w: (w * np.float32(1.02)).astype(w.dtype))),
    "head norm dropped": ("qwen3", params_with("model.layers.2.self_attn.k_norm.weight", change=np.ones_like)),
}


def sound(name, precision="fp32", seed=5):
    """A model in memory, of weights that the precision can hold."""
    return source_of(MODELS[name], random_params(MODELS[name], seed, "BF16" if precision == "bf16" else "F32"))


def broken(fault, precision="fp32"):
    """(the model, what a broken reader makes of it)."""
    name, change = FAULTS[fault]
    params = {n: sound(name, precision).read(n) for n in sound(name).shapes}
    return sound(name, precision), source_of(*change(MODELS[name], params))


class Exact(CpuEngine):
    """float32, under a GPU's name."""

    device = "cuda:0"

    def __init__(self, source, slots=1, size=128):
        super().__init__(source.config, load_params(source), slots, size)


class Rounded(Exact):
    """bf16 as a GPU rounds it: every stage, from inputs that differ by far less than a rounding, so in other places."""

    precision = "bf16"

    def __init__(self, source):
        super().__init__(source)
        noise = np.random.default_rng(9).standard_normal(source.shapes["model.embed_tokens.weight"], dtype=np.float32)
        arrays = {n: source.read(n) for n in source.shapes}
        embed = arrays["model.embed_tokens.weight"].astype(np.float32) * (1 + np.float32(3e-3) * noise)
        self.source = source_of(source.config, arrays | {"model.embed_tokens.weight": embed})

    def scores(self, prompts, cached, tap=None):
        """As Engine.scores; the ways differ in nothing."""
        return reference_scores(self.source, prompts, "bf16", "bf16")


class Stale(Exact):
    """A cache that is kept from prompt to prompt, and a decoding step that reads one key too many if one is there."""

    kept = None

    def _cache(self, count):
        if self.kept is None:
            self.kept = _OneMore(self.config, count, self.S, np.dtype(np.float32))
        self.kept.lengths = [0] * count
        return self.kept


class _OneMore(KVCache):
    def __init__(self, *args):
        super().__init__(*args)
        self.k[:] = self.v[:] = 0

    def attend(self, layer, rows):
        right = super().attend(layer, rows)

        def cached(q, k, v, scale):
            out, none = right(q, k, v, scale)
            for i, row in enumerate(rows):
                end = self.lengths[row] + 1
                keys, values = self.k[layer, row], self.v[layer, row]
                if q.shape[1] == 1 < end and keys[end:end + 1].any():
                    out[i], _ = attention_forward(q[i:i + 1], keys[None, :end + 1], values[None, :end + 1], scale)
            return out, none

        return cached
