"""Every matrix product of a model (apr/gemm.py) and the bias of Qwen2, beside F.linear and plain products.

    forward   out = inp weightᵀ      dinp   dinp = dout weight      dweight   dweight += doutᵀ inp, into float32

PyTorch's gradient of the weight is rounded to bf16 and added to nothing, as autograd has it: less to write than ours.
The head's rows are those of logits that training has in memory at a time.
"""

from collections.abc import Sequence
from typing import Any

from harness import BYTES, MODELS, Bench, Case, N, Work, head_rows, run
from peers import EAGER

from apr.buffers import PARTS
from apr.config import TransformerConfig
from apr.ops.linear import bias_backward

PRODUCTS = ("forward", "dinp", "dweight")


def forward_bytes(N: int, I: int, O: int, s: int) -> int:  # noqa: E741 (the glossary's symbols)
    """Of forward, and of dinp: each array once."""
    return (N * I + O * I + N * O) * s


def dweight_bytes(N: int, I: int, O: int, s: int) -> int:  # noqa: E741
    """The float32 gradient is read and written."""
    return (N * I + N * O) * s + 8 * O * I


def flops(N: int, I: int, O: int) -> int:  # noqa: E741
    """Of each of the three products."""
    return 2 * N * I * O


def bias_backward_bytes(N: int, O: int, P: int, s: int) -> int:  # noqa: E741
    """Both kernels."""
    return N * O * s + 4 * P * O + (4 * P * O + 8 * O)


def bias_flops(N: int, O: int) -> int:  # noqa: E741
    return N * O


def product(which: str, name: str, rows: int, width: int, out_width: int, X: str) -> Case:
    """One of PRODUCTS of inp (rows, width) and weight (out_width, width)."""
    def setup(b: Bench) -> Work:
        inp, weight = b.random((rows, width), X), b.random((out_width, width), X)
        out = b.random((rows, out_width), X)  # or dout
        if which == "forward":
            return Work(lambda: b.gemm.linear(out, inp, weight), lambda p: eager(
                p.functional.linear, *p.tensors(inp, weight)))
        if which == "dinp":
            return Work(lambda: b.gemm.linear_dinp(inp, out, weight), lambda p: eager(
                p.torch.matmul, *p.tensors(out, weight)))
        dweight = b.random((out_width, width), "f32")
        return Work(lambda: b.gemm.linear_dweight(dweight, out, inp, add=True), lambda p: eager(
            p.torch.matmul, p.tensor(out).t(), p.tensor(inp)))
    moved = dweight_bytes if which == "dweight" else forward_bytes
    return Case(f"{which} {name}", X, moved(rows, width, out_width, BYTES[X]), flops(rows, width, out_width), setup,
                compute=True)


def eager(function: Any, *inputs: Any) -> dict[str, Any]:
    """The peer of one call."""
    return {EAGER: lambda: lambda: function(*inputs)}


def with_bias(name: str, rows: int, width: int, out_width: int, X: str) -> Case:
    """The product forward, with a bias added within it."""
    def setup(b: Bench) -> Work:
        inp, weight, bias = (b.random(s, X) for s in ((rows, width), (out_width, width), (out_width,)))
        out = b.empty((rows, out_width), X)
        return Work(lambda: b.gemm.linear(out, inp, weight, bias), lambda p: eager(
            p.functional.linear, *p.tensors(inp, weight, bias)))
    return Case(f"forward bias {name}", X, forward_bytes(rows, width, out_width, BYTES[X]) + out_width * BYTES[X],
                flops(rows, width, out_width), setup, compute=True)


def sum_bias(name: str, width: int, X: str) -> Case:
    def setup(b: Bench) -> Work:
        dbias, partial, dout = b.random((width,), "f32"), b.empty((PARTS, width), "f32"), b.random((N, width), X)
        return Work(lambda: bias_backward(b.dev, dbias, partial, dout), lambda p: eager(
            lambda d: d.sum(0), p.tensor(dout)))
    return Case(f"dbias {name}", X, bias_backward_bytes(N, width, PARTS, BYTES[X]), bias_flops(N, width), setup)


def matrices(c: TransformerConfig, X: str) -> dict[str, tuple[int, int, int]]:
    """Rows, inputs and outputs of the products of a layer, and of the head."""
    return {"qkv": (N, c.C, c.QKV), "o": (N, c.NH * c.HS, c.C), "gate_up": (N, c.C, 2 * c.F), "down": (N, c.F, c.C),
            "head": (head_rows(c, X), c.C, c.Vp)}


def cases() -> list[Case]:
    """Both models in bf16, one matrix in f32; the bias of Qwen2."""
    out = [product(which, f"{matrix} {name}", *sizes, "bf16") for name, c in MODELS.items()
           for matrix, sizes in matrices(c, "bf16").items() for which in PRODUCTS]
    c = MODELS["qwen2_0_5b"]
    out += [product(which, "down qwen2_0_5b", *matrices(c, "f32")["down"], "f32") for which in PRODUCTS]
    return [*out, with_bias("qkv qwen2_0_5b", *matrices(c, "bf16")["qkv"], "bf16"),
            sum_bias("qwen2_0_5b", c.QKV, "bf16")]


def main(argv: Sequence[str] | None = None) -> int:
    return run({"linear": cases}, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
