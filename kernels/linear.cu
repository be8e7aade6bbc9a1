// linear.cu - the bias of a matrix product, and its gradient. The products themselves are cuBLASLt's: apr/gemm.py.
//
// MATH      out_no += bias_o                            dbias_o += sum_n dout_no
// SHAPES    out, dout (N, O) floatX   bias (O,) floatX   partial (PARTS, O) f32   dbias (O,) f32
// WRITES    out += (in place)   partial =   dbias +=
// BAKED     O, FLOATX      RUNTIME  N
// LAUNCH    bias_forward      grid (ceil(N*O/W / 256))   block (256)     W = elements of one access
//           bias_backward     grid (PARTS)               block (128)     rows part, part + PARTS, …
//           bias_sum_backward grid (ceil(O/32))          block (32, 32)
// MEMORY    forward 2NOs bytes, backward NOs + 4PO, sum 4PO + 8O, s = bytes of floatX
// FLOPS     NO each: bandwidth bound
// NUMERICS  sums in float in a fixed order: bit-reproducible
// CONTRACT  contracts/linear-v1.yaml      REFERENCE  apr/reference/linear.py
#include "common.cuh"
constexpr int O = K_O, W = vector_width(O), VECTORS = O / W;
using Row = Vec<floatX, W>;

extern "C" __global__ void __launch_bounds__(256) bias_forward(
    floatX* __restrict__ out, const floatX* __restrict__ bias, i32 N) {
    const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (i64)N * VECTORS) return;
    Row x = reinterpret_cast<Row*>(out)[i];
    const Row b = reinterpret_cast<const Row*>(bias)[i % VECTORS];
#pragma unroll
    for (int k = 0; k < W; k++) x.set(k, x[k] + b[k]);
    reinterpret_cast<Row*>(out)[i] = x;
}

extern "C" __global__ void __launch_bounds__(128) bias_backward(
    f32* __restrict__ partial, const floatX* __restrict__ dout, i32 N) {
    for (int i = threadIdx.x; i < VECTORS; i += 128) {
        float sum[W] = {};
#pragma unroll 4
        for (i64 n = blockIdx.x; n < N; n += gridDim.x) {
            const Row d = reinterpret_cast<const Row*>(dout + n * O)[i];
#pragma unroll
            for (int k = 0; k < W; k++) sum[k] += d[k];
        }
#pragma unroll
        for (int k = 0; k < W; k++) partial[(i64)blockIdx.x * O + i * W + k] = sum[k];
    }
}

extern "C" __global__ void bias_sum_backward(f32* __restrict__ dbias, const f32* __restrict__ partial, i32 parts) {
    add_parts(dbias, partial, parts, O, O);
}
