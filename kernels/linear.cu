// linear.cu - the gradient of a bias. The products, and the bias within them, are cuBLASLt's: apr/gemm.py.
//
// MATH      dbias_o += sum_n dout_no
// SHAPES    dout (N, O) floatX   partial (PARTS, O) f32   dbias (O,) f32
// WRITES    partial =   dbias +=
// BAKED     O, FLOATX      RUNTIME  N
// LAUNCH    bias_backward     grid (PARTS, ceil(O/W / 32)) block (128)   32 accesses of a row each, four rows at once;
//                             W = elements of one access
//           bias_sum_backward grid (ceil(O/32))          block (32, 32)  programmatic: it waits for backward itself
// MEMORY    backward NOs + 4PO bytes, sum 4PO + 8O, s = bytes of floatX
// FLOPS     NO: bandwidth bound
// NUMERICS  sums in float in a fixed order: bit-reproducible
// CONTRACT  contracts/linear-v1.yaml      REFERENCE  apr/reference/linear.py
#include "common.cuh"
constexpr int O = K_O, W = vector_width(O), VECTORS = O / W;
using Row = Vec<floatX, W>;

extern "C" __global__ void __launch_bounds__(128) bias_backward(
    f32* __restrict__ partial, const floatX* __restrict__ dout, i32 N) {
    let_next_start();
    constexpr int WARPS = 4, BATCH = 8;  // rows of which a thread has the loads on their way at once
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = blockIdx.y * 32 + lane;
    const i64 step = (i64)gridDim.x * WARPS;
    const Row* column = reinterpret_cast<const Row*>(dout) + min(i, VECTORS - 1);
    float sum[W] = {};
    for (i64 first = (i64)blockIdx.x * WARPS + warp; first < N; first += step * BATCH) {
        Row d[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) d[j] = column[min(first + j * step, (i64)N - 1) * VECTORS];
#pragma unroll
        for (int j = 0; j < BATCH; j++)
#pragma unroll
            for (int k = 0; k < W; k++) sum[k] += first + j * step < N ? d[j][k] : 0.0f;
    }
    __shared__ float sums[WARPS][W][32];
#pragma unroll
    for (int k = 0; k < W; k++) sums[warp][k][lane] = sum[k];
    __syncthreads();
    if (warp > 0 || i >= VECTORS) return;
#pragma unroll
    for (int k = 0; k < W; k++)
        partial[(i64)blockIdx.x * O + i * W + k] = sums[0][k][lane] + sums[1][k][lane] + sums[2][k][lane] +
                                                   sums[3][k][lane];
}

extern "C" __global__ void __launch_bounds__(1024) bias_sum_backward(
    f32* __restrict__ dbias, const f32* __restrict__ partial, i32 parts) {
    wait_for_previous();
    add_parts(dbias, partial, parts, O, O);
}
