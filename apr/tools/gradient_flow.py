"""What every gradient should have been, given the points before it as the GPU had them: checks, from the loss down.

As dataflow.py, backwards: losses, the scores' gradient, and layer by layer the gradients of points and parameters. What
a step of AdamW makes of them is at the end.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from apr.config import TransformerConfig, TransformerTrainConfig
from apr.params import EMBED, NORM, ParamSpec
from apr.reference.model import head_name
from apr.taps import tap_name
from apr.tools.checks import Check
from apr.tools.dataflow import Layer, Seen, chain, exact, one, step
from apr.tools.weights import Weights

Grads = Mapping[str, np.ndarray]  # by parameter
SAMPLE = 1 << 18  # elements


def loss_checks(seen: Seen, losses: np.ndarray, targets: np.ndarray, dloss: float | None) -> Iterator[Check]:
    """The losses (N,) of the scores in `seen`, and with dloss the gradient that replaces the scores."""
    rows, flat = seen["logits"].reshape(targets.size, -1), targets.reshape(-1)
    yield exact("losses" if dloss is not None else "eval_losses", losses, "cross_entropy", logits=rows, targets=flat)
    if dloss is not None:
        got = seen[tap_name("logits", grad=True)].reshape(rows.shape)
        yield one(tap_name("logits", grad=True), got, "dlogits", logits=rows, targets=flat, dloss=dloss)


def backward_checks(seen: Seen, grads: Grads, c: TransformerConfig, weights: Weights, ids: np.ndarray
                    ) -> Iterator[Check]:
    """Every gradient of a pass over ids (B, T) after the scores', in dataflow order."""
    positions, eps, head = np.arange(ids.shape[1]), c.rms_norm_eps, head_name(c)
    dfinal, dlogits = tap_name("final_norm", grad=True), tap_name("logits", grad=True)
    last = tap_name("output", c.L - 1)
    yield one(dfinal, seen[dfinal], "linear_dinp", dout=seen[dlogits], weight=weights.read(head))
    if head != EMBED:
        yield exact(f"grad.{head}", grads[head], "linear_dweight", dout=seen[dlogits], x=seen["final_norm"])
    yield exact(f"grad.{NORM}", grads[NORM], "rmsnorm_dweight", dout=seen[dfinal], x=seen[last], eps=eps)
    top = tap_name("output", c.L - 1, True)
    yield one(top, seen[top], "rmsnorm_dinp", dout=seen[dfinal], x=seen[last], weight=weights.read(NORM), eps=eps)
    for index in reversed(range(c.L)):
        at = Layer(seen, c, index, weights.layer(index))
        yield from _ffn_backward(at, grads)
        yield from _attention_backward(at, grads, positions)
        yield from _input_backward(at, grads)
    steps = [step("embedding_dtable", "rows", dout="dout", ids="ids", rows="V")]
    values: dict[str, Any] = {"dout": seen[tap_name("embedding", grad=True)], "ids": ids, "V": c.V}
    if head == EMBED:
        values |= {"dlogits": seen[dlogits], "normed": seen["final_norm"]}
        steps += [step("linear_dweight", "head", dout="dlogits", x="normed"), step("add", "out", a="rows", b="head")]
    yield chain(f"grad.{EMBED}", grads[EMBED], values, *steps, exact=True)


