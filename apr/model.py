"""The whole model on the GPU: embedding, L layers, final norm, head and loss; and its gradient.

The head works on `plan.rows` rows of logits at a time: scores, losses, their gradient over them, and both products of
the gradient, before the next rows; so backward through the head is part of `model_loss`. A tied head is the embedding
table itself: one buffer, and one gradient that both uses add to.

A step's first part sets the gradients and the others add to them (Batch.add), so that no memory is cleared which a
product writes anyway: the vectors, whose kernels always add, and an untied table, of which only the rows of tokens that
occur are written, are what is cleared.
"""

from typing import Any

import numpy as np

from apr.arena import Arena
from apr.block import Batch, LayerViews, block_backward, block_forward, layer_views, stored, to_host
from apr.config import TransformerConfig
from apr.device import Device
from apr.gemm import Gemm
from apr.kernel import floatx
from apr.ops.cross_entropy import cross_entropy_forward, cross_entropy_forward_backward, cross_entropy_sum
from apr.ops.embedding import embedding_backward, embedding_forward
from apr.ops.linear import linear_backward, linear_forward
from apr.ops.rmsnorm import rmsnorm_backward, rmsnorm_forward
from apr.ops.rope import rope_table
from apr.params import EMBED, HEAD, NORM, ParamSpec, layout
from apr.taps import Tap, tap_name


