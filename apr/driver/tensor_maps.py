"""Tensor maps: the 128 bytes by which a kernel's bulk copies (TMA, sm_90) know the tensor they copy tiles of.

The driver answers a broken rule with CUDA_ERROR_INVALID_VALUE and no more, so the rules are checked here, by name.
Source: cuTensorMapEncodeTiled in the CUDA driver API reference.
"""

from collections.abc import Sequence

from apr.driver import libcuda
from apr.driver.libcuda import check, ffi
from apr.errors import ShapeError

TYPES = {"bf16": (9, 2), "f32": (7, 4)}  # CU_TENSOR_MAP_DATA_TYPE_*, bytes of an element
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes -> CU_TENSOR_MAP_SWIZZLE_*
L2_PROMOTION_256B = 3
MAP_BYTES, MAP_ALIGN = 128, 128


def tensor_map(address: int, dtype: str, dims: Sequence[int], strides_bytes: Sequence[int], box: Sequence[int],
               swizzle: int = 0) -> bytes:
    """The map of a tensor at `address` from which tiles of `box` elements are copied; what lies outside reads as zero.

    All lists start with the fastest axis. `strides_bytes` leaves that one out (its elements are neighbours), so it has
    one entry less than `dims`. `swizzle` is 0, 32, 64 or 128 bytes. The result is an argument of a kernel, declared
    const __grid_constant__. Raises ShapeError naming the broken rule, UnavailableError or DeviceFault when the driver
    refuses.
    """
    _check(address, dtype, dims, strides_bytes, box, swizzle)
    rank = len(dims)
    memory = ffi.new("char[]", MAP_BYTES + MAP_ALIGN)
    start = memory + -int(ffi.cast("uintptr_t", memory)) % MAP_ALIGN
    code = libcuda.open_library().cuTensorMapEncodeTiled(
        start, TYPES[dtype][0], rank, address, ffi.new("uint64_t[]", list(dims)),
        ffi.new("uint64_t[]", [*strides_bytes, 0]), ffi.new("uint32_t[]", list(box)), ffi.new("uint32_t[]", [1] * rank),
        0, SWIZZLES[swizzle], L2_PROMOTION_256B, 0)
    check(code, f"cuTensorMapEncodeTiled of {dtype} {tuple(dims)}, strides {tuple(strides_bytes)}, box {tuple(box)}")
    return bytes(ffi.buffer(start, MAP_BYTES))


def _check(address: int, dtype: str, dims: Sequence[int], strides: Sequence[int], box: Sequence[int],
           swizzle: int) -> None:
    def rule(holds: bool, expected: str, found: object) -> None:
        if not holds:
            raise ShapeError("tensor map", expected, str(found), "change the layout, the tile or the swizzle")

    rule(dtype in TYPES, "a dtype of bf16 or f32", repr(dtype))
    rule(swizzle in SWIZZLES, "a swizzle of 0, 32, 64 or 128 bytes", swizzle)
    rule(1 <= len(dims) <= 5, "1 to 5 axes", len(dims))
    rule(len(strides) == len(dims) - 1 and len(box) == len(dims),
         f"{len(dims) - 1} strides and a box of {len(dims)} for {len(dims)} axes", f"{len(strides)} and {len(box)}")
    rule(address != 0 and address % 16 == 0, "an address that is a multiple of 16", hex(address))
    rule(all(1 <= d <= 1 << 32 for d in dims), "axes of 1 to 2^32 elements", list(dims))
    rule(all(s % 16 == 0 and 0 < s < 1 << 40 for s in strides),
         "strides that are multiples of 16 bytes, below 2^40", list(strides))
    rule(all(1 <= b <= 256 for b in box), "a box of 1 to 256 elements along each axis", list(box))
    inner = box[0] * TYPES[dtype][1]
    rule(inner % 16 == 0, "a box whose inner axis is a multiple of 16 bytes", f"{inner} bytes")
    rule(swizzle == 0 or inner <= swizzle, f"a box whose inner axis is at most the swizzle, {swizzle} bytes",
         f"{inner} bytes")
