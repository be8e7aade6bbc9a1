"""Launch checks: an argument fits its declaration exactly or is refused by name; and the bytes a kernel receives."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest

from apr import driver, kernel
from apr.errors import DeviceFault, KernelParamError, LaunchError
from apr.kernel import Kernel, KernelSpec, blocks, floatx, vector_width

SPEC = KernelSpec("a.cu", "entry", ("FLOATX",), (
    "out:floatX*", "skip:const f32*?", "ids:const i32*", "step:f64*", "n:i32", "eps:f32", "size:i64", "beta:f64",
    "flag:u8"))
KEY = "entry of a-FLOATX=bf16-sm_90a-00"


class Array:
    """What a launch looks at of a CuPy array."""

    def __init__(self, dtype, pointer: int = 1 << 40, contiguous: bool = True) -> None:
        self.dtype = np.dtype(dtype)
        self.flags = SimpleNamespace(c_contiguous=contiguous)
        self.data = SimpleNamespace(ptr=pointer)

    def __str__(self) -> str:
        return f"array of {self.dtype}" + ("" if self.flags.c_contiguous else ", strided")


@pytest.fixture
def launched(monkeypatch):
    """The launches that the driver was asked for; `code` is its answer."""
    state = SimpleNamespace(calls=[], options=[], code=0, shared=[])

    def launch(function, grid, block, shared, stream, values, **options):
        state.calls.append((function, grid, block, shared, stream, list(values)))
        state.options.append(options)
        return state.code

    monkeypatch.setattr(driver, "launch", launch)
    monkeypatch.setattr(driver, "set_dynamic_shared", lambda function, size: state.shared.append(size))
    monkeypatch.setattr(driver, "error_name", lambda code: f"CUDA_ERROR_{code}")
    return state


def good() -> dict:
    return {"out": Array(np.uint16, 0x1122334455667788), "skip": None, "ids": Array(np.int32, 3),
            "step": Array("f8", 4), "n": np.int32(-5), "eps": np.float32(1e-6), "size": np.int64(1 << 40),
            "beta": np.float64(0.1), "flag": np.uint8(7)}


def launch(arguments, storage="bf16", grid=(3,), block=(128,), **options) -> None:
    Kernel(SPEC, storage, 77, KEY, None).launch(99, grid, block, list(arguments), **options)


def test_the_bytes_that_a_kernel_receives(launched):
    launch(good().values(), grid=(3, 2), block=(32, 8), shared=64)
    ((function, grid, block, shared, stream, values),) = launched.calls
    assert (function, grid, block, shared, stream) == (77, (3, 2, 1), (32, 8, 1), 64, 99)
    assert values == [bytes.fromhex("8877665544332211"), bytes(8), struct.pack("<Q", 3), struct.pack("<Q", 4),
                      struct.pack("<i", -5), bytes.fromhex("bd378635"), struct.pack("<q", 1 << 40),
                      struct.pack("<d", 0.1), b"\7"]
    launch((good() | {"skip": Array("f4", 9), "out": Array("f4", 5)}).values(), "f32")
    assert launched.calls[-1][5][:2] == [struct.pack("<Q", 5), struct.pack("<Q", 9)]


@pytest.mark.parametrize(("name", "value", "words"), [
    ("out", Array(np.float32), ["dtype uint16", "float32"]), ("out", Array(np.int16), ["dtype uint16", "int16"]),
    ("out", Array(np.float16), ["dtype uint16"]), ("out", Array("u2", contiguous=False), ["contiguous", "strided"]),
    ("out", None, ["a device array of floatX*", "NoneType"]), ("ids", None, ["const i32*", "NoneType"]),
    ("skip", Array(np.float64), ["dtype float32", "float64"]), ("skip", Array("f4", contiguous=False), ["contiguous"]),
    ("out", np.zeros(4, np.uint16), ["give an array on the GPU", "ndarray"]), ("ids", 1 << 40, ["array", "int"]),
    ("ids", [1], ["array", "list"]), ("ids", Array(np.int64), ["dtype int32", "int64"]),
    ("n", 5, ["np.int32", "int"]), ("n", np.int64(5), ["np.int32", "int64"]), ("n", np.uint32(5), ["np.int32"]),
    ("n", True, ["np.int32", "bool"]), ("n", None, ["np.int32"]), ("n", Array(np.int32), ["np.int32", "Array"]),
    ("n", np.array(5, np.int32), ["np.int32", "ndarray"]),
    ("eps", 1e-6, ["np.float32", "float"]), ("eps", np.float64(1e-6), ["np.float32", "float64"]),
    ("size", np.int32(1), ["np.int64", "int32"]), ("beta", 0.1, ["np.float64", "float"]),
    ("beta", np.float32(0.1), ["np.float64", "float32"]), ("flag", np.int8(1), ["np.uint8", "int8"])], ids=str)
def test_an_argument_that_does_not_fit_is_named_and_nothing_is_launched(launched, name, value, words):
    with pytest.raises(LaunchError) as caught:
        launch((good() | {name: value}).values())
    assert f"argument {name}:" in str(caught.value) and KEY in str(caught.value)
    assert [w for w in words if w not in str(caught.value)] == [] and launched.calls == []


def test_only_who_says_so_may_start_before_its_predecessor_has_ended(launched):
    launch(good().values())
    launch(good().values(), programmatic=True)
    launch(good().values(), programmatic=False)
    assert [options["programmatic"] for options in launched.options] == [False, True, False]


def test_every_argument_in_its_order(launched):
    values = list(good().values())
    for wrong in (values[:-1], [*values, np.int32(1)], []):
        with pytest.raises(LaunchError, match=f"{KEY}: expected 9 arguments, found {len(wrong)}"):
            launch(wrong)
    for i in range(len(values) - 1):  # neighbours exchanged: no two of one type
        swapped = [*values[:i], values[i + 1], values[i], *values[i + 2:]]
        with pytest.raises(LaunchError, match="argument"):
            launch(swapped)
    assert launched.calls == []


@pytest.mark.parametrize("size", [(), (1, 1, 1, 1)])
def test_a_grid_of_no_or_four_numbers(launched, size):
    for sizes in ({"grid": size}, {"block": size}):
        with pytest.raises(LaunchError, match="1 to 3 numbers"):
            launch(good().values(), **sizes)
    assert launched.calls == []


@pytest.mark.parametrize(("code", "error"), [(1, LaunchError), (701, LaunchError), (400, LaunchError),
                                             (700, DeviceFault), (719, DeviceFault), (999, DeviceFault)])
def test_what_the_driver_refuses(launched, code, error):
    launched.code = code
    with pytest.raises(error) as caught:
        launch(good().values(), grid=(0,), shared=128)
    assert type(caught.value) is error
    assert [w for w in (KEY, f"CUDA_ERROR_{code}", "grid (0,)", "128 bytes") if w not in str(caught.value)] == []


def test_shared_memory_is_asked_for_once_and_when_it_grows(launched):
    k = Kernel(SPEC, "bf16", 77, KEY, None)
    for shared in (0, 1000, 1000, 500, 100_000):
        k.launch(99, (1,), (32,), list(good().values()), shared)
    assert launched.shared == [1000, 100_000]
    assert [call[3] for call in launched.calls] == [0, 1000, 1000, 500, 100_000]


@pytest.mark.parametrize("arg", ["out", "out:float", "out:f32**", "out:f32?", "out: f32", "const out:f32", ":f32",
                                 "out:f16*", "out:floatX* "])
def test_a_declaration_outside_the_grammar(arg):
    with pytest.raises(KernelParamError):
        KernelSpec("a.cu", "e", (), (arg,))


def test_small_functions():
    assert [blocks(n, 256) for n in (0, 1, 256, 257)] == [0, 1, 1, 2]
    assert (floatx(Array(np.uint16)), floatx(Array(np.float32))) == ("bf16", "f32")
    assert [vector_width(n, 2) for n in (896, 100, 6, 7)] == [8, 4, 2, 1] and vector_width(896, 4) == 4
    assert {name: dtype.itemsize for name, dtype in kernel.DEVICE_DTYPES.items()} == {
        "f32": 4, "bf16": 2, "i32": 4, "f64": 8, "i64": 8, "u8": 1}
