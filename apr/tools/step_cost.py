"""What a training step must do, group by group: FLOPs and bytes. Arithmetic only: no GPU is needed.

    MFU   = tokens/s * FLOPs per token / peak
    FLOPs per token = 6 (matrix parameters) + 6 L NH HS T        causal attention; a tied table counts once, as the head
    floor = max(bytes / copy rate, FLOPs / product rate)         of each kernel or product, summed over the group

Both rates are measured on the same GPU in the same run (apr/tools/timing.py). Bytes are each array read once and
written once, as the MEMORY line of a kernel's header counts them, whatever a kernel reads twice; FLOPs of attention are
2 products forward and 5 backward, of half a T x T matrix, as everyone counts them; only products and attention count
any. Names of groups are those of apr/tools/timed_device.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from apr.buffers import PARTS, SIZES, STORAGE, logits_rows
from apr.config import TransformerConfig
from apr.params import layout, param_specs

PEAK = 989.4e12  # bf16 FLOP/s of an H100's and an H200's data sheet
PRODUCT = 788e12  # of an 8192^3 product on an H200, measured (docs/log.md)
MFU = "MFU = tokens/s * (6 * matrix parameters + 6 L NH HS T) / {peak:.1f} TFLOP/s"
PASSES = ("forward", "dinput", "dweight")  # the three products of a weight


@dataclass(frozen=True)
class Cost:
    """What one kind of launch moves and computes, `count` times a step."""

    bytes: int
    flops: int = 0
    count: int = 1

    def ms(self, rates: Mapping[str, float], product: str) -> float:
        """The least milliseconds of all of them at `rates` (per second): "copy", and `product` (bf16 or f32)."""
        return 1e3 * self.count * max(self.bytes / rates["copy"], self.flops / rates[product])


def flops_per_token(c: TransformerConfig, T: int) -> float:
    """FLOPs that training on one token takes in sequences of T; recomputation does not count."""
    matrices = sum(s.size for s in param_specs(c) if s.decay and (c.tie_word_embeddings or "embed" not in s.name))
    return 6.0 * matrices + 6.0 * c.L * c.NH * c.HS * T


def step_costs(c: TransformerConfig, B: int, T: int, precision: str) -> dict[str, list[Cost]]:
    """The costs of a step of one micro-batch of B sequences of T tokens, by group; ids are taken to be random."""
    N, s, P = B * T, SIZES[STORAGE[precision]], layout(c).size
    cleared = P - layout(c).decay_end + (0 if c.tie_word_embeddings else c.Vp * c.C)  # other gradients are set
    heads, norms, turned = c.NH * c.HS, 2 * c.L + 1, (c.NH + c.NKV) * c.HS
    unlike = round(c.V * (1 - (1 - 1 / c.V) ** N))  # expected, of N random ids
    out = {f"products {name}": products(c, N, s, name) for name in PASSES}
    out |= {
        "attention forward": [Cost(N * (c.QKV + heads) * s, 2 * N * T * heads, c.L)],
        "attention backward": [Cost(2 * N * (c.QKV + heads) * s, 5 * N * T * heads, c.L)],
        "swiglu": [Cost(3 * N * c.F * s, count=c.L), Cost(6 * N * c.F * s, count=c.L)],
        "norm + residual": [Cost(2 * N * c.C * s + 4 * N), Cost(4 * N * c.C * s + 4 * N, count=norms - 1),
                            Cost(5 * N * c.C * s + 4 * N, count=norms - 1), Cost(4 * N * c.C * s + 4 * N),
                            Cost(8 * PARTS * c.C + 8 * c.C, count=norms)],
        "rope": [Cost(2 * N * turned * s, count=2 * c.L)],
        "cross-entropy": [Cost(2 * N * c.V * s + 8 * N)],
        "embedding": [Cost(2 * N * c.C * s + 4 * N), Cost(N * c.C * s + 8 * unlike * c.C + 8 * N)],
        "gradient norm": [Cost(4 * P)], "AdamW": [Cost((30 if s == 2 else 28) * P)], "memset": [Cost(4 * cleared)],
    }
    if c.use_bias:
        out["bias"] = [Cost(N * c.QKV * s + 8 * PARTS * c.QKV + 8 * c.QKV, count=c.L)]
    return out


def matrices(c: TransformerConfig, N: int, itemsize: int) -> list[tuple[str, int, int, int, int]]:
    """(name, rows, inputs, outputs, times a step) of each matrix's products; the head's rows come in parts."""
    rows = logits_rows(N, c.Vp * itemsize)
    parts = [rows] * (N // rows) + ([N % rows] if N % rows else [])
    return [("qkv", N, c.C, c.QKV, c.L), ("o", N, c.NH * c.HS, c.C, c.L), ("gate_up", N, c.C, 2 * c.F, c.L),
            ("down", N, c.F, c.C, c.L), *(("head", n, c.C, c.Vp, 1) for n in parts)]


def products(c: TransformerConfig, N: int, itemsize: int, which: str) -> list[Cost]:
    """One of PASSES of every matrix: each array once; the float32 gradient of a weight is written, and read where a
    part of the head's rows adds to what those before it left.
    """
    out, begun = [], set[str]()
    for name, n, i, o, count in matrices(c, N, itemsize):
        each = itemsize if which != "dweight" else 8 if name in begun else 4
        out.append(Cost(n * (i + o) * itemsize + o * i * each, 2 * n * i * o, count))
        begun.add(name)
    return out


def floors(costs: Mapping[str, list[Cost]], rates: Mapping[str, float], precision: str) -> dict[str, float]:
    """The floor of each group, in milliseconds."""
    return {group: sum(cost.ms(rates, STORAGE[precision]) for cost in of) for group, of in costs.items()}
