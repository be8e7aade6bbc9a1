"""The gated activation and its gradient, beside silu(gate) * up.

Training runs the gradient in place; here it writes to other memory, so that every repetition finds the same numbers.
Ours also writes the activation again, which forward does not keep.
"""

from collections.abc import Sequence
from typing import Any

from harness import BYTES, MODELS, Bench, Case, N, Work, run

from apr.config import TransformerConfig
from apr.ops.swiglu import swiglu_backward, swiglu_forward


def forward_bytes(N: int, F: int, s: int) -> int:
    return 3 * N * F * s


def backward_bytes(N: int, F: int, s: int) -> int:
    return 6 * N * F * s


def forward_flops(N: int, F: int) -> int:
    return 5 * N * F


def backward_flops(N: int, F: int) -> int:
    return 11 * N * F


def peer(p: Any) -> Any:
    """The same in PyTorch."""
    silu = p.functional.silu

    def swiglu(gate_up: Any) -> Any:
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * up
    return swiglu


def forward(name: str, c: TransformerConfig, X: str) -> Case:
    def setup(b: Bench) -> Work:
        act, gate_up = b.empty((N, c.F), X), b.random((N, 2 * c.F), X)
        return Work(lambda: swiglu_forward(b.dev, act, gate_up), lambda p: p.forward(peer(p), p.tensor(gate_up)))
    return Case(f"forward {name}", X, forward_bytes(N, c.F, BYTES[X]), forward_flops(N, c.F), setup)


def backward(name: str, c: TransformerConfig, X: str) -> Case:
    def setup(b: Bench) -> Work:
        dgate_up, act = b.empty((N, 2 * c.F), X), b.empty((N, c.F), X)
        dact, gate_up = b.random((N, c.F), X), b.random((N, 2 * c.F), X)
        return Work(lambda: swiglu_backward(b.dev, dgate_up, act, dact, gate_up),
                    lambda p: p.backward(peer(p), [p.tensor(gate_up)], [p.tensor(dact)]))
    return Case(f"backward {name}", X, backward_bytes(N, c.F, BYTES[X]), backward_flops(N, c.F), setup)


def cases() -> list[Case]:
    """Both models in bf16."""
    return [make(name, c, "bf16") for name, c in MODELS.items() for make in (forward, backward)]


def main(argv: Sequence[str] | None = None) -> int:
    return run({"swiglu": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
