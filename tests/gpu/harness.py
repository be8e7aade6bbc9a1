"""What the tests of kernels share: guarded device arrays, bf16, the judge, and the naive bf16 that it judges by.

An array lies between two bands of NaN (all bits set). What a kernel must write starts as NaN too, so a missed element
is seen; what it must add to starts as random numbers, so `=` for `+=` is seen; what it only reads must stay as it was.

The judge, by relative L2 against the reference in float64 on the same (rounded) inputs. float32: at most the gate of
the op's contract. bf16: at most TWICE the error of a naive bf16 computation, which is the reference in float32 with the
result of every op, and what an op keeps in between, rounded to bf16. Results that stay float32 in bf16 training are
held to the float32 gate wherever the kernel rounds nothing on the way.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from compare import assert_close, relative_l2

from apr.contract import load_contract
from apr.device import Device
from apr.kernel import DEVICE_DTYPES
from apr.paths import contracts_dir

BAND = 256  # bytes on each side; keeps the 16-byte alignment that vector accesses need
TWICE, FLOOR = 2.0, 1e-6  # the factor of flash-attention's tests; a floor for where naive rounding happens to be exact
ZERO = 1e-5  # absolute, where the truth is all zeros: float32 cancels numbers of size 1 to about 1e-6
TENSOR_CORES = 1e-5  # float32 sums of bf16 products: tensor cores truncate where float32 rounds
BF16 = np.dtype(ml_dtypes.bfloat16)
BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def gate(contract: str) -> float:
    """The float32 tolerance of an op, from its contract, which gives the reason."""
    value = load_contract(contracts_dir() / f"{contract}-v1.yaml").tolerance.value
    assert value is not None
    return value


def rounded(x: np.ndarray) -> np.ndarray:
    """x rounded to bf16, as float32."""
    return np.asarray(x, np.float32).astype(BF16).astype(np.float32)


def f64(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same numbers in float64."""
    return tuple(np.asarray(a, np.float64) for a in arrays)


def judge(actual: np.ndarray, truth: np.ndarray, tolerance: float, what: str, naive: np.ndarray | None = None,
          zero: float = ZERO) -> None:
    """Demand that `actual` is within `tolerance` of the float64 truth, or with `naive` within TWICE naive's error."""
    truth = np.asarray(truth, np.float64)
    if not truth.any():
        assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, expected {truth.shape}"
        assert np.abs(actual).max() <= zero, f"{what}: {np.abs(actual).max()} where zeros are expected"
        return
    if naive is not None:
        tolerance = TWICE * relative_l2(naive, truth) + FLOOR
    assert_close(actual, truth, tolerance, what)


class Arrays:
    """Guarded device arrays of one test in one storage type."""

    def __init__(self, dev: Device, storage: str) -> None:
        self.dev, self.storage = dev, storage
        self.made: list[tuple[Any, Any, np.ndarray | None]] = []  # with the bands, without, the bits if only read

    def round(self, x: np.ndarray) -> np.ndarray:
        """x as the storage type holds it, as float32."""
        return rounded(x) if self.storage == "bf16" else np.asarray(x, np.float32)

    def out(self, *shape: int, dtype: str | None = None) -> Any:
        """An array that a kernel must write all of: NaN; floatX unless `dtype` says otherwise."""
        dtype = dtype or self.storage
        band = BAND // DEVICE_DTYPES[dtype].itemsize
        size = int(np.prod(shape))
        whole = self.dev.empty((size + 2 * band,), dtype)
        self.dev.fill(whole, 0xFF)
        inner = whole[band:band + size].reshape(shape)
        self.made.append((whole, inner, None))
        return inner

    def update(self, host: np.ndarray, dtype: str | None = None) -> Any:
        """An array that a kernel adds to or changes in place."""
        host, dtype = np.asarray(host), dtype or self.storage
        array = self.out(*host.shape, dtype=dtype)
        kind = BF16 if dtype == "bf16" else DEVICE_DTYPES[dtype]
        self.dev.upload(array, np.ascontiguousarray(host.astype(kind)))
        return array

    def read(self, host: np.ndarray, dtype: str | None = None) -> Any:
        """An array that a kernel only reads."""
        array = self.update(host, dtype)
        whole, inner, _ = self.made.pop()
        self.made.append((whole, inner, self.bits(array)))
        return array

    def bits(self, array: Any) -> np.ndarray:
        """The array's bits as unsigned integers, on the host."""
        host = self.dev.download(array)
        return host.view(BITS[host.dtype.itemsize])

    def get(self, array: Any) -> np.ndarray:
        """A result on the host, all of it written; bf16 as float32."""
        bits = self.bits(array)
        missed = np.argwhere(bits == np.iinfo(bits.dtype).max)
        assert missed.size == 0, f"{len(missed)} elements are not written, first at {tuple(missed[0])}"
        return bits.view(BF16).astype(np.float32) if array.dtype == np.uint16 else bits.view(array.dtype)

    def check(self) -> None:
        """Demand intact bands, and that what is only read is as it was."""
        for whole, inner, kept in self.made:
            bits, band = self.bits(whole), BAND // whole.dtype.itemsize
            full = np.iinfo(bits.dtype).max
            assert (bits[:band] == full).all(), f"written before an array of shape {inner.shape}"
            assert (bits[-band:] == full).all(), f"written after an array of shape {inner.shape}"
            if kept is not None:
                assert (bits[band:-band].reshape(kept.shape) == kept).all(), f"input of shape {inner.shape} was changed"

    def judge(self, what: str, array: Any, truth: np.ndarray, tolerance: float,
              naive: Callable[[], np.ndarray] | None = None, part: Any = ...) -> None:
        """Judge a result, or `part` of it; `naive` is asked in bf16 only."""
        rival = naive()[part] if naive is not None and self.storage == "bf16" else None
        judge(self.get(array)[part], truth[part], tolerance, f"{what} ({self.storage})", rival)


def same_bits(run: Callable[[], dict[str, np.ndarray]]) -> None:
    """Demand the same bits of two runs."""
    first, second = run(), run()
    for name in first:
        assert (first[name] == second[name]).all(), f"{name}: two runs differ in {(first[name] != second[name]).sum()}"
