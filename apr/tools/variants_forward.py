"""Known faults of the forward ops (attention apart)."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from apr.config import IGNORE, RopeScaling
from apr.reference.rope import inverse_frequencies
from apr.tools.activations import ACTIVATIONS
from apr.tools.formulas import FORMULAS, Array, rows_of, wide
from apr.tools.variants import Args, Faulty, NotApplicable, Variant, changed, low_precision, shift_rows, without_last

EPS = (0.0, *(10.0 ** (e / 2) for e in range(-24, -3)))
THETAS = (1e4, 5e5, 1e6, 1e3, 1e5, 1e7)  # those that models have, tried before the grid
THETA_RANGE = (1e2, 1e8)
GRID = 3000  # thetas at most
EARLY = 16  # positions from which the fit of theta starts
LARGE = 16384  # outputs beyond which the orders of a weight's rows are not tried: no head's projection is that wide
LLAMA3 = tuple(RopeScaling(factor=f, low_freq_factor=1.0, high_freq_factor=4.0,
                           original_max_position_embeddings=8192) for f in (8.0, 32.0))


def normed(args: Args, mean: bool = False, total: bool = False) -> Array:
    """x through the norm, without its weight: with the mean taken away first, or the sum where the mean is meant."""
    x = wide(args["x"])
    if mean:
        x = x - x.mean(axis=-1, keepdims=True)
    square = np.square(x).sum(axis=-1, keepdims=True) / (1 if total else x.shape[-1])
    return x / np.sqrt(square + args["eps"])


RMSNORM = (
    Variant("gain_missing", "RMSNorm's weight is not applied", lambda n, a: normed(a)),
    Variant("gain_plus_one", "RMSNorm's weight is applied as 1 + weight",
            changed("rmsnorm", weight=lambda n, a: wide(a["weight"]) + 1.0)),
    Variant("mean_subtracted", "the mean is taken away first: LayerNorm, not RMSNorm",
            lambda n, a: normed(a, mean=True) * wide(a["weight"])),
    Variant("sum_not_mean", "RMSNorm divides by the root of the sum of squares, not of their mean",
            lambda n, a: normed(a, total=True) * wide(a["weight"])),
    Variant("eps", "RMSNorm's eps is {number:.3g}, the configuration says {eps:.3g}",
            changed("rmsnorm", eps=lambda n, a: n), EPS, refine=True),
)


def turned(weight: Array) -> Array:
    """The memory of weight (O, I) read as (I, O), then the other way round: what a product by [in, out] uses."""
    return np.ascontiguousarray(weight).reshape(weight.shape[1], weight.shape[0]).T


def paired(array: Array, number: float) -> Array:
    """Rows (O, …) of each head of |number| channels, from halves to neighbouring pairs, or back where negative."""
    index = np.arange(array.shape[0]).reshape(-1, 2, abs(int(number)) // 2).transpose(0, 2, 1).reshape(-1)
    return array[index if number > 0 else np.argsort(index)]


def head_sizes(args: Args) -> Sequence[float]:
    """Head sizes that a weight's rows can have, both ways: (4, -4, 8, …)."""
    out = args["weight"].shape[0]
    sizes = [s for s in range(4, 257, 2) if out % s == 0] if out <= LARGE else []
    return [sign * s for s in sizes for sign in (1, -1)]


