// attention_f32.cu - causal grouped-query attention in float32, without storing the T x T matrix; and the gradient.
//
// MATH      score_ij = scale * q_i . k_j for j <= i           lse_i = log(sum_j exp(score_ij))
//           prob_ij  = exp(score_ij - lse_i)                  out_i = sum_j prob_ij v_j
//           dprob_ij = dout_i . v_j                           delta_i = dout_i . out_i (= sum_j prob_ij dprob_ij)
//           dscore_ij = prob_ij * (dprob_ij - delta_i)        dq_i = scale * sum_j dscore_ij k_j
//           dk_j = scale * sum_i dscore_ij q_i                dv_j = sum_i prob_ij dout_i     (both over G query heads)
// SOURCE    Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023 (GQA), arXiv:2305.13245; online softmax:
//           Milakov & Gimelshein 2018, arXiv:1805.02867; tiling: Dao 2023 (FlashAttention-2), arXiv:2307.08691
// SHAPES    qkv, dqkv (B, T, QKV) floatX; a row is NH query heads, NKV key heads, NKV value heads of HS: QKV in all
//           out, dout (B, T, NH*HS) floatX   lse, delta (B, NH, T) f32;   query head h uses kv head h/G, G = NH/NKV
// WRITES    forward out = lse =   delta: delta =   dkv: the key and value columns of dqkv =   dq: the query columns =
// BAKED     FLOATX (f32), HS (even, <= 128), NH, NKV      RUNTIME  T >= 1, scale
// LAUNCH    forward  grid (ceil(T/32), NH,  B)   block (128)   32 queries per block
//           delta    grid (ceil(T/16), NH,  B)   block (128)   16 rows per block, 8 lanes per row
//           dkv      grid (ceil(T/32), NKV, B)   block (128)   32 keys per block
//           dq       grid (ceil(T/32), NH,  B)   block (128)   32 queries per block
//           dynamic shared bytes: forward 384*(HS + 4) + 4608, dq 512*(HS + 4) + 4608, dkv 512*(HS + 4) + 9472, delta 0
// MEMORY    at least forward 4BT(QKV + NH*HS), delta 8BT*NH*HS, dkv and dq 4BT(QKV + NH*HS) read and what they write
// FLOPS     B*NH*HS*T^2 times 2 (forward), 4 (dkv), 3 (dq): score and dprob twice, as dq is summed without atomics
// NUMERICS  float products and sums, expf, logf; fixed order of sums (bit-reproducible)
// CONTRACT  contracts/attention-v1.yaml      REFERENCE  apr/reference/attention.py
#include "common.cuh"
#define UNROLL _Pragma("unroll")

constexpr int HS = K_HS, NH = K_NH, NKV = K_NKV, G = NH / NKV, QKV = (NH + 2 * NKV) * HS, OUT = NH * HS;
static_assert(same_type<floatX, f32>::value, "FLOATX is f32 here; attention.cu is for bf16");
static_assert(HS % 2 == 0 && HS >= 2 && HS <= 128, "HS");
static_assert(NH % NKV == 0, "NH is a multiple of NKV");

// A thread has 2 rows and 4 columns of a score tile; LANES threads of one warp share the 2 rows.
constexpr int THREADS = 128, TILE = 32, LANES = 8, ROWS = 2, COLS = TILE / LANES;
constexpr int W = vector_width(HS), UNITS = HS / W;     // a row of a head is UNITS vectors of W floats
constexpr int OWN = (UNITS + LANES - 1) / LANES;        // vectors of each row of an HS-wide sum that a thread holds
constexpr int STRIDE = HS + 4, TILE_SIZE = TILE * STRIDE;
constexpr int SCORE_STRIDE = TILE + 4, SCORE_SIZE = TILE * SCORE_STRIDE;
static_assert(THREADS / LANES * ROWS == TILE, "the threads cover the rows");
using Vector = Vec<f32, W>;

// A block's work. Blocks start in linear order, so the longest (rank 0) of all heads and batches come first.
struct Place { i32 rank, head, batch; };
__device__ __forceinline__ Place place() {
    const u32 linear = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z), heads = gridDim.y * gridDim.z;
    return {(i32)(linear / heads), (i32)(linear % heads % gridDim.y), (i32)(linear % heads / gridDim.y)};
}

