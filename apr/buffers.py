"""Every buffer of training, or of generation, on a GPU: shape, dtype, role, size. Arithmetic only: no GPU is needed.

What is kept of a layer for its backward pass is the residual stream, the reciprocal norms, q k v after rotation, the
attention's output with its log-sum, and gate|up; the normalised input and silu(gate) * up are computed again.

    role     params   weights as the kernels read them          master  float32 weights that AdamW updates
             grads    float32                                   optimizer  AdamW's m and v
             acts     kept from forward to backward             scratch    written and read within a step
             kv       keys and values of generation             state      what a decoding step leaves for the next
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from apr.config import TransformerConfig
from apr.errors import ConfigError
from apr.params import layout

SIZES = {"f32": 4, "bf16": 2, "i32": 4, "f64": 8, "i64": 8, "u8": 1}
STORAGE = {"fp32": "f32", "bf16": "bf16"}  # floatX of each precision
LOGITS_BYTES = 5 << 28  # the head works on as many rows at a time as fit in this (1.25 GiB)
WORKSPACE = 32 << 20  # bytes that cuBLASLt may use on Hopper; its best products want all of it
PARTS = 528  # blocks of a two-step sum over rows, four for each SM of Hopper: fixed, so that the order of the sum is
SCORE_ROWS = 128  # rows of logits at a time where a prompt's scores are asked for
PREFILL = {"residual", "rstd", "qkv", "qkv_raw", "head_rstd", "atty", "lse", "gate_up", "final_norm", "norm", "branch",
           "act", "logits_buf", "dqkv", "cos", "sin", "ids", "workspace"}  # of training's, with one layer of acts
# Scratch of the layers: nothing of it is alive between a forward pass and the layers' backward pass, and logits_buf is
# alive just there. So it lies in logits_buf, in this order, as far as there is room.
BESIDE_LOGITS = ("act", "dqkv", "norm", "datty", "dresidual")
STATS = 4  # float64 that a step reads back: sum of losses, gradient norm, applied, updates so far


@dataclass(frozen=True)
class BufferSpec:
    """A buffer: shape in elements, dtype f32, bf16, i32, f64 or u8.

    `alias` names the buffer whose memory it shares, of the same dtype, from that one's element `offset` on.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    alias: str | None = None
    offset: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its own: 0 for an alias."""
        return 0 if self.alias else self.size * SIZES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """The buffers of a model at a shape. `rows`: rows of logits in memory at a time; `what` they are for."""

    config: TransformerConfig
    B: int
    T: int
    precision: str
    rows: int
    buffers: tuple[BufferSpec, ...]
    what: str = "training"

    @property
    def bytes(self) -> int:
        """Device memory that the arena takes, alignment of each buffer to 256 bytes included."""
        return sum(-(-b.bytes // 256) * 256 for b in self.buffers)

    def by_role(self) -> dict[str, int]:
        """Bytes of each role, in the order of the table."""
        out: dict[str, int] = {}
        for b in self.buffers:
            out[b.role] = out.get(b.role, 0) + b.bytes
        return out


def plan(config: TransformerConfig, B: int, T: int, precision: str) -> Plan:
    """The buffers for training with micro-batches of B sequences of T tokens in `precision` (fp32 or bf16).

    Raises ConfigError for a T beyond the model's positions or a shape that the kernels cannot index.
    """
    if not 1 <= T <= config.max_position_embeddings:
        raise ConfigError("max_seq_len", f"1 to max_position_embeddings ({config.max_position_embeddings})", str(T),
                          "lower --seq-length")
    if not 1 <= B <= 65535 or 2**31 // max(1, config.NH) <= B * T:
        raise ConfigError("batch_size", "a batch whose rows the kernels can count", f"{B} x {T}", "lower --batch-size")
    rows = logits_rows(B * T, config.Vp * SIZES[STORAGE[precision]])
    return Plan(config, B, T, precision, rows, tuple(_shared(list(_buffers(config, B, T, STORAGE[precision], rows)))))


def inference_plan(config: TransformerConfig, B: int, S: int, precision: str, bests: int, partial: int) -> Plan:
    """The buffers for generating up to B sequences of at most S tokens; a prompt goes through the layers by itself.

    bests: blocks of decode_head; partial: elements of decode_attention's scratch. Raises ConfigError for an S beyond
    the model's positions.
    """
    if not 1 <= S <= config.max_position_embeddings:
        raise ConfigError("context", f"1 to max_position_embeddings ({config.max_position_embeddings})", str(S),
                          "shorten the prompt, or lower --max-tokens or --context")
    c, X, rows = config, STORAGE[precision], min(S, SCORE_ROWS)
    cache = (c.L, B, c.NKV, S, c.HS)
    buffers = [
        BufferSpec("params", (layout(c).size,), X, "params"),
        BufferSpec("k_cache", cache, X, "kv"), BufferSpec("v_cache", cache, X, "kv"),
        *(b for b in _buffers(replace(c, num_hidden_layers=1), 1, S, X, rows) if b.name in PREFILL),
        BufferSpec("x", (B, c.C), "f32", "state"),
        BufferSpec("x_qkv", (B, c.QKV), "f32", "scratch"), BufferSpec("x_heads", (B, c.NH * c.HS), "f32", "scratch"),
        BufferSpec("x_act", (B, c.F), "f32", "scratch"), BufferSpec("scores", (B, c.V), "f32", "scratch"),
        BufferSpec("best_score", (B, bests), "f32", "scratch"), BufferSpec("best_id", (B, bests), "i32", "scratch"),
        BufferSpec("attention_parts", (partial,), "f32", "scratch"),
        BufferSpec("ticket", (B, c.NH), "i32", "state"),
        *(BufferSpec(name, (B,), "i32", "state") for name in ("token", "pos", "step")),
        BufferSpec("settings", (5,), "i64", "inputs"), BufferSpec("odds", (2,), "f64", "inputs")]
    return Plan(config, B, S, precision, rows, tuple(buffers), "generation")


def logits_rows(N: int, row_bytes: int) -> int:
    """Rows of logits at a time: all N, or equal parts of at most LOGITS_BYTES, in multiples of 128 rows."""
    parts = -(-N * row_bytes // LOGITS_BYTES)
    return N if parts == 1 else min(N, -(-N // parts // 128) * 128)


def _shared(buffers: list[BufferSpec]) -> Iterator[BufferSpec]:
    """The buffers, those of BESIDE_LOGITS in logits_buf where there is room, each from a multiple of 256 bytes on."""
    room = next(b for b in buffers if b.name == "logits_buf").size
    places, end = dict[str, int](), 0
    for b in sorted((b for b in buffers if b.name in BESIDE_LOGITS), key=lambda b: BESIDE_LOGITS.index(b.name)):
        if end + b.size <= room:
            places[b.name], end = end, end + -(-b.size // 128) * 128
    for b in buffers:
        if b.name in places:
            yield replace(b, alias="logits_buf", offset=places[b.name])
        elif b.alias in places:  # dact is act's: an alias is of memory, not of another alias
            yield replace(b, alias="logits_buf", offset=places[b.alias])
        else:
            yield b


def _buffers(c: TransformerConfig, B: int, T: int, X: str, rows: int) -> Iterator[BufferSpec]:
    N, P, L, heads = B * T, layout(c).size, c.L, c.NH * c.HS
    yield BufferSpec("master", (P,), "f32", "master")
    yield BufferSpec("params", (P,), X, "params", None if X == "bf16" else "master")
    yield BufferSpec("grads", (P,), "f32", "grads")
    yield BufferSpec("m", (P,), "f32", "optimizer")
    yield BufferSpec("v", (P,), "f32", "optimizer")

    yield BufferSpec("residual", (2 * L + 1, N, c.C), X, "acts")  # before attention, before the MLP, …, at the end
    yield BufferSpec("rstd", (2 * L + 1, N), "f32", "acts")
    yield BufferSpec("qkv", (L, N, c.QKV), X, "acts")
    if c.qk_norm:
        yield BufferSpec("qkv_raw", (L, N, c.QKV), X, "acts")
        yield BufferSpec("head_rstd", (L, N, c.NH + c.NKV), "f32", "acts")
    yield BufferSpec("atty", (L, N, heads), X, "acts")
    yield BufferSpec("lse", (L, B, c.NH, T), "f32", "acts")
    yield BufferSpec("gate_up", (L, N, 2 * c.F), X, "acts")
    yield BufferSpec("final_norm", (N, c.C), X, "acts")

    yield BufferSpec("norm", (N, c.C), X, "scratch")  # a layer's normalised input
    yield BufferSpec("branch", (N, c.C), X, "scratch")  # what a sub-layer adds to the residual stream
    yield BufferSpec("act", (N, c.F), X, "scratch")
    yield BufferSpec("logits_buf", (rows, c.Vp), X, "scratch")
    yield BufferSpec("dresidual", (N, c.C), X, "scratch")
    yield BufferSpec("dnorm", (N, c.C), X, "scratch", "branch")  # forward and backward need one each, never both
    yield BufferSpec("dqkv", (N, c.QKV), X, "scratch")
    yield BufferSpec("datty", (N, heads), X, "scratch")
    yield BufferSpec("dact", (N, c.F), X, "scratch", "act")
    yield BufferSpec("delta", (B, c.NH, T), "f32", "scratch")
    yield BufferSpec("partial", (PARTS, max(c.C, c.QKV, 2 * c.HS)), "f32", "scratch")
    yield BufferSpec("norm_partial", (PARTS,), "f64", "scratch")
    yield BufferSpec("cos", (T, c.HS // 2), "f32", "scratch")
    yield BufferSpec("sin", (T, c.HS // 2), "f32", "scratch")

    yield BufferSpec("losses", (N,), "f32", "scratch")
    yield BufferSpec("ids", (N,), "i32", "inputs")
    yield BufferSpec("targets", (N,), "i32", "inputs")
    yield BufferSpec("order", (N,), "i32", "inputs")  # positions sorted by token, and where each token's run begins
    yield BufferSpec("runs", (N + 1,), "i32", "inputs")
    yield BufferSpec("step", (2,), "f64", "inputs")  # dloss, lr
    yield BufferSpec("stats", (STATS,), "f64", "inputs")
    yield BufferSpec("factors", (4,), "f32", "scratch")
    yield BufferSpec("workspace", (WORKSPACE,), "u8", "scratch")


def table(p: Plan) -> list[str]:
    """The plan as lines of text: one per buffer, then the sum of each role and of all."""
    lines = [f"{'buffer':14}{'role':11}{'dtype':6}{'MiB':>10}  shape"]
    for b in p.buffers:
        note = f" (the memory of {b.alias})" if b.alias else ""
        lines.append(f"{b.name:14}{b.role:11}{b.dtype:6}{b.bytes / 2**20:10.1f}  {' x '.join(map(str, b.shape))}{note}")
    lines += [f"{'':14}{role:17}{size / 2**20:10.1f}" for role, size in p.by_role().items()]
    return [*lines, f"{'total':31}{p.bytes / 2**20:10.1f}"]