def halves(array: Array, axis: int) -> Array:
    """The second half of an axis before the first. Raises NotApplicable for an odd one."""
    if array.shape[axis] % 2:
        raise NotApplicable
    return np.roll(array, array.shape[axis] // 2, axis)


LINEAR = (
    Variant("transposed", "the weight is used as if stored [in, out]: transposed",
            changed("linear", weight=lambda n, a: turned(a["weight"]))),
    Variant("half", "the halves of the weight's outputs are exchanged",
            changed("linear", weight=lambda n, a: halves(a["weight"], 0))),
    Variant("half", "the halves of the weight's inputs are exchanged",
            changed("linear", weight=lambda n, a: halves(a["weight"], 1))),
    Variant("pair_order", "the weight's rows are in the other rotary order, heads of {number:.0f} channels (negative: "
            "neighbouring pairs to halves)", changed("linear", weight=lambda n, a: paired(a["weight"], n)), head_sizes),
    *low_precision("linear", "x", "weight"),
)


def rolls(args: Args) -> Sequence[float]:
    """How far a bias may be off: one channel, or a head."""
    size = args["bias"].size
    return [sign * k for k in (1, 8, 16, 32, 64, 128, 256) if k < size for sign in (1, -1)]


BIAS = (
    Variant("bias_missing", "the bias is not added", lambda n, a: wide(a["x"])),
    Variant("bias_twice", "the bias is added twice", changed("bias", bias=lambda n, a: 2.0 * wide(a["bias"]))),
    Variant("bias_displaced", "the bias added is that of the channel {number:+.0f} further on",
            changed("bias", bias=lambda n, a: np.roll(a["bias"], -int(n))), rolls),
)


def thetas(args: Args) -> Sequence[float]:
    """Rotary bases: known ones, then a grid fine enough that the angles of the first positions keep their turn."""
    positions = np.asarray(args["positions"])
    last = max(1, int(positions[..., :EARLY].max()))
    low, high = (math.log(t) for t in THETA_RANGE)
    return [*THETAS, *np.exp(np.linspace(low, high, min(GRID, max(56, int((high - low) * last / 8)))))]


def pairs_turned(x: Array, args: Args, sign: float) -> Array:
    """x (B, T, n, HS) with channels 2i and 2i + 1 turned together; sign -1 turns back."""
    inverse = inverse_frequencies(x.shape[-1], args["theta"], args["scaling"])
    angles = (np.asarray(args["positions"])[..., None] * inverse)[..., None, :]
    cos, sin = np.cos(angles), sign * np.sin(angles)
    first, second, out = wide(x)[..., 0::2], wide(x)[..., 1::2], np.empty(x.shape)
    out[..., 0::2], out[..., 1::2] = first * cos - second * sin, second * cos + first * sin
    return out


def by_batch_row(args: Args) -> Array:
    """Positions (B, T) that count on through the whole batch."""
    b, t = (args["x"] if "x" in args else args["dout"]).shape[:2]
    return np.arange(b * t).reshape(b, t)


def rotation(op: str, given: str, sign: float) -> tuple[Variant, ...]:
    """The faults of a rotation: of rope's, or with sign -1 of rope_dinp's, whose operand is `given`."""
    back = "rope_dinp" if op == "rope" else "rope"
    return (
        Variant("not_rotated", "the rotation is not applied", lambda n, a: wide(a[given])),
        Variant("direction", "the heads are turned in the opposite direction",
                lambda n, a: FORMULAS[back](**({"dout" if given == "x" else "x": a[given]} | {
                    name: a[name] for name in ("positions", "theta", "scaling")}))),
        Variant("pairs", "neighbouring channels 2i, 2i+1 are turned together, not i and i + HS/2",
                lambda n, a: pairs_turned(a[given], a, sign)),
        Variant("position", "the positions are off by {number:+.0f}",
                changed(op, positions=lambda n, a: np.asarray(a["positions"]) + int(n)), (-2, -1, 1, 2)),
        Variant("position", "the position is the row's number in the whole batch, not in its sequence",
                changed(op, positions=lambda n, a: by_batch_row(a))),
        Variant("position", "the positions start again at 0", changed(op, positions=lambda n, a: np.asarray(
            a["positions"]) - np.asarray(a["positions"])[..., :1])),
        Variant("scaling", "the rotary scaling of the configuration is ignored",
                changed(op, scaling=lambda n, a: None)),
        Variant("scaling", "llama3's rotary scaling is applied (variant {number:.0f}: factors 8 and 32), the "
                "configuration has another or none", changed(op, scaling=lambda n, a: LLAMA3[int(n)]), (0, 1)),
        Variant("theta", "the rotary base is {number:.6g}, the configuration says {theta:.6g}",
                changed(op, theta=lambda n, a: max(n, 1.0)), thetas, refine=True, early=True),
    )


def addends(a: float, b: float) -> Faulty:
    """The sum of both addends, each times a factor."""
    return lambda _number, args: a * wide(args["a"]) + b * wide(args["b"])


RESIDUAL = (
    Variant("addend_missing", "the addend a (the stream, or the identity's gradient) is missing", addends(0, 1)),
    Variant("addend_missing", "the addend b (the sub-layer's) is missing", addends(1, 0)),
    Variant("addend_twice", "the addend a is added twice", addends(2, 1)),
    Variant("addend_twice", "the addend b is added twice", addends(1, 2)),
)


def activated(f: Callable[[Array], Array]) -> Faulty:
    """Another activation of the gate, times up where the op has it."""
    return lambda _number, args: f(wide(args["gate"])) * wide(args.get("up", 1.0))


ACTIVATED = tuple(Variant("activation", f"the activation is {name}, not silu", activated(f))
                  for name, (f, _) in ACTIVATIONS.items())
SILU = (*ACTIVATED, Variant("activation_missing", "the gate without silu", activated(lambda x: x)))
SWIGLU = (
    Variant("exchanged", "gate and up are exchanged", changed("swiglu", gate=lambda n, a: a["up"],
                                                              up=lambda n, a: a["gate"])),
    *ACTIVATED,
    Variant("activation_missing", "gate * up without silu", lambda n, a: wide(a["gate"]) * wide(a["up"])),
    Variant("operand", "silu(gate) without up", lambda n, a: FORMULAS["silu"](a["gate"])),
    Variant("operand", "silu(up) without gate", lambda n, a: FORMULAS["silu"](a["up"])),
)


def moved_targets(args: Args, by: int) -> Array:
    """The targets (N,) of the rows `by` further on; IGNORE where there is none."""
    moved = shift_rows(args["targets"].reshape(-1), by)
    return np.where(np.isnan(moved), IGNORE, moved).astype(np.int64)


def targets_of_other_rows(op: str, number: float, args: Args) -> Array:
    """A loss or its gradient with the targets of other rows: NaN where those lie outside."""
    by = int(number)
    out = FORMULAS[op](**(args | {"targets": moved_targets(args, by)}))
    rows = out if out.ndim == 1 else out.reshape(-1, out.shape[-1])
    rows[slice(-by, None) if by > 0 else slice(None, -by)] = np.nan
    return out


def logits_of_other_rows(op: str, number: float, args: Args) -> Array:
    """A loss or its gradient with the logits of other rows: NaN where those lie outside."""
    logits = shift_rows(rows_of(args["logits"]), int(number)).reshape(args["logits"].shape)
    with np.errstate(invalid="ignore"):
        return FORMULAS[op](**(args | {"logits": logits}))


def off_by_rows(op: str) -> tuple[Variant, ...]:
    """Targets or logits read off by a row."""
    return (
        Variant("logits_row", "row n is scored with the logits of row n {number:+.0f}",
                lambda n, a: logits_of_other_rows(op, n, a), (1, -1)),
        Variant("target_row", "row n is scored with the target of row n {number:+.0f}",
                lambda n, a: targets_of_other_rows(op, n, a), (1, -1)),
        Variant("ignored_counted", "ignored targets are counted, as id {number:.0f}",
                changed(op, targets=lambda n, a: np.where(a["targets"] == IGNORE, int(n), a["targets"])), (0,)),
    )


CROSS_ENTROPY = (
    Variant("log_base", "the loss is in bits (log2), not in nats",
            lambda n, a: FORMULAS["cross_entropy"](**a) / math.log(2.0)),
    *off_by_rows("cross_entropy"),
    Variant("row_missing", "the last row has no loss",
            lambda n, a: without_last(FORMULAS["cross_entropy"](**a)[:, None])[:, 0]),
)
LOSS_SUM = (
    Variant("sum_not_mean", "the mean over all rows, not the sum", lambda n, a: FORMULAS["loss_sum"](**a) / a[
        "losses"].size),
    Variant("sum_not_mean", "the mean over the counted rows, not the sum",
            lambda n, a: FORMULAS["loss_sum"](**a) / max(1, np.count_nonzero(a["losses"]))),
    Variant("row_missing", "the last row is not counted",
            lambda n, a: FORMULAS["loss_sum"](without_last(a["losses"].reshape(-1, 1)))),
)
EMBEDDING = (
    Variant("id", "the table's rows are those of ids {number:+.0f} further on", changed(
        "embedding", ids=lambda n, a: (a["ids"] + int(n)) % a["table"].shape[0]), (1, -1)),
)
FORWARD = {"embedding": EMBEDDING, "rmsnorm": RMSNORM, "linear": LINEAR, "bias": BIAS,
           "rope": rotation("rope", "x", 1.0), "residual": RESIDUAL, "add": RESIDUAL, "silu": SILU,
           "swiglu": SWIGLU, "cross_entropy": CROSS_ENTROPY, "loss_sum": LOSS_SUM}