// A tile of rows, LENGTH apart, from `first` on; those after the `count` that exist become 0 (0 * garbage may be NaN).
template <int LENGTH>
__device__ __forceinline__ void load_tile(f32* tile, const f32* first, i32 count) {
#pragma unroll 4
    for (int i = threadIdx.x; i < TILE * UNITS; i += THREADS) {
        const int row = i / UNITS, col = i % UNITS * W;
        *(Vector*)(tile + row * STRIDE + col) = row < count ? *(const Vector*)(first + row * LENGTH + col) : Vector{};
    }
}

// The sum of W numbers, by halves.
__device__ __forceinline__ float total_of(f32 (&part)[W]) {
    UNROLL for (int half = W / 2; half > 0; half /= 2)
        UNROLL for (int w = 0; w < half; w++) part[w] += part[w + half];
    return part[0];
}

// s = a . b^T for this thread's 2 rows of a and 4 rows of b, of HS columns: lane, lane + 8, ... W sums side by side:
// one chain of HS additions has twice the error.
__device__ __forceinline__ void multiply_transposed(f32 (&s)[ROWS][COLS], const f32* a, const f32* b) {
    const int row = threadIdx.x / LANES * ROWS, lane = threadIdx.x % LANES;
    f32 part[ROWS * COLS][W] = {};
#pragma unroll 2
    for (int d = 0; d < HS; d += W) {
        Vector x[ROWS], y[COLS];
        UNROLL for (int r = 0; r < ROWS; r++) x[r] = *(const Vector*)(a + (row + r) * STRIDE + d);
        UNROLL for (int c = 0; c < COLS; c++) y[c] = *(const Vector*)(b + (lane + c * LANES) * STRIDE + d);
        UNROLL for (int i = 0; i < ROWS * COLS; i++)
            UNROLL for (int w = 0; w < W; w++) part[i][w] = fmaf(x[i / COLS][w], y[i % COLS][w], part[i][w]);
    }
    UNROLL for (int i = 0; i < ROWS * COLS; i++) s[i / COLS][i % COLS] = total_of(part[i]);
}

// acc += p . tile for this thread's 2 rows and its vectors: lane, lane + 8, ... p goes through `score`, where a row is
// written and read by the lanes of one warp only.
__device__ __forceinline__ void multiply_add(f32 (&acc)[ROWS][OWN][W], const f32 (&p)[ROWS][COLS], const f32* tile,
                                             f32* score) {
    const int row = threadIdx.x / LANES * ROWS, lane = threadIdx.x % LANES;
    __syncwarp();                                            // the last call's reads are over
    UNROLL for (int i = 0; i < ROWS * COLS; i++)
        score[(row + i / COLS) * SCORE_STRIDE + lane + i % COLS * LANES] = p[i / COLS][i % COLS];
    __syncwarp();
#pragma unroll 4
    for (int j = 0; j < TILE; j++) {
        f32 x[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) x[r] = score[(row + r) * SCORE_STRIDE + j];
        UNROLL for (int o = 0; o < OWN; o++) {
            if (UNITS % LANES != 0 && lane + o * LANES >= UNITS) break;
            const Vector y = *(const Vector*)(tile + j * STRIDE + (lane + o * LANES) * W);
            UNROLL for (int i = 0; i < ROWS * W; i++)
                acc[i / W][o][i % W] = fmaf(x[i / W], y[i % W], acc[i / W][o][i % W]);
        }
    }
}

