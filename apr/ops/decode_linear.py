"""The matrix-vector products of decoding, each fused with what surrounds it: kernels/decode_linear.cu."""

from typing import Any

from apr.config import TransformerConfig
from apr.device import Device
from apr.kernel import Baked, KernelSpec, blocks, floatx, vector_width

BAKED = ("B", "BLOCK", "EPS", "FLOATX", "I", "O", "ROWS")
QKV = KernelSpec("decode_linear.cu", "decode_qkv", BAKED,
                 ("out:f32*", "x:const f32*", "matrix:const floatX*", "weight:const floatX*", "bias:const floatX*?"))
ADD = KernelSpec("decode_linear.cu", "decode_add", BAKED, ("x:f32*", "inp:const f32*", "matrix:const floatX*"))
GATE_UP = KernelSpec("decode_linear.cu", "decode_gate_up", BAKED,
                     ("out:f32*", "x:const f32*", "matrix:const floatX*", "weight:const floatX*"))
HEAD = KernelSpec("decode_linear.cu", "decode_head", BAKED,
                  ("out:f32*", "best_score:f32*", "best_id:i32*", "x:const f32*", "matrix:const floatX*",
                   "weight:const floatX*", "vocab:const i64*"))
SPECS = (QKV, ADD, GATE_UP, HEAD)
SPREAD = 264  # blocks that a small product is spread over, two for each SM of an H200; fixed, since ROWS is baked
LARGEST_BLOCK = 640


def decode_linear_baked(B: int, rows: int, width: int, eps: float, storage: str) -> Baked:
    """The baked values of all four kernels for a matrix (rows, width).

    A thread takes one vector of 16 bytes of each of ROWS rows where a row is up to LARGEST_BLOCK of them; ROWS is what
    spreads the matrix over the GPU once, even and at most what _most_rows allows.
    """
    vectors = width // vector_width(width, 2 if storage == "bf16" else 4)
    threads = min(LARGEST_BLOCK, blocks(vectors, 32) * 32)
    each = blocks(max(blocks(rows, SPREAD), 2), 2) * 2
    return {"B": B, "BLOCK": threads, "EPS": float(eps), "FLOATX": storage, "I": width, "O": rows,
            "ROWS": min(each, _most_rows(B, threads, vectors, storage))}


def _most_rows(B: int, threads: int, vectors: int, storage: str) -> int:
    """Even, at most 16: rows whose weights and sums a thread's registers hold without spills.

    An SM has 512 registers of a lane for each of its four schedulers. A row takes 4 of them for its vector, in bf16
    twice where a thread has several vectors, and one for each input's sum; the rest of the code is what the compilers
    were seen to need.
    """
    registers = min(255, 512 // blocks(threads, 128) // 8 * 8)
    other, vector = (40, 8 if vectors > threads else 4) if storage == "bf16" else (12, 4)
    room = (registers - other - B) // (vector + B)
    few = 16 if B <= 2 else blocks((32 if storage == "bf16" else 24) // B, 2) * 2
    return max(2, min(room // 2 * 2, few))


def head_blocks(c: TransformerConfig, B: int, storage: str) -> int:
    """Blocks of decode_head, each of which reports its best."""
    return blocks(c.V, int(decode_linear_baked(B, c.V, c.C, c.rms_norm_eps, storage)["ROWS"]))


def _grid(baked: Baked) -> tuple[int]:
    return (blocks(int(baked["O"]), int(baked["ROWS"])),)


def _baked(matrix: Any, B: int, eps: float) -> Baked:
    return decode_linear_baked(B, matrix.shape[0], matrix.shape[1], eps, floatx(matrix))


def decode_qkv(dev: Device, out: Any, x: Any, matrix: Any, weight: Any, bias: Any, *, eps: float, first: bool) -> None:
    """out (B, O) f32 = norm(x) · matrixᵀ + bias; x (B, I) f32; matrix (O, I), weight (I,), bias (O,) or None floatX.

    `first`: it starts when everything before it has ended, so that what follows may read early what earlier steps left.
    """
    baked = _baked(matrix, x.shape[0], eps)
    dev.launch(QKV, baked, _grid(baked), (int(baked["BLOCK"]),), (out, x, matrix, weight, bias),
               programmatic=not first)


def decode_add(dev: Device, x: Any, inp: Any, matrix: Any, *, eps: float) -> None:
    """x (B, O) f32 += inp · matrixᵀ; inp (B, I) f32; matrix (O, I) floatX. eps as in the other products: the kernel is
    compiled with it and does not use it.
    """
    baked = _baked(matrix, x.shape[0], eps)
    dev.launch(ADD, baked, _grid(baked), (int(baked["BLOCK"]),), (x, inp, matrix), programmatic=True)


def decode_gate_up(dev: Device, out: Any, x: Any, matrix: Any, weight: Any, *, eps: float) -> None:
    """out (B, F) f32 = silu(gate) * up of norm(x); matrix (2F, I) floatX: gate in its first F rows, up in the rest."""
    baked = _baked(matrix, x.shape[0], eps)
    dev.launch(GATE_UP, baked, _grid(baked), (int(baked["BLOCK"]),), (out, x, matrix, weight), programmatic=True)


def decode_head(dev: Device, out: Any, best_score: Any, best_id: Any, x: Any, matrix: Any, weight: Any, settings: Any,
                *, eps: float) -> None:
    """out (B, V) f32 = norm(x) · matrixᵀ; best_score, best_id (B, head_blocks) = each block's; settings[0] the vocab.

    matrix (V, I) floatX: the rows of the vocabulary without their padding.
    """
    baked = _baked(matrix, x.shape[0], eps)
    dev.launch(HEAD, baked, _grid(baked), (int(baked["BLOCK"]),),
               (out, best_score, best_id, x, matrix, weight, settings), programmatic=True)
