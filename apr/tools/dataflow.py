"""What every stage of a pass should have been, given the stages before it as the GPU had them: a list of checks.

Inputs of a check are the GPU's own arrays, which earlier checks have found to be right, and the parameters of the file.
So roundings do not pile up, each stage is judged by itself, and the first that fails is the one that went wrong.
`ffn_silu` is left out: no kernel writes it, the tap computes it on the host.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from apr.config import TransformerConfig
from apr.params import EMBED, NORM
from apr.reference.model import head_name
from apr.taps import tap_name
from apr.tools.checks import Check, Step
from apr.tools.weights import Weights

Seen = Mapping[str, np.ndarray]  # points by name, (B, T, …)


def one(stage: str, got: np.ndarray, op: str, **values: Any) -> Check:
    """A check of one op, whose arguments are `values`."""
    return Check(stage, (Step(op, "out", {name: name for name in values}),), values, got)


def exact(stage: str, got: np.ndarray, op: str, **values: Any) -> Check:
    """The same, of a result that is float32 in bf16 training too."""
    return replace(one(stage, got, op, **values), exact=True)


def chain(stage: str, got: np.ndarray, values: Mapping[str, Any], *steps: Step, exact: bool = False) -> Check:
    """A check of several ops, one after the other."""
    return Check(stage, steps, values, got, exact=exact)


def step(op: str, out: str, **given: str) -> Step:
    """One of them."""
    return Step(op, out, given)


class Layer:
    """One layer's parameters by short name, and its points: `layer["q_rope"]`, `layer.d("q_rope")`."""

    def __init__(self, seen: Seen, config: TransformerConfig, index: int, params: Mapping[str, np.ndarray]) -> None:
        self.seen, self.c, self.index, self.params = seen, config, index, params

    def name(self, stage: str, grad: bool = False) -> str:
        """The point's full name."""
        return tap_name(stage, self.index, grad)

    def __getitem__(self, stage: str) -> np.ndarray:
        return self.seen[self.name(stage)]

    def d(self, stage: str) -> np.ndarray:
        """The gradient at a point."""
        return self.seen[self.name(stage, True)]

    @property
    def x(self) -> np.ndarray:
        """The layer's input."""
        return self.seen[tap_name("output", self.index - 1) if self.index else "embedding"]

    def full(self, short: str) -> str:
        """The Hugging Face name of `q_proj.weight`, `input_layernorm.weight`, …"""
        part = "mlp." if short.split("_")[0] in ("gate", "up", "down") else "" if "layernorm" in short else "self_attn."
        return f"model.layers.{self.index}.{part}{short}"

    def w(self, short: str) -> np.ndarray:
        """A parameter."""
        return self.params[self.full(short)]

    def rotation(self, positions: np.ndarray) -> dict[str, Any]:
        """The arguments of rope but x."""
        return {"positions": positions, "theta": self.c.rope_theta, "scaling": self.c.rope_scaling}


def forward_checks(seen: Seen, c: TransformerConfig, weights: Weights, ids: np.ndarray) -> Iterator[Check]:
    """Every point of a forward pass over ids (B, T), in dataflow order."""
    table, positions = weights.read(EMBED), np.arange(ids.shape[1])
    yield one("embedding", seen["embedding"], "embedding", ids=ids, table=table)
    for index, params in weights.layers(c.L):
        yield from _layer_forward(Layer(seen, c, index, params), positions)
    x, name = seen[tap_name("output", c.L - 1)], head_name(c)
    yield one("final_norm", seen["final_norm"], "rmsnorm", x=x, weight=weights.read(NORM), eps=c.rms_norm_eps)
    yield one("logits", seen["logits"], "linear", x=seen["final_norm"],
              weight=table if name == EMBED else weights.read(name))


def _layer_forward(at: Layer, positions: np.ndarray) -> Iterator[Check]:
    c = at.c

    def check(stage: str, op: str, **values: Any) -> Check:
        return one(at.name(stage), at[stage], op, **values)

    yield check("attn_norm", "rmsnorm", x=at.x, weight=at.w("input_layernorm.weight"), eps=c.rms_norm_eps)
    for p in "qkv":
        yield check(f"{p}_linear", "linear", x=at["attn_norm"], weight=at.w(f"{p}_proj.weight"))
    for p in "qkv":
        raw = at[f"{p}_linear"]
        yield (check(f"{p}_bias", "bias", x=raw, bias=at.w(f"{p}_proj.bias")) if c.use_bias else
               check(f"{p}_bias", "identity", x=raw))
    for p in "qk" if c.qk_norm else "":
        yield check(f"{p}_norm", "rmsnorm", x=at[f"{p}_bias"], weight=at.w(f"{p}_norm.weight"), eps=c.rms_norm_eps)
    for p in "qk":
        yield check(f"{p}_rope", "rope", x=at[f"{p}_norm" if c.qk_norm else f"{p}_bias"], **at.rotation(positions))
    yield check("attn_heads", "attention", q=at["q_rope"], k=at["k_rope"], v=at["v_bias"], scale=c.HS ** -0.5)
    yield check("attn_out", "linear", x=at["attn_heads"], weight=at.w("o_proj.weight"))
    yield check("attn_residual", "residual", a=at.x, b=at["attn_out"])
    yield check("ffn_norm", "rmsnorm", x=at["attn_residual"], weight=at.w("post_attention_layernorm.weight"),
                eps=c.rms_norm_eps)
    for p in ("gate", "up"):
        yield check(f"ffn_{p}", "linear", x=at["ffn_norm"], weight=at.w(f"{p}_proj.weight"))
    yield check("ffn_swiglu", "swiglu", gate=at["ffn_gate"], up=at["ffn_up"])
    yield check("ffn_out", "linear", x=at["ffn_swiglu"], weight=at.w("down_proj.weight"))
    yield check("output", "residual", a=at["attn_residual"], b=at["ffn_out"])


