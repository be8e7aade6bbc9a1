"""Known faults of attention, forward and backward: one plain attention whose mask, heads and softmax can be wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from apr.tools.formulas import FORMULAS, Array, flat, wide
from apr.tools.variants import Args, Faulty, Variant, changed

SCALES = tuple(2.0 ** (e / 2) for e in range(-18, 5))
KEYS_TRIED = 64  # numbers of keys at most that a fault is supposed to stop at
MANY = 1 << 30   # a mask that hides nothing

HeadMap = Callable[[int, int], Array]  # (NH, NKV) to the key/value head of each query head (NH,)


def grouped(nh: int, nkv: int) -> Array:
    """h // G."""
    return np.arange(nh) // (nh // nkv)


def interleaved(nh: int, nkv: int) -> Array:
    """h % NKV, the wrong one."""
    return np.arange(nh) % nkv


def first_of_group(nh: int, nkv: int) -> Array:
    """h // G for the first head of each group, -1 (no one) for the others."""
    return np.where(np.arange(nh) % (nh // nkv) == 0, grouped(nh, nkv), -1)


@dataclass(frozen=True)
class Attention:
    """How attention is done: each field is what a fault changes. `ahead`: how many later keys a query sees, at least
    the first key; `padding`: keys and values of zeros after the last, as a tile has them; `keys`: how many are read at
    all; `read`: the key/value head of a query head; `total`: the one that its gradient is added to; `saved`: backward
    takes the softmax's sums, and its mean terms, from a forward pass that was right."""

    ahead: int = 0
    padding: int = 0
    keys: int = MANY
    read: HeadMap = grouped
    total: HeadMap = grouped
    normalised: bool = True
    stable: bool = True
    mean_term: bool = True
    scaled_gradient: bool = True
    saved: bool = False

    def scores(self, q: Array, k: Array, scale: float) -> Array:
        """(B, NH, T, S), -inf where a query does not see a key."""
        t, s, nh = q.shape[1], k.shape[1], q.shape[2]
        score = scale * np.einsum("bthd,bshd->bhts", q, k[:, :, self.read(nh, k.shape[2])], optimize=True)
        last = np.maximum(np.arange(t)[:, None] + s - self.padding - t + self.ahead, 0)
        score[..., (np.arange(s) > last) | (np.arange(s) >= self.keys)] = -np.inf
        return score

    def prob(self, q: Array, k: Array, scale: float) -> Array:
        """(B, NH, T, S)."""
        score = self.scores(q, k, scale)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.saved:
                right = RIGHT.scores(q, k, scale)
                top = right.max(axis=-1, keepdims=True)
                return np.exp(score - top) / np.exp(right - top).sum(axis=-1, keepdims=True)
            score = np.exp(score - (score.max(axis=-1, keepdims=True) if self.stable else 0.0))
            return score / score.sum(axis=-1, keepdims=True) if self.normalised else score

    def forward(self, args: Args, scale: float | None = None) -> Array:
        """The result (B, T, NH*HS) of formulas.attention's arguments."""
        q, k, v = (wide(args[name]) for name in "qkv")
        k, v = (np.pad(x, ((0, 0), (0, self.padding), (0, 0), (0, 0))) for x in (k, v))
        prob = self.prob(q, k, args["scale"] if scale is None else scale)
        return flat(np.einsum("bhts,bshd->bthd", prob, v[:, :, self.read(q.shape[2], v.shape[2])], optimize=True))

    def backward(self, which: str, args: Args, scale: float | None = None) -> Array:
        """dq, dk or dv ("q", "k", "v") of formulas.attention_gradients' arguments."""
        q, k, v = (wide(args[name]) for name in "qkv")
        scale, nkv, read = args["scale"] if scale is None else scale, k.shape[2], self.read(q.shape[2], k.shape[2])
        dout, prob = wide(args["dout"]).reshape(q.shape), self.prob(q, k, scale)
        if which == "v":
            return self.by_key_head(np.einsum("bhts,bthd->bshd", prob, dout, optimize=True), nkv)
        dscore = np.einsum("bthd,bshd->bhts", dout, v[:, :, read], optimize=True)
        if self.mean_term:
            mean = prob * dscore
            if self.saved:
                mean = RIGHT.prob(q, k, scale) * np.einsum("bthd,bshd->bhts", dout, v[:, :, RIGHT.read(
                    q.shape[2], nkv)], optimize=True)
            dscore -= mean.sum(axis=-1, keepdims=True)
        dscore *= prob * (scale if self.scaled_gradient else 1.0)
        if which == "q":
            return np.einsum("bhts,bshd->bthd", dscore, k[:, :, read], optimize=True)
        return self.by_key_head(np.einsum("bhts,bthd->bshd", dscore, q, optimize=True), nkv)

    def by_key_head(self, of_query_heads: Array, nkv: int) -> Array:
        """(B, S, NH, HS) summed into (B, S, NKV, HS)."""
        b, s, nh, hs = of_query_heads.shape
        out, to = np.zeros((b, s, nkv, hs)), self.total(nh, nkv)
        for head in range(nkv):
            out[:, :, head] = of_query_heads[:, :, to == head].sum(axis=2)
        return out


RIGHT = Attention()


def forward(**fault: object) -> Faulty:
    """Attention with these fields of Attention."""
    how = Attention(**fault)  # type: ignore[arg-type]
    return lambda _number, args: how.forward(args)


def backward(which: str, **fault: object) -> Faulty:
    """A gradient of attention with these fields of Attention."""
    how = Attention(**fault)  # type: ignore[arg-type]
    return lambda _number, args: how.backward(which, args)


def fewer_keys(args: Args) -> Sequence[float]:
    """Numbers of keys below S: all of them, or some KEYS_TRIED spread evenly."""
    s = args["k"].shape[1]
    return sorted(set(np.linspace(1, s - 1, min(s - 1, KEYS_TRIED)).astype(int).tolist())) if s > 1 else []


def scales(args: Args) -> Sequence[float]:
    """Scales of the scores: 1, 1/HS, 1/sqrt(NH*HS), then a grid."""
    heads, size = args["q"].shape[2:]
    return [1.0, 1.0 / size, (heads * size) ** -0.5, *SCALES]


def masks(of: Callable[..., Faulty]) -> tuple[Variant, ...]:
    """The faults of mask and head map that forward and backward share."""
    return (
        Variant("mask_missing", "there is no causal mask: every query sees every key", of(ahead=MANY)),
        Variant("mask_ahead", "a query sees the next key: the causal mask is one too far", of(ahead=1)),
        Variant("mask_behind", "a query does not see its own key: the causal mask is one too short", of(ahead=-1)),
        Variant("head_map", "query head h reads key/value head h % NKV, not h // G",
                of(read=interleaved, total=interleaved)),
    )


ATTENTION = (
    *masks(forward),
    Variant("mask_ahead", "a query sees the next key, the last one a key of zeros: the causal mask is one too far",
            forward(ahead=1, padding=1)),
    Variant("not_normalised", "the softmax is not divided by its sum", forward(normalised=False)),
    Variant("not_normalised", "the softmax is the exponential alone, without its maximum and sum",
            forward(normalised=False, stable=False)),
    Variant("exchanged", "keys and values are exchanged",
            changed("attention", k=lambda n, a: a["v"], v=lambda n, a: a["k"])),
    Variant("keys_ignored", "only the first {number:.0f} keys are read",
            lambda n, a: Attention(keys=int(n)).forward(a), fewer_keys),
    Variant("scale", "the scores' scale is {number:.6g}, 1/sqrt(HS) is {scale:.6g}",
            lambda n, a: Attention().forward(a, n), scales, refine=True),
)


def gradient(which: str) -> tuple[Variant, ...]:
    """The faults of dq, dk or dv."""
    of = partial(backward, which)
    own = []
    if which != "v":
        own += [
            Variant("mean_term_missing", "the softmax's gradient lacks its mean term", of(mean_term=False)),
            Variant("scale", f"d{which} lacks the scale", of(scaled_gradient=False)),
        ]
    if which != "q":
        other = "v" if which == "k" else "k"
        own += [
            Variant("exchanged", f"this is d{other}, not d{which}",
                    lambda n, a: FORMULAS[f"attention_d{other}"](**a)),
            Variant("group_sum", f"d{which} is summed over the heads h % NKV, not h // G", of(total=interleaved)),
            Variant("group_sum", f"d{which} has the first head of each group only", of(total=first_of_group)),
        ]
    return (
        *masks(of), *masks(partial(of, saved=True)), *own,
        Variant("scale", "the scores' scale is {number:.6g}, 1/sqrt(HS) is {scale:.6g}",
                lambda n, a: Attention().backward(which, a, n), scales, refine=True),
    )


ATTENTIONS = {"attention": ATTENTION, **{f"attention_d{which}": gradient(which) for which in "qkv"}}
