"""The matrix-vector products of decoding, each with what is fused to it, beside F.linear on the same matrix alone.

Launched as a step launches them, but each on its own: in a step, a kernel's first weights arrive while the one before
is still ending. The peer's product has neither norm nor bias, activation, residual or search for the best.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from harness import BYTES, MODELS, Bench, Case, Work, run
from peers import EAGER

from apr.config import TransformerConfig
from apr.ops.decode_linear import decode_add, decode_gate_up, decode_head, decode_qkv, head_blocks

BATCHES = (1, 8)


def weight_bytes(I: int, O: int, s: int) -> int:  # noqa: E741 (the glossary's symbols)
    return O * I * s


def flops(B: int, I: int, O: int) -> int:  # noqa: E741
    return 2 * B * O * I


def beside_linear(matrix: Any, b: Bench, B: int, X: str) -> Callable[[Any], Any]:
    """The peer, on inputs of the matrix's type."""
    inp = b.random((B, matrix.shape[1]), X)

    def peers(p: Any) -> Any:
        x, m = p.tensors(inp, matrix)
        return {EAGER: lambda: lambda: p.functional.linear(x, m)}
    return peers


def case(name: str, B: int, rows: int, width: int, X: str, launch: Callable[[Bench, Any], Any]) -> Case:
    """A product of a matrix (rows, width) with B inputs; `launch` makes the other arrays and gives what to time."""
    def setup(b: Bench) -> Work:
        matrix = b.random((rows, width), X)
        return Work(launch(b, matrix), beside_linear(matrix, b, B, X))
    return Case(f"{name} B={B}", X, weight_bytes(width, rows, BYTES[X]), flops(B, width, rows), setup)


def qkv(name: str, c: TransformerConfig, B: int, X: str) -> Case:
    def launch(b: Bench, matrix: Any) -> Any:
        out, x, weight = b.empty((B, c.QKV), "f32"), b.random((B, c.C), "f32"), b.random((c.C,), X)
        bias = b.random((c.QKV,), X) if c.use_bias else None
        return lambda: decode_qkv(b.dev, out, x, matrix, weight, bias, eps=c.rms_norm_eps, first=False)
    return case(f"qkv {name}", B, c.QKV, c.C, X, launch)


def add(which: str, name: str, c: TransformerConfig, B: int, X: str) -> Case:
    """The output projection (o) or the down projection, into the residual stream."""
    width = c.NH * c.HS if which == "o" else c.F

    def launch(b: Bench, matrix: Any) -> Any:
        x, inp = b.random((B, c.C), "f32"), b.random((B, width), "f32")
        return lambda: decode_add(b.dev, x, inp, matrix, eps=c.rms_norm_eps)
    return case(f"{which} {name}", B, c.C, width, X, launch)


def gate_up(name: str, c: TransformerConfig, B: int, X: str) -> Case:
    def launch(b: Bench, matrix: Any) -> Any:
        out, x, weight = b.empty((B, c.F), "f32"), b.random((B, c.C), "f32"), b.random((c.C,), X)
        return lambda: decode_gate_up(b.dev, out, x, matrix, weight, eps=c.rms_norm_eps)
    return case(f"gate_up {name}", B, 2 * c.F, c.C, X, launch)


def head(name: str, c: TransformerConfig, B: int, X: str) -> Case:
    def launch(b: Bench, matrix: Any) -> Any:
        out, x, weight = b.empty((B, c.V), "f32"), b.random((B, c.C), "f32"), b.random((c.C,), X)
        bests = head_blocks(c, B, X)
        score, best = b.empty((B, bests), "f32"), b.empty((B, bests), "i32")
        settings = b.put(np.array([c.V, 0, 0, 0, 0]))
        return lambda: decode_head(b.dev, out, score, best, x, matrix, weight, settings, eps=c.rms_norm_eps)
    return case(f"head {name}", B, c.V, c.C, X, launch)


def cases() -> list[Case]:
    """Every product of a step of both models in bf16, for one sequence and for eight."""
    return [made for name, c in MODELS.items() for B in BATCHES for made in (
        qkv(name, c, B, "bf16"), add("o", name, c, B, "bf16"), gate_up(name, c, B, "bf16"),
        add("down", name, c, B, "bf16"), head(name, c, B, "bf16"))]


def main(argv: Sequence[str] | None = None) -> int:
    return run({"decode_linear": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
