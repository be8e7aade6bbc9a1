"""The points of a model that a trace may hold, from the one enumeration in apr/taps.py: which, and of what shape."""

import math
import re
from collections.abc import Collection

from apr.config import TransformerConfig
from apr.errors import ConfigError, did_you_mean
from apr.taps import STAGES, expected_gradient_names, expected_names, split_name

ALL = "all"
LAYERS = re.compile(r"([0-9]{1,5})(?:\.\.([0-9]{1,5}))?")


def all_points(config: TransformerConfig, backward: bool) -> list[str]:
    """Every point of a pass, in the order in which it is computed; `backward`: those of the gradient after them."""
    names = expected_names(config.L, config.qk_norm)
    return names + (expected_gradient_names(config.L, config.qk_norm) if backward else [])


def select(config: TransformerConfig, stages: Collection[str] | None, layers: range | None, backward: bool
           ) -> list[str]:
    """The points of these stages (`attn_norm`, `dattn_norm`; None: all) in these layers (None: all), in their order.

    A stage that is no layer's (embedding, final_norm, logits) is there whatever the layers.
    """
    return [name for name in all_points(config, backward)
            if (stages is None or name.rpartition(".")[2] in stages)
            and (layers is None or (layer := split_name(name)[1]) is None or layer in layers)]


def point_shape(name: str, config: TransformerConfig, tokens: int) -> tuple[int, ...]:
    """The sizes of a point for one sequence of `tokens` tokens."""
    sizes = {"B": 1, "T": tokens} | {s: int(getattr(config, s)) for s in ("C", "F", "V", "NH", "NKV", "HS")}
    return tuple(math.prod(sizes[s] for s in size.split("*")) for size in split_name(name)[0].shape.split())


def parse_stages(text: str, config: TransformerConfig, backward: bool) -> frozenset[str] | None:
    """The stages of a comma list; None for `all`.

    Raises ConfigError: an unknown name (with a suggestion), a gradient without `backward`, a stage that this model
    lacks.
    """
    stages = frozenset(word.strip() for word in text.split(","))
    known = {ALL, *STAGES, *(f"d{name}" for name in STAGES)}
    here = {name.rpartition(".")[2] for name in all_points(config, True)}
    for word in sorted(stages - {ALL}):
        if word not in known:
            raise ConfigError("--save-tensor", "stages (apr trace MODEL lists them) or all", repr(word),
                              did_you_mean(word, known))
        if word not in here:
            raise ConfigError("--save-tensor", f"a stage of this {config.hf_model_type}", repr(word),
                              "only Qwen3 normalises its heads; leave it out")
        if word.startswith("d") and not backward:
            raise ConfigError("--save-tensor", "stages of the forward pass", f"'{word}', a gradient", "add --backward")
    return None if ALL in stages else stages


def parse_layers(text: str, config: TransformerConfig) -> range:
    """`3` or `0..3`, both ends included. Raises ConfigError for anything else, or a layer that the model lacks."""
    match = LAYERS.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < config.L:
        raise ConfigError("--layers", f"a layer, or the first and last as 0..3, of 0 to {config.L - 1}", repr(text),
                          "correct it")
    return range(first, last + 1)
