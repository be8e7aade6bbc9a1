// global_norm.cu - the L2 norm over every gradient of the model.
//
// MATH      norm = sqrt(sum over all parameters of grad^2)
// SOURCE    Pascanu et al. 2013, arXiv:1211.5063
// SHAPES    grads (size,) f32, size a multiple of 4   partial (gridDim.x,) f64   norm (1,) f64
// WRITES    partial =   norm =
// BAKED     FLOATX (nothing depends on it)      RUNTIME  size, parts
// LAUNCH    global_norm  grid (parts) block (256)       global_norm_finish  grid (1) block (256)
// MEMORY    4 size bytes
// FLOPS     2 size: bandwidth bound
// NUMERICS  squares and sums in double, which no gradient overflows, in a fixed order; NaN or inf if a gradient is
// CONTRACT  contracts/global_norm-v1.yaml      REFERENCE  apr/reference/global_norm.py
#include "common.cuh"
constexpr int BLOCK = 256;

__device__ __forceinline__ f64 block_sum_f64(f64 x) {
    __shared__ f64 sums[BLOCK];
    sums[threadIdx.x] = x;
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    return sums[0];  // of thread 0 only
}

extern "C" __global__ void __launch_bounds__(BLOCK) global_norm(
    f64* __restrict__ partial, const f32* __restrict__ grads, i64 size) {
    f64 sum = 0.0;
    const i64 step = (i64)gridDim.x * BLOCK;
#pragma unroll 4
    for (i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x; i < size / 4; i += step) {
        const Vec<f32, 4> g = reinterpret_cast<const Vec<f32, 4>*>(grads)[i];
#pragma unroll
        for (int k = 0; k < 4; k++) sum = fma((f64)g[k], (f64)g[k], sum);
    }
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(BLOCK) global_norm_finish(
    f64* __restrict__ norm, const f64* __restrict__ partial, i32 parts) {
    f64 sum = 0.0;
    for (int i = threadIdx.x; i < parts; i += BLOCK) sum += partial[i];
    sum = block_sum_f64(sum);
    if (threadIdx.x == 0) *norm = sqrt(sum);
}