def decoding_checks(seen: Seen, before: Seen, c: TransformerConfig, weights: Weights, ids: np.ndarray, n: int
                    ) -> Iterator[Check]:
    """Every point of decoding tokens n to T of ids (1, T), after the first n went through as a prompt.

    `seen`: points of all T tokens, those that a fused kernel hides of the first n only; `k_cache` and `v_cache` of each
    layer (1, T, NKV, HS), read when all was done. `before`: the same for an earlier, longer sequence in the same slot.
    """
    table = weights.read(EMBED)
    yield one("embedding", seen["embedding"][:, n:], "embedding", ids=ids[:, n:], table=table)
    for index, params in weights.layers(c.L):
        yield from _layer_decoding(Layer(seen, c, index, params), before, np.arange(ids.shape[1]), n)
    name = head_name(c)
    yield chain("logits", seen["logits"][:, n:],
                {"x": seen[tap_name("output", c.L - 1)][:, n:], "w": weights.read(NORM), "eps": c.rms_norm_eps,
                 "head": table if name == EMBED else weights.read(name)},
                step("rmsnorm", "normed", x="x", weight="w", eps="eps"),
                step("linear", "logits", x="normed", weight="head"), exact=True)


def _layer_decoding(at: Layer, before: Seen, positions: np.ndarray, n: int) -> Iterator[Check]:
    c, new, T = at.c, positions[n:], positions.size

    def tail(stage: str) -> np.ndarray:
        return at[stage][:, n:]

    for kind, source in (("k", "k_rope"), ("v", "v_bias")):  # what the prompt left in the cache
        stage = f"{kind}_cache"
        yield Check(at.name(stage), (Step("identity", "out", {"x": "x"}),), {"x": at[source][:, :n]}, at[stage][:, :n],
                    before[at.name(stage)][:, :n])
    x = at.x[:, n:]
    norm = step("rmsnorm", "normed", x="x", weight="norm", eps="eps")
    values = {"x": x, "norm": at.w("input_layernorm.weight"), "eps": c.rms_norm_eps, "HS": c.HS}
    for p in "qkv":
        steps = [norm, step("linear", "raw", x="normed", weight="w")]
        if c.use_bias:
            steps.append(step("bias", "biased", x="raw", bias="b"))
        steps.append(step("heads", "out", x=steps[-1].out, HS="HS"))
        bias = {"b": at.w(f"{p}_proj.bias")} if c.use_bias else {}
        yield chain(at.name(f"{p}_bias"), tail(f"{p}_bias"), {**values, "w": at.w(f"{p}_proj.weight"), **bias}, *steps,
                    exact=True)
    turn, numbers = _turned(at, new)
    yield Check(at.name("k_rope"), turn("k"), {**numbers, "k": tail("k_bias")}, tail("k_rope"),
                before[at.name("k_cache")][:, n:T])
    yield chain(at.name("attn_heads"), tail("attn_heads"),
                {**numbers, "q": tail("q_bias"), "keys": at["k_rope"], "v": at["v_bias"], "scale": c.HS ** -0.5},
                *turn("q"), step("attention", "out", q="q turned", k="keys", v="v", scale="scale"))
    yield chain(at.name("attn_residual"), tail("attn_residual"),
                {"x": x, "heads": tail("attn_heads"), "w": at.w("o_proj.weight")},
                step("linear", "branch", x="heads", weight="w"), step("residual", "out", a="x", b="branch"), exact=True)
    yield chain(at.name("ffn_swiglu"), tail("ffn_swiglu"),
                {"x": tail("attn_residual"), "norm": at.w("post_attention_layernorm.weight"), "eps": c.rms_norm_eps,
                 "gate_w": at.w("gate_proj.weight"), "up_w": at.w("up_proj.weight")},
                norm, step("linear", "gate", x="normed", weight="gate_w"),
                step("linear", "up", x="normed", weight="up_w"), step("swiglu", "out", gate="gate", up="up"),
                exact=True)
    yield chain(at.name("output"), tail("output"),
                {"x": tail("attn_residual"), "act": tail("ffn_swiglu"), "w": at.w("down_proj.weight")},
                step("linear", "branch", x="act", weight="w"), step("residual", "out", a="x", b="branch"), exact=True)


def _turned(at: Layer, positions: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """The steps from `q` or `k` to its rotation, and the values that both need."""
    c = at.c
    values = {**at.rotation(positions), "eps": c.rms_norm_eps}
    if c.qk_norm:
        values |= {f"{p}_norm": at.w(f"{p}_norm.weight") for p in "qk"}

    def steps(p: str) -> tuple[Step, ...]:
        first = (step("rmsnorm", f"{p} normed", x=p, weight=f"{p}_norm", eps="eps"),) if c.qk_norm else ()
        return (*first, step("rope", f"{p} turned", x=f"{p} normed" if c.qk_norm else p, positions="positions",
                             theta="theta", scaling="scaling"))

    return steps, values
