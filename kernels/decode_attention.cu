// decode_attention.cu - a new token per sequence: its keys and values enter the cache, its queries attend to all of it.
//
// MATH      q, k = rope(head_norm(q, k)) at position p = pos_b     (head_norm for Qwen3 only: x * rstd * weight)
//           cache_p = k, v                out_h = sum_{t <= p} softmax_t(scale * q_h · k_t) v_t,  k, v of head h / G
//           The T = p + 1 keys are split among blocks: each has its largest score m, l = sum exp(score - m) and
//           acc = sum exp(score - m) v; the block that ends last joins them: out = sum e^(m-M) acc / sum e^(m-M) l.
// SOURCE    Dao et al. 2023, flash-decoding; Milakov & Gimelshein 2018 (online softmax), arXiv:1805.02867
// SHAPES    qkv (B, QKV) f32   out (B, NH*HS) f32   k_cache, v_cache (B, NKV, S, HS) floatX   cos, sin (S, HS/2) f32
//           q_weight, k_weight (HS,) floatX   pos (B,) i32   partial (B, NKV, SHARES, SPLITS, HEADS, HS+2) f32
//           ticket (B, NKV, SHARES) i32, SHARES = ceil(G / HEADS): the query heads of a key head go by HEADS
//           append: qkv (T, QKV) floatX, its heads turned already; k_cache, v_cache (NKV, S, HS) of one sequence
// WRITES    out =, k_cache = and v_cache = at position pos; partial scratch; ticket must be 0 and is 0 afterwards
//           append: positions 0 .. T-1 of k_cache = and v_cache =
// BAKED     HS, NH, NKV, HEADS (<= G), SPLITS, EPS, QK_NORM (0 or 1), FLOATX      RUNTIME  S, T, scale
// LAUNCH    decode_attention  grid (SPLITS, NKV * SHARES, B) block (256)
//           kv_cache_append   grid (ceil(2 * T*NKV*HS/W / 256)) block (256)
// MEMORY    2 T NKV HS s bytes per sequence, SHARES times (from L2 but the first); s = bytes of floatX
// FLOPS     4 T NH HS per sequence: bandwidth bound, and latency bound when short
// NUMERICS  sums in float; keys and values are rounded to floatX as the cache holds them; a key's group and the order
//           of joining depend on T alone, not on B: a sequence has the same bits alone and in a batch. The ticket says
//           who joins, not in which order. bf16: fast exponentials, 2 ulp of a float. What is read before
//           wait_for_previous (pos, the older tokens' keys and values) was there before the step's first kernel, which
//           starts when everything before it has ended
// CONTRACT  contracts/decode_attention-v1.yaml      REFERENCE  apr/reference/attention.py, rope.py, rmsnorm.py
#include "common.cuh"
constexpr int HS = K_HS, NH = K_NH, NKV = K_NKV, SPLITS = K_SPLITS, G = NH / NKV, QKV = (NH + 2 * NKV) * HS;
constexpr int HEADS = K_HEADS, SHARES = (G + HEADS - 1) / HEADS, HALF = HS / 2, BLOCK = 256, WARPS = BLOCK / 32;
constexpr int W = vector_width(HS), VECTORS = HS / W;
__host__ __device__ constexpr int lanes(int n) { return n <= 1 ? 1 : 2 * lanes((n + 1) / 2); }
constexpr int LANES = lanes(VECTORS);                    // lanes that share a key: a power of two
constexpr int KEYS = 32 / LANES, GROUPS = WARPS * KEYS;  // keys at a time of a warp, of the block
constexpr int AT_ONCE = 4;                               // keys at a time of a group
constexpr int SHORTEST = AT_ONCE * GROUPS;               // keys that are worth a block
constexpr float EPS = K_EPS, NONE = -1e30f;              // below every score
static_assert(LANES <= 32, "a head is at most 32 vectors");
using Part = Vec<floatX, W>;

__device__ __forceinline__ float exponential(float x) {
    if constexpr (same_type<floatX, bf16>::value) return __expf(x);
    return expf(x);
}

// A head of this token, normalised (QK_NORM) and turned, into `out` in shared memory; called by one whole warp.
__device__ __forceinline__ void turned(float* out, const f32* head, const floatX* weight, const f32* cos,
                                       const f32* sin, int pos) {
    const int lane = threadIdx.x % 32;
    float rstd = 1.0f;
    if (K_QK_NORM) {
        float sum = 0.0f;
        for (int i = lane; i < HS; i += 32) sum += head[i] * head[i];
        rstd = 1.0f / sqrtf(warp_sum(sum) / HS + EPS);
    }
    for (int i = lane; i < HALF; i += 32) {
        float first = head[i], second = head[i + HALF];
        if (K_QK_NORM) {
            first = first * rstd * to_float(weight[i]);
            second = second * rstd * to_float(weight[i + HALF]);
        }
        const float c = cos[(i64)pos * HALF + i], s = sin[(i64)pos * HALF + i];
        out[i] = first * c - second * s;
        out[i + HALF] = second * c + first * s;
    }
}