class Model:
    """A model's weights and gradients in an arena, and the passes over it."""

    def __init__(self, dev: Device, gemm: Gemm, arena: Arena, config: TransformerConfig) -> None:
        self.dev, self.gemm, self.arena, self.config = dev, gemm, arena, config
        self.layout = layout(config)
        self.head = EMBED if config.tie_word_embeddings else HEAD
        self.storage = floatx(arena["params"])
        self.weights: list[LayerViews] = [layer_views(arena, "params", self.layout, config, i) for i in range(config.L)]
        self.grads: list[LayerViews] = [layer_views(arena, "grads", self.layout, config, i) for i in range(config.L)
                                        if "grads" in arena.arrays]
        rope_table(dev, arena["cos"], arena["sin"], config, self.storage)

    def matrix(self, buffer: str, name: str) -> Any:
        """The embedding table or head (Vp, C), its padding rows too."""
        return self.arena.part(buffer, self.layout.offset(name), (self.config.Vp, self.config.C))

    def stored(self, spec: ParamSpec) -> np.ndarray:
        """A parameter as the kernels read it, copied to the host: float32, or bfloat16 bit for bit."""
        return stored(self.dev, self.arena.part("params", self.layout.offset(spec.name), spec.shape))

    def batch(self, B: int, T: int, tap: Tap | None = None, slot: int | None = None, add: bool = True) -> Batch:
        """What the passes over B sequences of T tokens work with; `ids`, `targets` … hold the batch.

        With `slot` (then B is 1) forward leaves the keys and values in the cache, as those of that sequence. `add`
        False: the gradients are set, whatever is in `grads`.
        """
        return Batch(self.dev, self.gemm, self.arena, self.config, B, T, tap, slot, add)

    def forward(self, b: Batch) -> None:
        """From `ids` to `final_norm`."""
        c, arena = self.config, self.arena
        ids = arena.rows("ids", (b.N,))
        embedding_forward(self.dev, b.residual(0)[0], self.matrix("params", EMBED), ids)
        b.look("embedding", b.residual(0)[0], c.C)
        for layer in range(c.L):
            block_forward(b, self.weights[layer], layer, pending=layer > 0)
        stream, rstd = b.residual(2 * c.L)
        final = b.rows("final_norm", c.C)
        rmsnorm_forward(self.dev, final, rstd, stream, b.residual(2 * c.L - 1)[0], b.rows("branch", c.C),
                        arena.part("params", self.layout.offset(NORM), (c.C,)), eps=c.rms_norm_eps)
        b.look(tap_name("output", c.L - 1), stream, c.C)
        b.look("final_norm", final, c.C)

    def logits(self, b: Batch) -> np.ndarray:
        """Scores (B, T, V) float32 on the host, after `forward`."""
        out = [to_host(self.dev, self._scores(b, start, stop))[:, :self.config.V] for start, stop in self._chunks(b)]
        return np.concatenate(out).reshape(b.B, b.T, self.config.V)

    def losses(self, b: Batch) -> None:
        """After `forward`: the sum of this batch's losses is added to stats[0]; no gradients."""
        for start, stop in self._chunks(b):
            cross_entropy_forward(self.dev, self._row(b, "losses", start, stop), self._scores(b, start, stop),
                                  self._row(b, "targets", start, stop), self.config.V)
        self._add_losses(b)

    def losses_and_gradients(self, b: Batch) -> None:
        """As `losses`, and the gradient of step[0] (dloss) times that sum is added to `grads`, or set (Batch.add)."""
        c, arena = self.config, self.arena
        weight, dweight = self.matrix("params", self.head), self.matrix("grads", self.head)
        final, dfinal = b.rows("final_norm", c.C), b.rows("dnorm", c.C)
        if not b.add:
            self._clear()
        for start, stop in self._chunks(b):
            arena.enter("logits")
            logits = self._scores(b, start, stop)
            if b.tap is not None:
                self._tap_rows(b, "logits", logits)
            arena.enter("dlogits")
            cross_entropy_forward_backward(self.dev, self._row(b, "losses", start, stop), logits,
                                           self._row(b, "targets", start, stop), arena["step"][:1], c.V)
            if b.tap is not None:
                self._tap_rows(b, tap_name("logits", grad=True), logits)
            linear_backward(self.gemm, dfinal[start:stop], dweight, logits, final[start:stop], weight,
                            add=b.add or start > 0)
            arena.enter("free")
        self._add_losses(b)
        b.look(tap_name("final_norm", grad=True), dfinal, c.C)
        offset = self.layout.offset(NORM)
        stream, rstd = b.residual(2 * c.L)
        rmsnorm_backward(self.dev, b.rows("dresidual", c.C), arena.part("grads", offset, (c.C,)), b.rows("norm", c.C),
                         b.partial(c.C), dfinal, None, stream, arena.part("params", offset, (c.C,)), rstd,
                         eps=c.rms_norm_eps)
        for layer in reversed(range(c.L)):
            block_backward(b, self.weights[layer], self.grads[layer], layer)
        b.look(tap_name("embedding", grad=True), b.rows("dresidual", c.C), c.C)
        embedding_backward(self.dev, self.matrix("grads", EMBED), b.rows("dresidual", c.C), arena.rows("ids", (b.N,)),
                           arena.rows("order", (b.N,)), arena.rows("runs", (b.N + 1,)))

    def _clear(self) -> None:
        """Zero the gradients that are only ever added to: the vectors, which lie together, and an untied table."""
        end = self.layout.decay_end
        self.dev.fill(self.arena["grads"][end:], 0)
        if self.head != EMBED:
            self.dev.fill(self.matrix("grads", EMBED), 0)

    def _chunks(self, b: Batch) -> list[tuple[int, int]]:
        rows = self.arena.plan.rows
        return [(start, min(start + rows, b.N)) for start in range(0, b.N, rows)]

    def _row(self, b: Batch, name: str, start: int, stop: int) -> Any:
        return self.arena.rows(name, (b.N,))[start:stop]

    def _scores(self, b: Batch, start: int, stop: int) -> Any:
        logits = self.arena.rows("logits_buf", (stop - start, self.config.Vp))
        linear_forward(self.gemm, logits, b.rows("final_norm", self.config.C)[start:stop],
                       self.matrix("params", self.head))
        return logits

    def _add_losses(self, b: Batch) -> None:
        cross_entropy_sum(self.dev, self.arena["stats"][:1], self.arena.rows("losses", (b.N,)), self.config.V,
                          self.config.Vp, self.storage)

    def _tap_rows(self, b: Batch, name: str, logits: Any) -> None:
        """Show scores to the tap, where they are all in memory at once."""
        assert b.tap is not None
        if logits.shape[0] == b.N:
            b.look(name, logits, self.config.V, columns=slice(0, self.config.V))
