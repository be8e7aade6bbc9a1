// rope.cu - rotary positions of the query and key heads, split-half; for Qwen3 the RMSNorm of each head before it.
//
// MATH      inv_freq_i = theta^(-2i/HS), i < HS/2, slowed for long waves by Llama 3's scaling; angle_ti = t inv_freq_i
//           norm_c = x_c * rstd * weight_c, rstd = 1 / sqrt(mean_c x_c^2 + eps)                    (QK_NORM only)
//           out_i = norm_i cos - norm_(i+HS/2) sin        out_(i+HS/2) = norm_(i+HS/2) cos + norm_i sin
//           Backward turns the other way, then goes through the norm:
//           dinp = rstd * (dnorm - normed * mean_c(dnorm * normed)), normed = x * rstd, dnorm = turned * weight
//           dweight_c += sum over rows and heads of turned_c * normed_c, for queries and keys apart
// SOURCE    Su et al. 2021, arXiv:2104.09864; scaling: Llama 3.1, as in transformers' `llama3` rope type
// SHAPES    out, inp, dinp, dout (N, QKV) floatX: NH query heads, NKV key heads, NKV value heads of HS
//           cos, sin (T, HS/2) f32   head_rstd (N, NH+NKV) f32   q_weight, k_weight (HS,) floatX
//           partial (PARTS, 2HS) f32: the queries' share, then the keys'   q_dweight, k_dweight (HS,) f32; row n is at
//           position n % T
// WRITES    table: cos =, sin =     forward: out =, head_rstd = (QK_NORM)     backward: dinp =, partial = (QK_NORM)
//           weight_backward: q_dweight +=, k_dweight +=
//           out may be inp without QK_NORM, which leaves the value heads alone; with it out is another array and they
//           are copied. dinp may be dout. inp, head_rstd, weights and partial may be null without QK_NORM.
// BAKED     HS, NH, NKV, THETA, EPS, QK_NORM (0 or 1), the scaling FACTOR, LOW, HIGH, ORIGINAL (1, 0, 1, 1 for none),
//           FLOATX      RUNTIME  N, T
// LAUNCH    table            grid (ceil(T*HS/2 / 256))   block (256)
//           forward          grid (ceil(heads / PER))    block (256)   PER = 256 / GROUP heads, of GROUP lanes each
//           backward         grid (PARTS)                block (256)   heads part*PER .. , then every PARTS*PER-th;
//                            as forward where heads have no norms
//           weight_backward  grid (ceil(HS/32), 2)       block (32, 32)
// MEMORY    forward, backward 2 N (NH+NKV) HS s bytes, and T HS 4 of table, which stays in L2
// FLOPS     3 N (NH+NKV) HS, with norms 8: bandwidth bound
// NUMERICS  angles, sines and cosines in double, rounded once: exact at far positions. Sums in float in a fixed order.
// CONTRACT  contracts/rope-v1.yaml      REFERENCE  apr/reference/rope.py, apr/reference/rmsnorm.py
#include "common.cuh"
constexpr int HS = K_HS, NH = K_NH, NKV = K_NKV, HALF = HS / 2, QKV = (NH + 2 * NKV) * HS;
constexpr bool QK_NORM = K_QK_NORM;
constexpr float EPS = K_EPS;
constexpr int BLOCK = 256, W = vector_width(HALF), LANES = HALF / W;  // a lane has W channels of each half
constexpr int GROUP = LANES <= 1 ? 1 : LANES <= 2 ? 2 : LANES <= 4 ? 4 : LANES <= 8 ? 8 : LANES <= 16 ? 16 : 32;
static_assert(LANES <= 32, "a head is at most one warp");
constexpr int TURNED = NH + NKV;                    // heads that turn
constexpr int HEADS = QK_NORM ? NH + 2 * NKV : TURNED;  // heads that forward visits: with norms it copies the values
constexpr int PER = BLOCK / GROUP;
using Part = Vec<floatX, W>;

__device__ __forceinline__ double inverse_frequency(int i) {
    const double frequency = pow((double)K_THETA, -2.0 * i / HS);
    const double turns = (double)K_ORIGINAL * frequency / 6.283185307179586;
    const double keep = fmin(fmax((turns - (double)K_LOW) / ((double)K_HIGH - (double)K_LOW), 0.0), 1.0);
    return frequency * (keep + (1.0 - keep) / (double)K_FACTOR);
}

extern "C" __global__ void __launch_bounds__(BLOCK) rope_table(f32* __restrict__ cos_, f32* __restrict__ sin_, i32 T) {
    const i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x;
    if (i >= (i64)T * HALF) return;
    double s, c;
    sincos((double)(i / HALF) * inverse_frequency(i % HALF), &s, &c);
    cos_[i] = (float)c;
    sin_[i] = (float)s;
}

// The sum over the GROUP lanes of a head; all lanes of the warp call it.
__device__ __forceinline__ float head_sum(float x) { return warp_sum<GROUP>(x); }

