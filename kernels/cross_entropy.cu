// cross_entropy.cu - cross-entropy of next-token scores in nats, and its gradient written over them.
//
// MATH      loss_n = log(sum_v exp(logit_nv)) - logit_n,target       dlogit_nv = (softmax_nv - [v = target_n]) * dloss
//           A row whose target is IGNORE has loss 0 and gradient 0.
// SHAPES    logits (N, VP) floatX, of which V columns are scores and the rest padding   targets (N,) i32
//           losses (N,) f32   dloss (1,) f64: 1 / counted targets for the gradient of the mean   total (1,) f64
// WRITES    losses =   logits = dlogits (forward_backward only; padding becomes 0)   total +=
// BAKED     V, VP (a multiple of 128), IGNORE, FLOATX      RUNTIME  N
// LAUNCH    forward, forward_backward  grid (N) block (1024)   one row per block
//           sum                        grid (1) block (1024)
// MEMORY    forward NVs bytes, forward_backward 2NVs, and up to NVs for the second reading of a row, which L2 may have
// FLOPS     about 10NV, and 2NV exponentials: bandwidth bound
// NUMERICS  maximum and sum in float, in one pass that rescales, fixed order; bf16 logits use the fast exponential.
//           A target that is neither IGNORE nor in [0, V) gives NaN, which the guard sees: ids are checked on the host.
//           The losses are added up in double.
// CONTRACT  contracts/cross_entropy-v1.yaml      REFERENCE  apr/reference/cross_entropy.py
#include "common.cuh"
constexpr int V = K_V, VP = K_VP, IGNORE = K_IGNORE, BLOCK = 1024, VECTORS = VP / VEC;
constexpr float LOW = -3.402823466e38f;  // below any score; not -inf, whose difference with itself is NaN
using Part = Vec<floatX, VEC>;

__device__ __forceinline__ float exponential(float x) {
    if constexpr (same_type<floatX, bf16>::value) return __expf(x);
    return expf(x);
}

// The maximum of a row and the sum of exp(x - maximum), the same in every thread.
__device__ __forceinline__ void row_statistics(const Part* __restrict__ row, float& maximum, float& sum) {
    float m = LOW, s = 0.0f;
    for (int i = threadIdx.x; i < VECTORS; i += BLOCK) {
        const Part x = row[i];
        float high = m;
#pragma unroll
        for (int k = 0; k < VEC; k++)
            if (i * VEC + k < V) high = fmaxf(high, x[k]);
        if (high > m) {
            s *= exponential(m - high);
            m = high;
        }
#pragma unroll
        for (int k = 0; k < VEC; k++)
            if (i * VEC + k < V) s += exponential(x[k] - m);
    }
    __shared__ float highs[BLOCK / 32];
    maximum = m;
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, lane));
    if (threadIdx.x % 32 == 0) highs[threadIdx.x / 32] = maximum;
    __syncthreads();
    maximum = highs[threadIdx.x % 32];
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, lane));
    sum = block_sum<BLOCK>(s * exponential(m - maximum));
}

template <bool BACKWARD>
__device__ __forceinline__ void cross_entropy(f32* __restrict__ losses, floatX* logits, const i32* __restrict__ targets,
                                              const f64* __restrict__ dloss, i32 N) {
    const i64 n = blockIdx.x;
    const int target = targets[n];
    Part* row = reinterpret_cast<Part*>(logits + n * VP);
    float scale = 0.0f, maximum = 0.0f, loss = 0.0f;
    if (target != IGNORE) {
        float sum;
        row_statistics(row, maximum, sum);
        const bool known = target >= 0 && target < V;
        const float score = to_float(logits[n * VP + (known ? target : 0)]);
        loss = known ? logf(sum) - (score - maximum) : __int_as_float(0x7fc00000);
        if constexpr (BACKWARD) scale = (float)*dloss / sum;
    }
    if (threadIdx.x == 0) losses[n] = loss;
    if constexpr (BACKWARD) {
        __syncthreads();  // the target's score has been read by all
        const float one = (float)*dloss;
        for (int i = threadIdx.x; i < VECTORS; i += BLOCK) {
            const Part x = row[i];
            Part d;
#pragma unroll
            for (int k = 0; k < VEC; k++) {
                const int v = i * VEC + k;
                float p = target != IGNORE && v < V ? exponential(x[k] - maximum) * scale : 0.0f;
                if (v == target) p -= one;
                d.set(k, p);
            }
            row[i] = d;
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) cross_entropy_forward(
    f32* __restrict__ losses, const floatX* __restrict__ logits, const i32* __restrict__ targets, i32 N) {
    cross_entropy<false>(losses, const_cast<floatX*>(logits), targets, nullptr, N);
}

extern "C" __global__ void __launch_bounds__(BLOCK) cross_entropy_forward_backward(
    f32* __restrict__ losses, floatX* __restrict__ logits, const i32* __restrict__ targets,
    const f64* __restrict__ dloss, i32 N) {
    cross_entropy<true>(losses, logits, targets, dloss, N);
}

extern "C" __global__ void __launch_bounds__(BLOCK) cross_entropy_sum(
    f64* __restrict__ total, const f32* __restrict__ losses, i32 N) {
    __shared__ f64 sums[BLOCK];
    f64 sum = 0.0;
    for (int n = threadIdx.x; n < N; n += BLOCK) sum += (f64)losses[n];
    sums[threadIdx.x] = sum;
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *total += sums[0];
}
