"""Taps: the named points of the model where a tool may look, in dataflow order.

A model calls `tap(name, array)` at each point if a tap was given; without one a point costs one comparison. The
reference and the GPU model emit the same names with the same meaning, shape and layout, so that *trace* can write them,
*parity* compare them and *bisect* name the first that differs. A comparer must refuse names that have no partner. The
array is live: a tap that keeps it must copy it (the loss writes its gradient over the logits).

A layer's point is `L03.attn_norm`; the gradient with respect to it is `L03.dattn_norm`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Tap = Callable[[str, np.ndarray], None]


@dataclass(frozen=True)
class Stage:
    """One capture point. `shape` is in the symbols of docs/glossary.md."""

    name: str
    shape: str
    meaning: str


EMBEDDING = Stage("embedding", "B T C", "rows of the embedding table, before layer 0")
LAYER_STAGES = (
    Stage("attn_norm", "B T C", "input RMSNorm, scaled by its weight"),
    Stage("q_linear", "B T NH*HS", "query projection, before its bias"),
    Stage("k_linear", "B T NKV*HS", "key projection, before its bias"),
    Stage("v_linear", "B T NKV*HS", "value projection, before its bias"),
    Stage("q_bias", "B T NH HS", "query after bias, before head norm and rotation; equals q_linear without bias"),
    Stage("k_bias", "B T NKV HS", "key after bias, before head norm and rotation; equals k_linear without bias"),
    Stage("v_bias", "B T NKV HS", "value after bias; equals v_linear without bias"),
    Stage("q_norm", "B T NH HS", "query after per-head RMSNorm (Qwen3 only)"),
    Stage("k_norm", "B T NKV HS", "key after per-head RMSNorm (Qwen3 only)"),
    Stage("q_rope", "B T NH HS", "query after rotation"),
    Stage("k_rope", "B T NKV HS", "key after rotation"),
    Stage("attn_heads", "B T NH*HS", "softmax(q k^T / sqrt(HS)) v, heads side by side, before the output projection"),
    Stage("attn_out", "B T C", "attention output projection"),
    Stage("attn_residual", "B T C", "residual stream after attention"),
    Stage("ffn_norm", "B T C", "post-attention RMSNorm, scaled by its weight"),
    Stage("ffn_gate", "B T F", "gate projection"),
    Stage("ffn_up", "B T F", "up projection"),
    Stage("ffn_silu", "B T F", "silu(gate)"),
    Stage("ffn_swiglu", "B T F", "silu(gate) * up"),
    Stage("ffn_out", "B T C", "down projection"),
    Stage("output", "B T C", "residual stream after the layer"),
)
FINAL_STAGES = (
    Stage("final_norm", "B T C", "final RMSNorm, scaled by its weight"),
    Stage("logits", "B T V", "scores of the vocabulary"),
)

STAGES = {stage.name: stage for stage in (EMBEDDING, *LAYER_STAGES, *FINAL_STAGES)}


def tap_name(stage: str, layer: int | None = None, grad: bool = False) -> str:
    """The full name of a point: `L03.dattn_norm` for the gradient at stage attn_norm of layer 3."""
    return ("" if layer is None else f"L{layer:02d}.") + ("d" if grad else "") + stage


def split_name(name: str) -> tuple[Stage, int | None, bool]:
    """The stage, the layer (None: the whole model's) and whether it is the gradient, of a name as tap_name makes it.

    Raises KeyError for any other text.
    """
    layer, _, word = name.rpartition(".")
    grad = word.startswith("d")
    stage = STAGES[word.removeprefix("d")]
    number = int(layer[1:]) if layer[:1] == "L" and layer[1:].isdecimal() and len(layer) <= 10 else None
    if (number is None) == (stage in LAYER_STAGES) or tap_name(stage.name, number, grad) != name:
        raise KeyError(name)
    return stage, number, grad


def layer_tap(tap: Tap | None, layer: int, grad: bool = False) -> Tap | None:
    """A tap that takes stage names and passes full names on; None stays None."""
    if tap is None:
        return None
    return lambda stage, array: tap(tap_name(stage, layer, grad), array)


def expected_names(num_layers: int, qk_norm: bool) -> list[str]:
    """Every name that a forward pass must emit, in order."""
    layer = [s.name for s in LAYER_STAGES if qk_norm or s.name not in ("q_norm", "k_norm")]
    names = [EMBEDDING.name]
    for index in range(num_layers):
        names += [tap_name(stage, index) for stage in layer]
    return names + [s.name for s in FINAL_STAGES]


def expected_gradient_names(num_layers: int, qk_norm: bool) -> list[str]:
    """Every name that a backward pass must emit, in order: the forward pass's points in reverse."""
    names = [split_name(name) for name in reversed(expected_names(num_layers, qk_norm))]
    return [tap_name(stage.name, layer, grad=True) for stage, layer, _ in names]


class Recorder:
    """A tap that keeps a copy of everything, float32; what it sees again is a later token, as decoding shows them."""

    def __init__(self) -> None:
        self.seen: dict[str, list[np.ndarray]] = {}

    def __call__(self, name: str, array: np.ndarray) -> None:
        self.seen.setdefault(name, []).append(np.array(array, np.float32))

    def arrays(self) -> dict[str, np.ndarray]:
        """Each point, (B, T, …), in the order in which they were first seen."""
        return {name: np.concatenate(parts, 1) for name, parts in self.seen.items()}
