// rmsnorm.cu - add a sub-layer's output to the residual stream, then divide each row by its root mean square and scale
// it by a learned weight; and the gradient, where both branches of the stream meet again.
//
// MATH      residual_nc = inp_nc + update_nc       (where there is an update; else residual is inp)
//           rstd_n  = 1 / sqrt(mean_c residual_nc^2 + eps)     norm_nc = residual_nc * rstd_n
//           out_nc  = norm_nc * weight_c                        dnorm_nc = dout_nc * weight_c
//           dinp_nc = dresidual_nc + rstd_n * (dnorm_nc - norm_nc * mean_c(dnorm_nc * norm_nc))
//           dweight_c += sum_n dout_nc * norm_nc
// SOURCE    Zhang & Sennrich 2019, arXiv:1910.07467
// SHAPES    out, residual, inp, update, dinp, dout, dresidual (N, C) floatX   weight (C,) floatX   rstd (N,) f32
//           partial (PARTS, C) f32   dweight (C,) f32;  N = B*T
// WRITES    out =   rstd =   residual =   dinp =   partial =   dweight +=;  backward writes out again, which forward
//           does not keep: the same numbers from the same inputs. dinp may be dresidual; update, dresidual may be null
// BAKED     C, EPS, BLOCK (multiple of 32, <= 1024), FLOATX      RUNTIME  N
// LAUNCH    forward          grid (N)            block (BLOCK)     one row per block
//           backward         grid (PARTS)        block (BLOCK)     rows part, part + PARTS, …
//           weight_backward  grid (ceil(C/32))   block (32, 32)
// MEMORY    forward 4NCs + 4N bytes with an update (2NCs without), backward 5NCs + 4N + 4PC, weight_backward 4PC + 8C
// FLOPS     forward 5NC, backward 12NC: bandwidth bound
// NUMERICS  the mean is of the stored (rounded) residual, so that backward sees what forward saw; sums in float in a
//           fixed order (bit-reproducible); division and square root rounded correctly; eps baked as 32-bit float
// CONTRACT  contracts/rmsnorm-v1.yaml      REFERENCE  apr/reference/rmsnorm.py, apr/reference/residual.py
#include "common.cuh"
constexpr int C = K_C, BLOCK = K_BLOCK, W = vector_width(C), VECTORS = C / W;
constexpr int EACH = (VECTORS + BLOCK - 1) / BLOCK;  // vectors of a row that a thread holds in registers
constexpr float EPS = K_EPS;
using Row = Vec<floatX, W>;

extern "C" __global__ void __launch_bounds__(BLOCK) rmsnorm_forward(
    floatX* __restrict__ out, f32* __restrict__ rstd, floatX* __restrict__ residual, const floatX* __restrict__ inp,
    const floatX* __restrict__ update, const floatX* __restrict__ weight, i32 N) {
    const i64 n = blockIdx.x;
    Row x[EACH];
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int i = threadIdx.x + e * BLOCK;
        if (i >= VECTORS) break;
        x[e] = reinterpret_cast<const Row*>(inp + n * C)[i];
        if (update != nullptr) {
            const Row u = reinterpret_cast<const Row*>(update + n * C)[i];
#pragma unroll
            for (int k = 0; k < W; k++) x[e].set(k, x[e][k] + u[k]);
            reinterpret_cast<Row*>(residual + n * C)[i] = x[e];
        }
#pragma unroll
        for (int k = 0; k < W; k++) sum += x[e][k] * x[e][k];
    }
    const float r = 1.0f / sqrtf(block_sum<BLOCK>(sum) / C + EPS);
    if (threadIdx.x == 0) rstd[n] = r;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int i = threadIdx.x + e * BLOCK;
        if (i >= VECTORS) break;
        const Row w = reinterpret_cast<const Row*>(weight)[i];
        Row o;
#pragma unroll
        for (int k = 0; k < W; k++) o.set(k, x[e][k] * r * w[k]);
        reinterpret_cast<Row*>(out + n * C)[i] = o;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) rmsnorm_backward(
    floatX* dinp, floatX* __restrict__ out, f32* __restrict__ partial, const floatX* __restrict__ dout,
    const floatX* dresidual, const floatX* __restrict__ inp, const floatX* __restrict__ weight,
    const f32* __restrict__ rstd, i32 N) {
    float dweight[EACH][W] = {};
    for (i64 n = blockIdx.x; n < N; n += gridDim.x) {
        const float r = rstd[n];
        Row x[EACH], d[EACH];
        float sum = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = threadIdx.x + e * BLOCK;
            if (i >= VECTORS) break;
            x[e] = reinterpret_cast<const Row*>(inp + n * C)[i];
            d[e] = reinterpret_cast<const Row*>(dout + n * C)[i];
            const Row w = reinterpret_cast<const Row*>(weight)[i];
#pragma unroll
            for (int k = 0; k < W; k++) sum += d[e][k] * w[k] * (x[e][k] * r);
        }
        const float mean = block_sum<BLOCK>(sum) / C;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = threadIdx.x + e * BLOCK;
            if (i >= VECTORS) break;
            const Row w = reinterpret_cast<const Row*>(weight)[i];
            Row din, o, skip;
            if (dresidual != nullptr) skip = reinterpret_cast<const Row*>(dresidual + n * C)[i];
#pragma unroll
            for (int k = 0; k < W; k++) {
                const float norm = x[e][k] * r;
                o.set(k, norm * w[k]);
                dweight[e][k] += d[e][k] * norm;
                const float through = r * (d[e][k] * w[k] - norm * mean);
                din.set(k, dresidual != nullptr ? skip[k] + through : through);
            }
            reinterpret_cast<Row*>(out + n * C)[i] = o;
            reinterpret_cast<Row*>(dinp + n * C)[i] = din;
        }
    }
#pragma unroll
    for (int e = 0; e < EACH; e++)
#pragma unroll
        for (int k = 0; k < W; k++) {
            const int i = threadIdx.x + e * BLOCK;
            if (i < VECTORS) partial[(i64)blockIdx.x * C + i * W + k] = dweight[e][k];
        }
}

extern "C" __global__ void rmsnorm_weight_backward(
    f32* __restrict__ dweight, const f32* __restrict__ partial, i32 parts) {
    add_parts(dweight, partial, parts, C, C);
}
