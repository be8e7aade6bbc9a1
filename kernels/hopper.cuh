// hopper.cuh - sm_90a: wgmma (matrix products of a warpgroup), TMA (bulk copies of tiles), clusters, registers.
//
// A tile in shared memory is made of slabs of 64 columns of bf16, rows of 128 bytes one after the other, swizzled as
// TMA leaves them (CU_TENSOR_MAP_SWIZZLE_128B); a slab starts at a multiple of 1024 bytes. Of one tile wgmma reads both
//     rows of the right factor transposed (`by_row`:  d += a . tile^T, its columns are summed over), and
//     the right factor itself             (`by_column`: d += a . tile, its rows are summed over).
// SOURCE    PTX ISA 8.3, "Asynchronous Warpgroup Level Matrix Instructions", "Tensor Map", "mbarrier"
//
// wgmma is asynchronous: begin() before the first of a group, commit() after the last, and finish<N>(d) before d or
// what was multiplied is touched; N groups may go on. Every warp of the warpgroup waits for itself.
#ifndef APR_HOPPER_CUH
#define APR_HOPPER_CUH
#include "barrier.cuh"
struct alignas(64) TensorMap { u64 words[16]; };  // CUtensorMap, made by apr/driver/tensor_maps.py
constexpr int SLAB = 64, SLAB_ROW = 128;          // columns; bytes of a row

// A box of the tensor from (x, y, z) on, fastest axis first, into shared memory; its bytes count for the barrier.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, u64* barrier, i32 x, i32 y, i32 z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(barrier)),
                 "r"(x), "r"(y), "r"(z) : "memory");
}

// 4 bytes in the background, or zeros and nothing read if not inside.
__device__ __forceinline__ void copy_float(float* to, const float* from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(inside ? 4 : 0) : "memory");
}

// Clusters: how many blocks along y; all their threads wait for each other; two floats of another block's memory.
__device__ __forceinline__ u32 cluster_blocks() {
    u32 n;
    asm("mov.u32 %0, %%cluster_nctaid.y;" : "=r"(n));
    return n;
}
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ Vec<float, 2> load_of_block(const float* own, u32 block) {
    u32 address;
    Vec<float, 2> x;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(block));
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(x.lane[0]), "=f"(x.lane[1]) : "r"(address)
                 : "memory");
    return x;
}

// The registers of a thread, from here on: the warps of a block share them out among roles.
template <int COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// What wgmma is told of a tile: where it starts, bytes between slabs, bytes between groups of 8 rows, the swizzle.
__device__ __forceinline__ u64 describe(const void* tile, u32 slab_bytes) {
    return (u64)((shared_address(tile) & 0x3ffff) >> 4) | (u64)(slab_bytes >> 4) << 16 |
           (u64)(8 * SLAB_ROW >> 4) << 32 | 1ull << 62;
}
// The same tile from a byte offset on.
__device__ __forceinline__ u64 at_bytes(u64 description, u32 bytes) { return description + (bytes >> 4); }

__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int GROUPS> __device__ __forceinline__ void finish() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}
// All but the last GROUPS groups are done, among them those that d comes from: no use of d moves before this.
template <int GROUPS, int N> __device__ __forceinline__ void finish(float (&d)[N][4]) {
    finish<GROUPS>();
#pragma unroll
    for (int i = 0; i < N * 4; i++) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}

#define SUMS_64 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SUMS_128 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define SUMS_4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SUMS_32(d, i) SUMS_4(d, i), SUMS_4(d, i + 1), SUMS_4(d, i + 2), SUMS_4(d, i + 3), SUMS_4(d, i + 4), \
    SUMS_4(d, i + 5), SUMS_4(d, i + 6), SUMS_4(d, i + 7)
#define OUT_64(d) SUMS_32(d, 0)
#define OUT_128(d) SUMS_32(d, 0), SUMS_32(d, 8)

// d (64, N) = or += a (64, 16) . b (N, 16)^T, both in shared memory
#define BY_ROW(N, A, B, ADD)                                                                                         \
    __device__ __forceinline__ void by_row(float (&d)[N / 8][4], u64 a, u64 b, int add) {                            \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N          \
                     "k16.f32.bf16.bf16 " SUMS_##N ", " A ", " B ", add, 1, 1, 0, 0;\n}"                              \
                     : OUT_##N(d) : "l"(a), "l"(b), "r"(add));                                                       \
    }
BY_ROW(64, "%32", "%33", "%34")
BY_ROW(128, "%64", "%65", "%66")

// d (64, N) += a (64, 16) . b (16, N), a in registers as mma.sync's left operand, b in shared memory
#define BY_COLUMN(N, A, B)                                                                                           \
    __device__ __forceinline__ void by_column(float (&d)[N / 8][4], const u32 (&a)[4], u64 b) {                      \
        asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N                \
                     "k16.f32.bf16.bf16 " SUMS_##N ", {" A "}, " B ", add, 1, 1, 1;\n}"                               \
                     : OUT_##N(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                             \
    }
BY_COLUMN(64, "%32, %33, %34, %35", "%36")
BY_COLUMN(128, "%64, %65, %66, %67", "%68")

#endif
