"""The whole model: embedding, L layers, final norm, head; and its gradient.

A tied head is the embedding table itself: one array, and one gradient that both uses add to.
"""

from typing import Any

import numpy as np

from apr.config import IGNORE, TransformerConfig
from apr.errors import ShapeError
from apr.params import EMBED, HEAD, NORM
from apr.reference.block import Arrays, block_backward, block_forward
from apr.reference.cross_entropy import cross_entropy_forward_backward
from apr.reference.embedding import embedding_backward, embedding_forward
from apr.reference.linear import linear_backward, linear_forward
from apr.reference.rmsnorm import rmsnorm_backward, rmsnorm_forward
from apr.reference.rope import rope_tables
from apr.taps import Tap, layer_tap, tap_name


def head_name(config: TransformerConfig) -> str:
    """The parameter that the head multiplies by."""
    return EMBED if config.tie_word_embeddings else HEAD


def model_forward(params: Arrays, config: TransformerConfig, ids: np.ndarray, saved: dict[str, Any] | None = None,
                  tap: Tap | None = None) -> np.ndarray:
    """Next-token scores.

    params by Hugging Face name, all of one float dtype, which is also the dtype of the result; ids (B, T) int. What
    backward needs goes into `saved` unless it is None. Returns logits (B, T, V). Raises ShapeError when T is 0 or
    exceeds max_position_embeddings.
    """
    t = ids.shape[1]
    if not 1 <= t <= config.max_position_embeddings:
        raise ShapeError("ids (B, T)", f"1 <= T <= max_position_embeddings = {config.max_position_embeddings}",
                         f"T = {t}", "shorten the sequence")
    x = embedding_forward(ids, params[EMBED])
    if tap is not None:
        tap("embedding", x)
    tables = rope_tables(np.arange(t), config.HS, config.rope_theta, config.rope_scaling, x.dtype)
    layers: list[dict[str, Any] | None] = [None if saved is None else {} for _ in range(config.L)]
    for layer in range(config.L):
        x = block_forward(params, config, layer, x, tables, layers[layer], layer_tap(tap, layer))
    normed, rstd = rmsnorm_forward(x, params[NORM], config.rms_norm_eps)
    logits = linear_forward(normed, params[head_name(config)])
    if tap is not None:
        tap("final_norm", normed)
        tap("logits", logits)
    if saved is not None:
        saved.update(ids=ids, tables=tables, layers=layers, x=x, normed=normed, rstd=rstd)
    return logits


def model_backward(params: Arrays, grads: Arrays, config: TransformerConfig, dlogits: np.ndarray, saved: dict[str, Any],
                   tap: Tap | None = None) -> None:
    """Gradient of model_forward.

    grads by name, accumulated; dlogits (B, T, V); saved as model_forward left it, emptied layer by layer.
    """
    head = head_name(config)
    if tap is not None:
        tap(tap_name("logits", grad=True), dlogits)
    dnormed = linear_backward(grads[head], dlogits, saved["normed"], params[head])
    if tap is not None:
        tap(tap_name("final_norm", grad=True), dnormed)
    dx = rmsnorm_backward(grads[NORM], dnormed, saved["x"], params[NORM], saved["rstd"])
    for layer in reversed(range(config.L)):
        dx = block_backward(params, grads, config, layer, dx, saved["tables"], saved["layers"].pop(),
                            layer_tap(tap, layer, grad=True))
    if tap is not None:
        tap(tap_name("embedding", grad=True), dx)
    embedding_backward(grads[EMBED], dx, saved["ids"])


def loss_and_gradients(params: Arrays, grads: Arrays, config: TransformerConfig, inputs: np.ndarray,
                       targets: np.ndarray, dloss: float, tap: Tap | None = None) -> float:
    """Sum of the losses in nats; gradients of dloss times that sum are added to `grads`.

    inputs, targets (B, T) int, targets IGNORE where there is none. With dloss = 1 / (counted targets) it is the mean's
    gradient. tap sees forward and backward points.
    """
    saved: dict[str, Any] = {}
    logits = model_forward(params, config, inputs, saved, tap)
    losses = cross_entropy_forward_backward(logits.reshape(-1, config.V), targets.reshape(-1), dloss)
    model_backward(params, grads, config, logits, saved, tap)
    return float(losses.sum(dtype=np.float64))


def loss_sum(params: Arrays, config: TransformerConfig, inputs: np.ndarray, targets: np.ndarray) -> float:
    """Sum of the losses in nats, without gradients; arguments as loss_and_gradients."""
    logits = model_forward(params, config, inputs)
    losses = cross_entropy_forward_backward(logits.reshape(-1, config.V), targets.reshape(-1), None)
    return float(losses.sum(dtype=np.float64))


def count_targets(targets: np.ndarray) -> int:
    """How many targets are counted (not IGNORE)."""
    return int(np.count_nonzero(targets != IGNORE))