// This thread's part of the block's rows, LENGTH apart, from `first` on = acc * factor; `count` rows exist.
template <int LENGTH> __device__ __forceinline__
void store_rows(f32* first, const f32 (&acc)[ROWS][OWN][W], i32 count, const f32 (&factor)[ROWS]) {
    const int row = threadIdx.x / LANES * ROWS, lane = threadIdx.x % LANES;
    UNROLL for (int i = 0; i < ROWS * OWN; i++) {
        const int r = i / OWN, unit = lane + i % OWN * LANES;
        Vector x;
        UNROLL for (int w = 0; w < W; w++) x.set(w, acc[r][i % OWN][w] * factor[r]);
        if (row + r < count && unit < UNITS) *(Vector*)(first + (i64)(row + r) * LENGTH + unit * W) = x;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) attention_forward(
    floatX* __restrict__ out, f32* __restrict__ lse, const floatX* __restrict__ qkv, i32 T, f32 scale) {
    extern __shared__ __align__(16) f32 shared[];
    f32 *queries = shared, *keys = queries + TILE_SIZE, *values = keys + TILE_SIZE, *score = values + TILE_SIZE;
    const Place at = place();
    const int lane = threadIdx.x % LANES;
    const i32 row0 = ((i32)gridDim.x - 1 - at.rank) * TILE;          // the last queries see the most keys
    const i32 row = row0 + threadIdx.x / LANES * ROWS;
    const i64 token0 = (i64)at.batch * T;
    const f32* key_head = qkv + token0 * QKV + (NH + at.head / G) * HS;
    const float low = __uint_as_float(0xff800000u);                  // -inf

    load_tile<QKV>(queries, qkv + (token0 + row0) * QKV + at.head * HS, T - row0);
    f32 acc[ROWS][OWN][W] = {}, top[ROWS] = {low, low}, total[ROWS] = {};
    for (i32 key0 = 0; key0 <= row0; key0 += TILE) {
        __syncthreads();                                             // the last tiles are no longer read
        load_tile<QKV>(keys, key_head + (i64)key0 * QKV, T - key0);
        load_tile<QKV>(values, key_head + (i64)key0 * QKV + NKV * HS, T - key0);
        __syncthreads();
        f32 s[ROWS][COLS];
        multiply_transposed(s, queries, keys);
        UNROLL for (int r = 0; r < ROWS; r++) {
            float above = top[r];                                    // finite after key 0, which every query sees
            UNROLL for (int c = 0; c < COLS; c++) {
                s[r][c] = key0 + lane + c * LANES > row + r ? low : s[r][c] * scale;
                above = fmaxf(above, s[r][c]);
            }
            UNROLL for (int i = LANES / 2; i > 0; i /= 2) above = fmaxf(above, __shfl_xor_sync(0xffffffffu, above, i));
            const float shrink = expf(top[r] - above);
            float sum = 0.0f;
            UNROLL for (int c = 0; c < COLS; c++) sum += s[r][c] = expf(s[r][c] - above);
            total[r] = total[r] * shrink + sum;                      // over this thread's columns only
            top[r] = above;
            UNROLL for (int i = 0; i < OWN * W; i++) acc[r][i / W][i % W] *= shrink;
        }
        multiply_add(acc, s, values, score);
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
        total[r] = warp_sum<LANES>(total[r]);
        if (lane == 0 && row + r < T) lse[((i64)at.batch * NH + at.head) * T + row + r] = top[r] + logf(total[r]);
        total[r] = 1.0f / total[r];
    }
    store_rows<OUT>(out + (token0 + row0) * OUT + at.head * HS, acc, T - row0, total);
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_delta(
    f32* __restrict__ delta, const floatX* __restrict__ out, const floatX* __restrict__ dout, i32 T) {
    const i32 row = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    const int lane = threadIdx.x % LANES;
    const i64 first = ((i64)blockIdx.z * T + row) * OUT + blockIdx.y * HS;
    f32 part[W] = {};
    for (int c = lane * W; c < HS && row < T; c += LANES * W) {
        const Vector a = *(const Vector*)(out + first + c), b = *(const Vector*)(dout + first + c);
        UNROLL for (int w = 0; w < W; w++) part[w] = fmaf(a[w], b[w], part[w]);
    }
    const float sum = warp_sum<LANES>(total_of(part));
    if (lane == 0 && row < T) delta[((i64)blockIdx.z * NH + blockIdx.y) * T + row] = sum;
}

// Rows are keys and columns are queries here.
extern "C" __global__ void __launch_bounds__(THREADS, 3) attention_backward_dkv(
    floatX* __restrict__ dqkv, const floatX* __restrict__ qkv, const floatX* __restrict__ dout,
    const f32* __restrict__ lse, const f32* __restrict__ delta, i32 T, f32 scale) {
    extern __shared__ __align__(16) f32 shared[];
    f32 *keys = shared, *values = keys + TILE_SIZE, *queries = values + TILE_SIZE, *douts = queries + TILE_SIZE;
    f32 *prob = douts + TILE_SIZE, *dscore = prob + SCORE_SIZE, *stats = dscore + SCORE_SIZE;  // TILE lse, TILE delta
    const Place at = place();
    const int lane = threadIdx.x % LANES;
    const i32 key0 = at.rank * TILE, key = key0 + threadIdx.x / LANES * ROWS;  // the first keys have the most queries
    const i64 token0 = (i64)at.batch * T, column = (NH + at.head) * HS;

    load_tile<QKV>(keys, qkv + (token0 + key0) * QKV + column, T - key0);
    load_tile<QKV>(values, qkv + (token0 + key0) * QKV + column + NKV * HS, T - key0);
    f32 dk[ROWS][OWN][W] = {}, dv[ROWS][OWN][W] = {};
    for (i32 head = at.head * G; head < (at.head + 1) * G; head++) {
        for (i32 row0 = key0; row0 < T; row0 += TILE) {
            __syncthreads();                                         // the last tiles are no longer read
            load_tile<QKV>(queries, qkv + (token0 + row0) * QKV + head * HS, T - row0);
            load_tile<OUT>(douts, dout + (token0 + row0) * OUT + head * HS, T - row0);
            if (threadIdx.x < 2 * TILE) {
                const i32 row = row0 + threadIdx.x % TILE;
                const f32* stat = (threadIdx.x < TILE ? lse : delta) + ((i64)at.batch * NH + head) * T;
                stats[threadIdx.x] = row < T ? stat[row] : 0.0f;
            }
            __syncthreads();
            f32 p[ROWS][COLS], ds[ROWS][COLS];
            multiply_transposed(p, keys, queries);
            multiply_transposed(ds, values, douts);
            UNROLL for (int i = 0; i < ROWS * COLS; i++) {
                const int r = i / COLS, c = i % COLS, query = lane + c * LANES;
                const bool seen = key + r <= row0 + query && row0 + query < T;
                p[r][c] = seen ? expf(p[r][c] * scale - stats[query]) : 0.0f;
                ds[r][c] = p[r][c] * (ds[r][c] - stats[TILE + query]);
            }
            multiply_add(dv, p, douts, prob);
            multiply_add(dk, ds, queries, dscore);
        }
    }
    f32* to = dqkv + (token0 + key0) * QKV + column;
    store_rows<QKV>(to, dk, T - key0, {scale, scale});
    store_rows<QKV>(to + NKV * HS, dv, T - key0, {1.0f, 1.0f});
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) attention_backward_dq(
    floatX* __restrict__ dqkv, const floatX* __restrict__ qkv, const floatX* __restrict__ dout,
    const f32* __restrict__ lse, const f32* __restrict__ delta, i32 T, f32 scale) {
    extern __shared__ __align__(16) f32 shared[];
    f32 *queries = shared, *douts = queries + TILE_SIZE, *keys = douts + TILE_SIZE, *values = keys + TILE_SIZE;
    f32* dscore = values + TILE_SIZE;
    const Place at = place();
    const int lane = threadIdx.x % LANES;
    const i32 row0 = ((i32)gridDim.x - 1 - at.rank) * TILE, row = row0 + threadIdx.x / LANES * ROWS;
    const i64 token0 = (i64)at.batch * T, stat = ((i64)at.batch * NH + at.head) * T + row;
    const f32* key_head = qkv + token0 * QKV + (NH + at.head / G) * HS;

    load_tile<QKV>(queries, qkv + (token0 + row0) * QKV + at.head * HS, T - row0);
    load_tile<OUT>(douts, dout + (token0 + row0) * OUT + at.head * HS, T - row0);
    f32 log_sum[ROWS] = {}, mean[ROWS] = {};                         // lse and delta
    UNROLL for (int r = 0; r < ROWS; r++)
        if (row + r < T) log_sum[r] = lse[stat + r], mean[r] = delta[stat + r];
    f32 dq[ROWS][OWN][W] = {};
    for (i32 key0 = 0; key0 <= row0; key0 += TILE) {
        __syncthreads();                                             // the last tiles are no longer read
        load_tile<QKV>(keys, key_head + (i64)key0 * QKV, T - key0);
        load_tile<QKV>(values, key_head + (i64)key0 * QKV + NKV * HS, T - key0);
        __syncthreads();
        f32 p[ROWS][COLS], ds[ROWS][COLS];
        multiply_transposed(p, queries, keys);
        multiply_transposed(ds, douts, values);
        UNROLL for (int i = 0; i < ROWS * COLS; i++) {
            const int r = i / COLS, c = i % COLS;
            const bool seen = key0 + lane + c * LANES <= row + r && row + r < T;
            ds[r][c] = seen ? expf(p[r][c] * scale - log_sum[r]) * (ds[r][c] - mean[r]) : 0.0f;
        }
        multiply_add(dq, ds, keys, dscore);
    }
    store_rows<QKV>(dqkv + (token0 + row0) * QKV + at.head * HS, dq, T - row0, {scale, scale});
}
