"""The driver calls that CuPy lacks, on a real driver: attributes, cluster and dependent launches, tensor maps, log."""

import numpy as np
import pytest

from apr import driver
from apr.kernel import KernelSpec
from apr.ptx_cache import PtxCache

COMMON = "using f32 = float; struct bf16 { unsigned short bits; }; using floatX = K_FLOATX;\n"
SOURCE = r"""
#include "common.cuh"
struct alignas(64) TensorMap { char bytes[128]; };

extern "C" __global__ void ranks(int* out, int base) {  // each block's rank in its cluster
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    if (threadIdx.x == 0) out[blockIdx.x] = base + (int)rank + (int)sizeof(floatX) - 4;
}

extern "C" __global__ void add_one(int* out) {  // waits for the kernel before it, however early it is started
    asm volatile("griddepcontrol.wait;" ::: "memory");
    out[threadIdx.x] += 1;
}

// One tile of 16 rows of 64 bf16 by the bulk copy engine, from column x and row y on.
extern "C" __global__ void copy_tile(const __grid_constant__ TensorMap map, unsigned short* out, int x, int y) {
    __shared__ alignas(128) unsigned short tile[16 * 64];
    __shared__ alignas(8) unsigned long long barrier;
    const unsigned at = (unsigned)__cvta_generic_to_shared(&barrier), to = (unsigned)__cvta_generic_to_shared(tile);
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "n"(sizeof(tile)) : "memory");
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%2, %3}], [%4];"
                     ::"r"(to), "l"(&map), "r"(x), "r"(y), "r"(at) : "memory");
    }
    __syncthreads();
    unsigned done = 0;
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(at) : "memory");
    for (int i = threadIdx.x; i < 16 * 64; i += blockDim.x) out[i] = tile[i];
}
"""


@pytest.fixture(scope="module")
def function(dev, tmp_path_factory):
    """The handle of an entry of the test's own source."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "common.cuh").write_text(COMMON)
    (folder / "driver_test.cu").write_text(SOURCE)
    cache = PtxCache(dev.cache.arch, folder / "cache", folder)
    kernels = []

    def get(entry):
        kernels.append(cache.get(KernelSpec("driver_test.cu", entry, ("FLOATX",), ()), {"FLOATX": "f32"}))
        return kernels[-1].function
    return get


def pointer(array) -> bytes:
    return int(array.data.ptr).to_bytes(8, "little")


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


def test_attributes_are_those_of_the_kernel(dev, function):
    found = driver.function_attributes(function("copy_tile"))
    assert 0 < found.registers <= 255 and found.max_threads >= 32
    assert found.shared_bytes >= 16 * 64 * 2 + 8 and found.binary_version >= 80


@pytest.mark.parametrize("size", [1, 2, 4])
def test_blocks_are_launched_in_clusters(dev, function, size):
    out = dev.empty((8,), "i32")
    code = driver.launch(function("ranks"), (8, 1, 1), (32, 1, 1), 0, dev.stream.ptr, [pointer(out), number(100)],
                         cluster=(size, 1, 1))
    assert code == 0
    assert dev.download(out).tolist() == [100 + i % size for i in range(8)]


def test_a_cluster_that_does_not_divide_the_grid_is_an_error_code(dev, function):
    code = driver.launch(function("ranks"), (7, 1, 1), (32, 1, 1), 0, dev.stream.ptr,
                         [pointer(dev.empty((8,), "i32")), number(0)], cluster=(4, 1, 1))
    assert code != 0 and driver.error_name(code).startswith("CUDA_ERROR") and not driver.is_sticky(code)
    dev.synchronize()


def test_dependent_launches_keep_their_order(dev, function):
    out = dev.empty((64,), "i32")
    dev.fill(out, 0)
    for _ in range(50):
        assert driver.launch(function("add_one"), (1, 1, 1), (64, 1, 1), 0, dev.stream.ptr, [pointer(out)],
                             programmatic=True) == 0
    assert dev.download(out).tolist() == [50] * 64


def test_a_tensor_map_brings_the_tile_that_it_says(dev, function, rng):
    """Rows of 72 columns, of which 70 count; a tile at the edge is filled with zeros.

    Columns are multiples of 8: from (6, 3) on, 12 bytes into a row, the copy engine ended in an illegal instruction.
    """
    host = rng.integers(1, 2**16, (40, 72)).astype(np.uint16)
    source, out = dev.empty(host.shape, "bf16"), dev.empty((16, 64), "bf16")
    dev.upload(source, host)
    encoded = driver.tensor_map(source.data.ptr, "bf16", (70, 40), (144,), (64, 16))
    assert len(encoded) == 128
    padded = np.zeros((64, 200), np.uint16)
    padded[:40, :70] = host[:, :70]
    for x, y in ((0, 0), (8, 3), (32, 30)):
        code = driver.launch(function("copy_tile"), (1, 1, 1), (64, 1, 1), 0, dev.stream.ptr,
                             [encoded, pointer(out), number(x), number(y)])
        assert code == 0
        assert np.array_equal(dev.download(out), padded[y:y + 16, x:x + 64]), (x, y)


def test_the_log_says_why_an_image_does_not_load(dev):
    assert driver.load_log(b"junk").startswith("CUDA_ERROR")
    log = driver.load_log(b".version 7.0\n.target sm_80\n.address_size 64\nnonsense\n\0")
    assert log.startswith("CUDA_ERROR") and "nonsense" in log