def sample(array: np.ndarray) -> np.ndarray:
    """The elements (n,) of a large array that are checked: its beginning, its end, and one in so many between."""
    flat = array.reshape(-1)
    if flat.size <= 3 * SAMPLE:
        return flat
    return np.concatenate([flat[:SAMPLE], flat[SAMPLE:-SAMPLE:flat.size // SAMPLE], flat[-SAMPLE:]])


def _ffn_backward(at: Layer, grads: Grads) -> Iterator[Check]:
    def check(stage: str, op: str, **values: Any) -> Check:
        return one(at.name(stage, True), at.d(stage), op, **values)

    def weight(short: str, op: str, **values: Any) -> Check:
        return exact(f"grad.{at.full(short)}", grads[at.full(short)], op, **values)

    yield check("ffn_out", "identity", x=at.d("output"))
    yield check("ffn_swiglu", "linear_dinp", dout=at.d("ffn_out"), weight=at.w("down_proj.weight"))
    yield weight("down_proj.weight", "linear_dweight", dout=at.d("ffn_out"), x=at["ffn_swiglu"])
    for p, op in (("up", "swiglu_dup"), ("gate", "swiglu_dgate")):
        yield check(f"ffn_{p}", op, dact=at.d("ffn_swiglu"), gate=at["ffn_gate"], up=at["ffn_up"])
    for p in ("up", "gate"):
        yield weight(f"{p}_proj.weight", "linear_dweight", dout=at.d(f"ffn_{p}"), x=at["ffn_norm"])
    yield _sum_of_products(at, "ffn_norm", {p: (f"ffn_{p}", f"{p}_proj.weight") for p in ("gate", "up")})
    yield weight("post_attention_layernorm.weight", "rmsnorm_dweight", dout=at.d("ffn_norm"), x=at["attn_residual"],
                 eps=at.c.rms_norm_eps)
    yield _through_norm(at.name("attn_residual", True), at.d("attn_residual"), at.d("ffn_norm"), at["attn_residual"],
                        at.w("post_attention_layernorm.weight"), at.d("output"), at.c)


def _attention_backward(at: Layer, grads: Grads, positions: np.ndarray) -> Iterator[Check]:
    c = at.c
    yield one(at.name("attn_out", True), at.d("attn_out"), "identity", x=at.d("attn_residual"))
    yield one(at.name("attn_heads", True), at.d("attn_heads"), "linear_dinp", dout=at.d("attn_out"),
              weight=at.w("o_proj.weight"))
    name = at.full("o_proj.weight")
    yield exact(f"grad.{name}", grads[name], "linear_dweight", dout=at.d("attn_out"), x=at["attn_heads"])
    for p, stage in (("k", "k_rope"), ("q", "q_rope"), ("v", "v_bias")):
        yield one(at.name(stage, True), at.d(stage), f"attention_d{p}", dout=at.d("attn_heads"), q=at["q_rope"],
                  k=at["k_rope"], v=at["v_bias"], scale=c.HS ** -0.5)
    for p in "kq":
        values = {"d": at.d(f"{p}_rope"), **at.rotation(positions), "x": at[f"{p}_bias"], "eps": c.rms_norm_eps}
        steps = [step("rope_dinp", "turned", dout="d", positions="positions", theta="theta", scaling="scaling")]
        if c.qk_norm:
            values["w"] = at.w(f"{p}_norm.weight")
            name = at.full(f"{p}_norm.weight")
            yield chain(f"grad.{name}", grads[name], values, *steps,
                        step("rmsnorm_dweight", "out", dout="turned", x="x", eps="eps"), exact=True)
            steps.append(step("rmsnorm_dinp", "out", dout="turned", x="x", weight="w", eps="eps"))
        yield chain(at.name(f"{p}_bias", True), at.d(f"{p}_bias"), values, *steps)


def _input_backward(at: Layer, grads: Grads) -> Iterator[Check]:
    c = at.c
    for p in "vkq":
        yield one(at.name(f"{p}_linear", True), at.d(f"{p}_linear"), "identity", x=at.d(f"{p}_bias"))
        if c.use_bias:
            name = at.full(f"{p}_proj.bias")
            yield exact(f"grad.{name}", grads[name], "bias_dbias", dout=at.d(f"{p}_linear"))
        name = at.full(f"{p}_proj.weight")
        yield exact(f"grad.{name}", grads[name], "linear_dweight", dout=at.d(f"{p}_linear"), x=at["attn_norm"])
    yield _sum_of_products(at, "attn_norm", {p: (f"{p}_linear", f"{p}_proj.weight") for p in "qkv"})
    name = at.full("input_layernorm.weight")
    yield exact(f"grad.{name}", grads[name], "rmsnorm_dweight", dout=at.d("attn_norm"), x=at.x, eps=c.rms_norm_eps)
    below = tap_name("output", at.index - 1, True) if at.index else tap_name("embedding", grad=True)
    yield _through_norm(below, at.seen[below], at.d("attn_norm"), at.x, at.w("input_layernorm.weight"),
                        at.d("attn_residual"), c)


def _sum_of_products(at: Layer, stage: str, parts: Mapping[str, tuple[str, str]]) -> Check:
    """The gradient of an input that several matrices read."""
    values: dict[str, Any] = {}
    steps, total = [], ""
    for p, (source, weight) in parts.items():
        values |= {f"d{p}": at.d(source), f"w{p}": at.w(weight)}
        steps.append(step("linear_dinp", p, dout=f"d{p}", weight=f"w{p}"))
        if total:
            steps.append(step("add", f"{total}+{p}", a=total, b=p))
        total = steps[-1].out
    return chain(at.name(stage, True), at.d(stage), values, *steps)


def _through_norm(stage: str, got: np.ndarray, dnorm: np.ndarray, x: np.ndarray, weight: np.ndarray, skip: np.ndarray,
                  c: TransformerConfig) -> Check:
    """The stream's gradient: through the norm and its branch, and past them."""
    return chain(stage, got, {"dnorm": dnorm, "x": x, "w": weight, "eps": c.rms_norm_eps, "skip": skip},
                 step("rmsnorm_dinp", "branch", dout="dnorm", x="x", weight="w", eps="eps"),
                 step("residual", "out", a="skip", b="branch"))


def optimizer_checks(specs: tuple[ParamSpec, ...], old: Mapping[str, Grads], new: Mapping[str, Grads], grads: Grads,
                     norm: float, config: TransformerTrainConfig, count: int, lr: float) -> Iterator[Check]:
    """Update number `count`: `old` and `new` hold master, m, v by parameter; `norm` is what the GPU said it was.

    The master's check is of its change, since rounding of the parameter itself would hide much. Of a large parameter
    the elements that `sample` takes are checked.
    """
    every = np.concatenate([grads[s.name].reshape(-1) for s in specs])
    yield exact("grad_norm", np.array([norm]), "global_norm", grad=every)
    for spec in specs:
        p = spec.name
        m, v, master, g = sample(old["m"][p]), sample(old["v"][p]), sample(old["master"][p]), sample(grads[p])
        m_new, v_new, master_new = (sample(new[kind][p]) for kind in ("m", "v", "master"))
        values = {"g": g, "norm": np.array([norm]), "max_norm": config.max_grad_norm, "beta1": config.beta1,
                  "beta2": config.beta2, "m": m, "v": v, "m new": m_new, "v new": v_new, "lr": lr,
                  "eps": config.adam_eps, "count": count, "decay": config.weight_decay if spec.decay else 0.0,
                  "p": master, "-p": -master}
        clip = step("clip", "factor", norm="norm", max_norm="max_norm")
        yield chain(f"m.{p}", m_new, values, clip,
                    step("adamw_m", "out", m="m", grad="g", beta1="beta1", grad_scale="factor"), exact=True)
        yield chain(f"v.{p}", v_new, values, clip,
                    step("adamw_v", "out", v="v", grad="g", beta2="beta2", grad_scale="factor"), exact=True)
        change = np.asarray(master_new, np.float64) - master
        yield chain(f"update.{p}", change, values,
                    step("adamw_param", "p new", param="p", m="m new", v="v new", lr="lr", eps="eps",
                         weight_decay="decay", step="count", beta1="beta1", beta2="beta2"),
                    step("add", "out", a="p new", b="-p"), exact=True)