extern "C" __global__ void __launch_bounds__(BLOCK) rope_forward(
    floatX* out, f32* head_rstd, const floatX* inp, const floatX* q_weight, const floatX* k_weight,
    const f32* __restrict__ cos_, const f32* __restrict__ sin_, i32 N, i32 T) {
    const int lane = threadIdx.x % GROUP;
    const i64 index = (i64)blockIdx.x * PER + threadIdx.x / GROUP;
    const bool active = index < (i64)N * HEADS && lane < LANES;
    const i64 n = active ? index / HEADS : 0;
    const int head = active ? index % HEADS : 0;
    const i64 at = n * QKV + head * HS + lane * W;
    Part first, second;
    if (active) {
        first = *reinterpret_cast<const Part*>(inp + at);
        second = *reinterpret_cast<const Part*>(inp + at + HALF);
    }
    float a[W], b[W];
#pragma unroll
    for (int k = 0; k < W; k++) a[k] = active ? first[k] : 0.0f, b[k] = active ? second[k] : 0.0f;
    if constexpr (QK_NORM) {
        float squares = 0.0f;
#pragma unroll
        for (int k = 0; k < W; k++) squares += a[k] * a[k] + b[k] * b[k];
        const float r = 1.0f / sqrtf(head_sum(squares) / HS + EPS);
        if (!active) return;
        if (head < TURNED) {
            const floatX* weight = (head < NH ? q_weight : k_weight) + lane * W;
#pragma unroll
            for (int k = 0; k < W; k++) a[k] *= r * to_float(weight[k]), b[k] *= r * to_float(weight[k + HALF]);
            if (lane == 0) head_rstd[n * TURNED + head] = r;
        }
    }
    if (!active) return;
    if (head < TURNED) {
        const i64 angle = (n % T) * HALF + lane * W;
#pragma unroll
        for (int k = 0; k < W; k++) {
            const float c = cos_[angle + k], s = sin_[angle + k];
            first.set(k, a[k] * c - b[k] * s);
            second.set(k, b[k] * c + a[k] * s);
        }
    }
    *reinterpret_cast<Part*>(out + at) = first;
    *reinterpret_cast<Part*>(out + at + HALF) = second;
}

extern "C" __global__ void __launch_bounds__(BLOCK) rope_backward(
    floatX* dinp, f32* __restrict__ partial, const floatX* dout, const floatX* __restrict__ inp,
    const floatX* __restrict__ q_weight, const floatX* __restrict__ k_weight, const f32* __restrict__ head_rstd,
    const f32* __restrict__ cos_, const f32* __restrict__ sin_, i32 N, i32 T) {
    const int lane = threadIdx.x % GROUP;
    float dweight[2][2][W] = {};  // queries and keys, first and second half
    for (i64 base = (i64)blockIdx.x * PER; base < (i64)N * TURNED; base += (i64)gridDim.x * PER) {
        const i64 index = base + threadIdx.x / GROUP;
        const bool active = index < (i64)N * TURNED && lane < LANES;
        const i64 n = active ? index / TURNED : 0;
        const int head = active ? index % TURNED : 0;
        const i64 at = n * QKV + head * HS + lane * W, angle = (n % T) * HALF + lane * W;
        float a[W] = {}, b[W] = {};
        if (active) {
            const Part first = *reinterpret_cast<const Part*>(dout + at);
            const Part second = *reinterpret_cast<const Part*>(dout + at + HALF);
#pragma unroll
            for (int k = 0; k < W; k++) {
                const float c = cos_[angle + k], s = sin_[angle + k];
                a[k] = first[k] * c + second[k] * s;
                b[k] = second[k] * c - first[k] * s;
            }
        }
        if constexpr (QK_NORM) {
            const bool is_key = head >= NH;
            const float r = active ? head_rstd[n * TURNED + head] : 0.0f;
            float x[W] = {}, y[W] = {}, through = 0.0f;
            if (active) {
                const Part first = *reinterpret_cast<const Part*>(inp + at);
                const Part second = *reinterpret_cast<const Part*>(inp + at + HALF);
                const floatX* weight = (is_key ? k_weight : q_weight) + lane * W;
#pragma unroll
                for (int k = 0; k < W; k++) {
                    x[k] = first[k] * r, y[k] = second[k] * r;
                    const float da = a[k] * x[k], db = b[k] * y[k];
                    dweight[0][0][k] += is_key ? 0.0f : da, dweight[0][1][k] += is_key ? 0.0f : db;
                    dweight[1][0][k] += is_key ? da : 0.0f, dweight[1][1][k] += is_key ? db : 0.0f;
                    a[k] *= to_float(weight[k]), b[k] *= to_float(weight[k + HALF]);
                    through += a[k] * x[k] + b[k] * y[k];
                }
            }
            const float mean = head_sum(through) / HS;
#pragma unroll
            for (int k = 0; k < W; k++) a[k] = r * (a[k] - x[k] * mean), b[k] = r * (b[k] - y[k] * mean);
        }
        if (active) {
            Part first, second;
#pragma unroll
            for (int k = 0; k < W; k++) first.set(k, a[k]), second.set(k, b[k]);
            *reinterpret_cast<Part*>(dinp + at) = first;
            *reinterpret_cast<Part*>(dinp + at + HALF) = second;
        }
    }
    if constexpr (QK_NORM) {  // the groups of the block are added in order, one kind of head at a time
        __shared__ float shares[PER][HS];
        for (int kind = 0; kind < 2; kind++) {
            __syncthreads();
            if (lane < LANES)
#pragma unroll
                for (int k = 0; k < W; k++) {
                    shares[threadIdx.x / GROUP][lane * W + k] = dweight[kind][0][k];
                    shares[threadIdx.x / GROUP][lane * W + k + HALF] = dweight[kind][1][k];
                }
            __syncthreads();
            for (int c = threadIdx.x; c < HS; c += BLOCK) {
                float sum = 0.0f;
                for (int group = 0; group < PER; group++) sum += shares[group][c];
                partial[((i64)blockIdx.x * 2 + kind) * HS + c] = sum;
            }
        }
    }
}

extern "C" __global__ void rope_weight_backward(f32* __restrict__ q_dweight, f32* __restrict__ k_dweight,
                                                const f32* __restrict__ partial, i32 parts) {
    add_parts(blockIdx.y == 0 ? q_dweight : k_dweight, partial + blockIdx.y * HS, parts, HS, 2 * HS);
}