// (m, l, acc) joined with another's.
template <int N>
__device__ __forceinline__ void join(float& m, float& l, float (&acc)[N], float m2, float l2, const float (&acc2)[N]) {
    const float top = fmaxf(m, m2), a = exponential(m - top), b = exponential(m2 - top);
    m = top;
    l = l * a + l2 * b;
#pragma unroll
    for (int k = 0; k < N; k++) acc[k] = acc[k] * a + acc2[k] * b;
}

extern "C" __global__ void __launch_bounds__(BLOCK) decode_attention(
    f32* __restrict__ out, f32* partial, i32* ticket, floatX* k_cache, floatX* v_cache, const f32* qkv,
    const floatX* __restrict__ q_weight, const floatX* __restrict__ k_weight, const f32* __restrict__ cos,
    const f32* __restrict__ sin, const i32* pos_of, i32 S, f32 scale) {
    __shared__ float query[HEADS][HS], merged[WARPS][HEADS][HS + 2], key[HS], factor[SPLITS][HEADS];
    __shared__ int last;
    const int split = blockIdx.x, kv = blockIdx.y / SHARES, share = blockIdx.y % SHARES, b = blockIdx.z;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, lane_in = lane % LANES;
    const int heads = G - share * HEADS < HEADS ? G - share * HEADS : HEADS;
    const bool used = lane_in < VECTORS;
    const int pos = pos_of[b], T = pos + 1;
    const int even = (T + SPLITS - 1) / SPLITS, chunk = even > SHORTEST ? even : SHORTEST;
    const int active = (T + chunk - 1) / chunk, begin = split * chunk, end = begin + chunk < T ? begin + chunk : T;
    floatX* keys = k_cache + ((i64)b * NKV + kv) * S * HS;
    floatX* values = v_cache + ((i64)b * NKV + kv) * S * HS;
    Part kt[AT_ONCE], vt[AT_ONCE];
    const auto load = [&](int first) {  // the older tokens' only: the cache holds them since the step before
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int t = first + (u * WARPS + warp) * KEYS + lane / LANES;
            if (t < end && t < pos && used) {
                kt[u] = reinterpret_cast<const Part*>(keys + (i64)t * HS)[lane_in];
                vt[u] = reinterpret_cast<const Part*>(values + (i64)t * HS)[lane_in];
            }
        }
    };
    load(begin);
    let_next_start();
    wait_for_previous();
    if (begin >= T) return;

    const f32* row = qkv + (i64)b * QKV;
    const bool owner = end == T;  // of the new position; each part writes the same bits there
    for (int h = warp; h < heads + owner; h += WARPS)
        if (h < heads)
            turned(query[h], row + (kv * G + share * HEADS + h) * HS, q_weight, cos, sin, pos);
        else
            turned(key, row + (NH + kv) * HS, k_weight, cos, sin, pos);
    __syncthreads();
    if (owner)
        for (int i = threadIdx.x; i < HS; i += BLOCK) {
            keys[(i64)pos * HS + i] = from_float<floatX>(key[i]);
            values[(i64)pos * HS + i] = from_float<floatX>(row[(NH + NKV + kv) * HS + i]);
        }

    float q[HEADS][W], m[HEADS], l[HEADS], acc[HEADS][W];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        m[h] = NONE;
        l[h] = 0.0f;
#pragma unroll
        for (int k = 0; k < W; k++) {
            q[h][k] = used && h < heads ? query[h][lane_in * W + k] * scale : 0.0f;
            acc[h][k] = 0.0f;
        }
    }
    for (int first = begin; first < end; first += GROUPS * AT_ONCE) {  // all lanes of a warp: they exchange sums
        if (first > begin) load(first);
        bool here[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            const int t = first + (u * WARPS + warp) * KEYS + lane / LANES;
            here[u] = t < end && used;
            if (t == pos && used) {
#pragma unroll
                for (int k = 0; k < W; k++) {
                    kt[u].set(k, key[lane_in * W + k]);
                    vt[u].set(k, row[(NH + NKV + kv) * HS + lane_in * W + k]);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float score[AT_ONCE], top = m[h];
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) {
                score[u] = 0.0f;
#pragma unroll
                for (int k = 0; k < W; k++) score[u] += here[u] ? q[h][k] * kt[u][k] : 0.0f;
                score[u] = warp_sum<LANES>(score[u]);
                if (here[u]) top = fmaxf(top, score[u]);
            }
            const float keep = exponential(m[h] - top);
            m[h] = top;
            l[h] *= keep;
#pragma unroll
            for (int k = 0; k < W; k++) acc[h][k] *= keep;
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) {
                if (!here[u]) continue;
                const float p = exponential(score[u] - top);
                l[h] += p;
#pragma unroll
                for (int k = 0; k < W; k++) acc[h][k] += p * vt[u][k];
            }
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {  // the groups of a warp, then the warps
#pragma unroll
        for (int apart = LANES; apart < 32; apart *= 2) {
            float other[W];
#pragma unroll
            for (int k = 0; k < W; k++) other[k] = __shfl_xor_sync(0xffffffffu, acc[h][k], apart);
            const float m2 = __shfl_xor_sync(0xffffffffu, m[h], apart), l2 = __shfl_xor_sync(0xffffffffu, l[h], apart);
            join(m[h], l[h], acc[h], m2, l2, other);
        }
        if (lane < LANES && used) {
#pragma unroll
            for (int k = 0; k < W; k++) merged[warp][h][2 + lane_in * W + k] = acc[h][k];
            if (lane == 0) {
                merged[warp][h][0] = m[h];
                merged[warp][h][1] = l[h];
            }
        }
    }
    __syncthreads();

    const i64 place = ((i64)b * NKV + kv) * SHARES + share;
    f32* mine = partial + (place * SPLITS + split) * HEADS * (HS + 2);
    f32* result = out + ((i64)b * NH + kv * G + share * HEADS) * HS;
    for (int i = threadIdx.x; i < heads * HS; i += BLOCK) {
        const int h = i / HS, c = i % HS;
        float top = NONE, sum = 0.0f, total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, merged[w][h][0]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float e = exponential(merged[w][h][0] - top);
            sum += e * merged[w][h][1];
            total += e * merged[w][h][2 + c];
        }
        if (active == 1) {
            result[i] = total / sum;
            continue;
        }
        mine[h * (HS + 2) + 2 + c] = total;
        if (c == 0) {
            mine[h * (HS + 2)] = top;
            mine[h * (HS + 2) + 1] = sum;
        }
    }
    if (active == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicInc((u32*)ticket + place, active - 1) == active - 1;  // wraps to 0 by itself
    __syncthreads();
    if (!last) return;
    __threadfence();
    const f32* all = partial + place * SPLITS * HEADS * (HS + 2);
    for (int h = warp; h < heads; h += WARPS) {  // what each part counts for
        constexpr int EACH = (SPLITS + 31) / 32;
        float largest = NONE, sum = 0.0f, tops[EACH], sums[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int s = e * 32 + lane;
            tops[e] = s < active ? __ldcg(all + (s * HEADS + h) * (HS + 2)) : NONE;
            sums[e] = s < active ? __ldcg(all + (s * HEADS + h) * (HS + 2) + 1) : 0.0f;
            largest = fmaxf(largest, tops[e]);
        }
        for (int apart = 16; apart > 0; apart /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
        for (int apart = 16; apart > 0; apart /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, apart));
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            tops[e] = exponential(tops[e] - largest);
            sum += tops[e] * sums[e];
        }
        sum = warp_sum(sum);
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (e * 32 + lane < active) factor[e * 32 + lane][h] = tops[e] / sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * HALF; i += BLOCK) {
        const int h = i / HALF, c = i % HALF;
        float first = 0.0f, second = 0.0f;
#pragma unroll 16
        for (int s = 0; s < active; s++) {
            const float2 one = __ldcg(reinterpret_cast<const float2*>(all + (s * HEADS + h) * (HS + 2) + 2) + c);
            first += factor[s][h] * one.x;
            second += factor[s][h] * one.y;
        }
        result[2 * i] = first;
        result[2 * i + 1] = second;
    }
}

extern "C" __global__ void __launch_bounds__(256) kv_cache_append(
    floatX* __restrict__ k_cache, floatX* __restrict__ v_cache, const floatX* __restrict__ qkv, i32 S, i32 T) {
    const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    constexpr int WIDTH = 2 * NKV * VECTORS;  // vectors of keys and values of a token
    if (i >= (i64)T * WIDTH) return;
    const int t = i / WIDTH, head = i % WIDTH / VECTORS, vector = i % VECTORS;
    const Part x = reinterpret_cast<const Part*>(qkv + (i64)t * QKV + NH * HS)[i % WIDTH];
    floatX* cache = head < NKV ? k_cache : v_cache;
    reinterpret_cast<Part*>(cache + ((i64)(head % NKV) * S + t) * HS)[vector] = x;
}
