// attention.cu - causal grouped-query attention on bf16 tensor cores, without storing the T x T matrix; the gradient.
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
// BAKED     FLOATX (bf16), HS (32, 64, 80, 96, 128), NH, NKV      RUNTIME  T >= 1, scale > 0
// LAUNCH    forward  grid (ceil(T/128), NH,  B)   block (256)   128 queries per block, 16 per warp
//           delta    grid (ceil(T/16),  NH,  B)   block (128)   16 rows per block, 8 lanes per row
//           dkv      grid (ceil(T/64),  NKV, B)   block (128)   64 keys per block, 16 per warp
//           dq       grid (ceil(T/64),  NH,  B)   block (128)   64 queries per block, 16 per warp
//           dynamic shared bytes: forward, dq 512*(HS + 8); dkv 512*(HS + 8) + 1024; delta 0
// MEMORY    bytes: forward 2BT(QKV + NH*HS), delta 4BT*NH*HS, dkv and dq 2BT(QKV + NH*HS) and what each writes;
//           the tiles are streamed mostly from L2: 1 byte per 128 FLOP (dq 96)
// FLOPS     B*NH*HS*T^2 times 2 (forward), 4 (dkv), 3 (dq): score and dprob twice, as dq is summed without atomics
// NUMERICS  f32 sums in fixed order (bit-reproducible); softmax f32, ex2.approx (2 ulp); prob, dscore rounded to bf16
// CONTRACT  contracts/attention-v1.yaml      REFERENCE  apr/reference/attention.py
#include "attention.cuh"
static_assert(HS == 32 || HS == 64 || HS == 80 || HS == 96 || HS == 128, "HS");
constexpr int TILE = 64;                         // rows of a shared tile: the keys or the queries that a block streams
constexpr int STRIDE = HS + 8;                   // an odd number of 16-byte units: no bank conflicts in ldmatrix
constexpr int STAGE = 2 * TILE * STRIDE;         // two tiles that are used together; two stages, one filled meanwhile
constexpr int FORWARD_ROWS = 128, FORWARD_THREADS = 256, THREADS = 128, DELTA_LANES = 8;
constexpr int DKV_SUB = HS > 96 ? 16 : HS > 64 ? 32 : 64, DQ_SUB = HS > 96 ? 16 : 32;  // score columns in registers
static_assert(FORWARD_ROWS == 2 * TILE && THREADS == 2 * TILE && STRIDE / 8 % 2 == 1, "tiles");
extern __shared__ __align__(16) bf16 shared[];

// Copies 16 bytes or 4 in the background; writes zeros and reads nothing if not inside.
template <int BYTES> DEVICE void copy(void* to, const void* p, bool inside) {
    const u32 a = shared_address(to), n = inside ? BYTES : 0;
    if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(a), "l"(p), "r"(n) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(a), "l"(p), "r"(n) : "memory");
}
// After this the block's copies have landed, and all its threads are done with what they read before.
DEVICE void copy_barrier() { asm volatile("cp.async.wait_all;" ::: "memory"); __syncthreads(); }

// As load_matrices, each matrix transposed.
DEVICE void load_transposed(u32 (&r)[4], const bf16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

// c (16, 8) += a (16, 16) . b (16, 8). Element e of lane l is in row l/4 + e/2*8 and column l%4*2 + e%2 of c.
DEVICE void mma(f32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a (16, HS) = the warp's rows of a tile, as left operand
DEVICE void load_rows(u32 (&a)[HS / 16][4], const bf16* tile) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    tile += (warp * 16 + lane % 16) * STRIDE + lane / 16 * 8;
    UNROLL for (int k = 0; k < HS / 16; k++) load_matrices(a[k], tile + k * 16);
}

// s (16, N) += a (16, HS) . tile (N, HS)^T
template <int N> DEVICE void multiply_transposed(f32 (&s)[N / 8][4], const u32 (&a)[HS / 16][4], const bf16* tile) {
    const int lane = threadIdx.x % 32;
    tile += (lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8;
    UNROLL for (int i = 0; i < HS / 16 * (N / 16); i++) {
        const int k = i / (N / 16), n = i % (N / 16);
        u32 b[4];
        load_matrices(b, tile + n * 16 * STRIDE + k * 16);
        mma(s[2 * n], a[k], b[0], b[1]);
        mma(s[2 * n + 1], a[k], b[2], b[3]);
    }
}

// acc (16, HS) += p (16, K) . tile (K, HS). Results of mma lie as its left operand wants them: p stays in registers.
template <int K> DEVICE void multiply_add(f32 (&acc)[HS / 8][4], const f32 (&p)[K / 8][4], const bf16* tile) {
    tile += threadIdx.x % 16 * STRIDE + threadIdx.x % 32 / 16 * 8;
    UNROLL for (int k = 0; k < K / 16; k++) {
        u32 a[4];
        UNROLL for (int i = 0; i < 4; i++) a[i] = pack(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]);
        UNROLL for (int n = 0; n < HS / 16; n++) {
            u32 b[4];
            load_transposed(b, tile + k * 16 * STRIDE + n * 16);
            mma(acc[2 * n], a, b[0], b[1]);
            mma(acc[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// A tile of rows, LENGTH apart, from `first` on; those after the `count` that exist become 0 (0 * garbage may be NaN).
template <int LENGTH, int BLOCK = THREADS, int ROWS = TILE>
DEVICE void load_tile(bf16* tile, const bf16* first, i32 count) {
    UNROLL for (int i = threadIdx.x; i < ROWS * (HS / 8); i += BLOCK) {
        const int row = i / (HS / 8), col = i % (HS / 8) * 8;
        copy<16>(tile + row * STRIDE + col, first + row * LENGTH + col, row < count);
    }
}

// Both tiles of a stage, from row0 on; a (of qkv) and b (of qkv or dout) are row 0 of their heads.
template <int LENGTH, int BLOCK = THREADS>
DEVICE void load_stage(bf16* stage, const bf16* a, const bf16* b, i32 row0, i32 T) {
    load_tile<QKV, BLOCK>(stage, a + (i64)row0 * QKV, T - row0);
    load_tile<LENGTH, BLOCK>(stage + TILE * STRIDE, b + (i64)row0 * LENGTH, T - row0);
}

extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, HS <= 64 ? 2 : 1)
attention_forward(floatX* __restrict__ out, f32* __restrict__ lse, const floatX* __restrict__ qkv, i32 T, f32 scale) {
    const Place at = place();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i32 row0 = ((i32)gridDim.x - 1 - at.rank) * FORWARD_ROWS;        // the last queries see the most keys
    const i32 warp_row = row0 + warp * 16, row = warp_row + lane / 4;      // this lane's rows are row and row + 8
    const bf16* tokens = qkv + (i64)at.batch * T * QKV;
    const bf16 *keys = tokens + (NH + at.head / G) * HS, *values = keys + NKV * HS;
    load_tile<QKV, FORWARD_THREADS, FORWARD_ROWS>(shared + STAGE, tokens + (i64)row0 * QKV + at.head * HS, T - row0);
    load_stage<QKV, FORWARD_THREADS>(shared, keys, values, 0, T);
    copy_barrier();
    u32 queries[HS / 16][4];
    load_rows(queries, shared + STAGE);                                    // the next barrier frees the second stage
    f32 acc[HS / 8][4] = {}, top[2] = {MINUS_INF, MINUS_INF}, total[2] = {};
    for (i32 key0 = 0, stage = 0, end = min(row0 + FORWARD_ROWS, T); key0 < end; key0 += TILE, stage = STAGE - stage) {
        copy_barrier();
        if (key0 + TILE < end) load_stage<QKV, FORWARD_THREADS>(shared + STAGE - stage, keys, values, key0 + TILE, T);
        if (key0 > warp_row + 15) continue;                                // all keys are later than the warp's queries
        f32 s[TILE / 8][4] = {};
        multiply_transposed<TILE>(s, queries, shared + stage);
        mask_later_keys<TILE, false>(s, key0 - warp_row);                  // so are the keys from T on
        UNROLL for (int r = 0; r < 2; r++) {
            float above = MINUS_INF;
            UNROLL for (int n = 0; n < TILE / 8; n++) above = fmaxf(above, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            above = fmaxf(above, __shfl_xor_sync(0xffffffffu, above, 1));
            above = fmaxf(above, __shfl_xor_sync(0xffffffffu, above, 2));
            above = fmaxf(top[r], above * (scale * LOG2E));               // finite, since every query sees key 0
            const float shrink = exp2_approx(top[r] - above);
            top[r] = above;
            total[r] *= shrink;                                            // a sum over this lane's columns only
            UNROLL for (int i = 0; i < TILE / 4; i++)
                total[r] += s[i / 2][2 * r + i % 2] = exp2_approx(fmaf(s[i / 2][2 * r + i % 2], scale * LOG2E, -above));
            UNROLL for (int i = 0; i < HS / 4; i++) acc[i / 2][2 * r + i % 2] *= shrink;
        }
        multiply_add<TILE>(acc, s, shared + stage + TILE * STRIDE);
    }
    UNROLL for (int r = 0; r < 2; r++) {
        total[r] = warp_sum<4>(total[r]);
        if (lane % 4 == 0 && row + 8 * r < T)
            lse[((i64)at.batch * NH + at.head) * T + row + 8 * r] = top[r] / LOG2E + logf(total[r]);
    }
    store_rows<OUT>(out + ((i64)at.batch * T + warp_row) * OUT + at.head * HS, acc, T - warp_row,
                    1.0f / total[0], 1.0f / total[1]);
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_delta(
    f32* __restrict__ delta, const floatX* __restrict__ out, const floatX* __restrict__ dout, i32 T) {
    const i32 row = blockIdx.x * (THREADS / DELTA_LANES) + threadIdx.x / DELTA_LANES, lane = threadIdx.x % DELTA_LANES;
    const i64 first = ((i64)blockIdx.z * T + row) * OUT + blockIdx.y * HS;
    float sum = 0.0f;
    for (int c = lane * VEC; c < HS && row < T; c += DELTA_LANES * VEC) {
        const auto a = *(const Vec<floatX, VEC>*)(out + first + c), b = *(const Vec<floatX, VEC>*)(dout + first + c);
        UNROLL for (int i = 0; i < VEC; i++) sum += a[i] * b[i];
    }
    sum = warp_sum<DELTA_LANES>(sum);
    if (lane == 0 && row < T) delta[((i64)blockIdx.z * NH + blockIdx.y) * T + row] = sum;
}

// Rows are keys and columns are queries here, so prob and dscore come out transposed, as left operands of the sums.
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_dkv(
    floatX* __restrict__ dqkv, const floatX* __restrict__ qkv, const floatX* __restrict__ dout,
    const f32* __restrict__ lse, const f32* __restrict__ delta, i32 T, f32 scale) {
    f32* stats = (f32*)(shared + 2 * STAGE);                               // two stages of TILE lse and TILE delta
    const Place at = place();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i32 key0 = at.rank * TILE, warp_key = key0 + warp * 16;          // the first keys have the most queries
    const bf16 *tokens = qkv + (i64)at.batch * T * QKV, *key_head = tokens + (NH + at.head) * HS;
    const auto load_queries = [&](i32 stage, i32 group, i32 row0) {
        const i32 head = at.head * G + group, row = row0 + threadIdx.x % TILE;
        const bf16* dout_head = dout + (i64)at.batch * T * OUT + head * HS;
        load_stage<OUT>(shared + stage * STAGE, tokens + head * HS, dout_head, row0, T);
        const f32* stat = (threadIdx.x < TILE ? lse : delta) + ((i64)at.batch * NH + head) * T;
        copy<4>(stats + stage * 2 * TILE + threadIdx.x, stat + row, row < T);
    };
    load_stage<QKV>(shared + STAGE, key_head, key_head + NKV * HS, key0, T);
    load_queries(0, 0, key0);
    copy_barrier();
    u32 keys[HS / 16][4], values[HS / 16][4];
    load_rows(keys, shared + STAGE);
    load_rows(values, shared + STAGE + TILE * STRIDE);
    f32 dk[HS / 8][4] = {}, dv[HS / 8][4] = {};
    for (i32 row0 = key0, group = 0, stage = 0; group < G; stage ^= 1) {   // each query head, from the diagonal on
        const bool last = row0 + TILE >= T;
        const i32 next_row = last ? key0 : row0 + TILE, next_group = group + last;
        copy_barrier();
        if (next_group < G) load_queries(stage ^ 1, next_group, next_row);
#pragma unroll 1
        for (int sub = 0; sub < TILE; sub += DKV_SUB) {
            if (row0 + sub + DKV_SUB <= warp_key) continue;                // all queries are before the warp's keys
            const bf16* queries = shared + stage * STAGE + sub * STRIDE;
            const auto* stat = (const Vec<f32, 2>*)(stats + stage * 2 * TILE + sub) + lane % 4;
            f32 p[DKV_SUB / 8][4] = {}, ds[DKV_SUB / 8][4] = {};
            multiply_transposed<DKV_SUB>(p, keys, queries);
            multiply_transposed<DKV_SUB>(ds, values, queries + TILE * STRIDE);
            mask_later_keys<DKV_SUB, true>(p, row0 + sub - warp_key);
            UNROLL for (int i = 0; i < DKV_SUB / 2; i++) {                 // queries from T on: dout and dscore are 0
                const auto sum = stat[i / 4 * 4], mean = stat[TILE / 2 + i / 4 * 4];
                float &x = p[i / 4][i % 4], &y = ds[i / 4][i % 4];
                x = exp2_approx(fmaf(x, scale * LOG2E, -LOG2E * sum[i % 2]));
                y = x * (y - mean[i % 2]);
            }
            multiply_add<DKV_SUB>(dv, p, queries + TILE * STRIDE);
            multiply_add<DKV_SUB>(dk, ds, queries);
        }
        row0 = next_row, group = next_group;
    }
    bf16* to = dqkv + ((i64)at.batch * T + warp_key) * QKV + (NH + at.head) * HS;
    store_rows<QKV>(to, dk, T - warp_key, scale, scale);
    store_rows<QKV>(to + NKV * HS, dv, T - warp_key, 1.0f, 1.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS, HS <= 64 ? 4 : 2) attention_backward_dq(
    floatX* __restrict__ dqkv, const floatX* __restrict__ qkv, const floatX* __restrict__ dout,
    const f32* __restrict__ lse, const f32* __restrict__ delta, i32 T, f32 scale) {
    const Place at = place();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const i32 row0 = ((i32)gridDim.x - 1 - at.rank) * TILE, warp_row = row0 + warp * 16, row = warp_row + lane / 4;
    const bf16* tokens = qkv + (i64)at.batch * T * QKV;
    const bf16 *keys = tokens + (NH + at.head / G) * HS, *values = keys + NKV * HS;
    const bf16* dout_head = dout + (i64)at.batch * T * OUT + at.head * HS;
    load_stage<OUT>(shared + STAGE, tokens + at.head * HS, dout_head, row0, T);
    load_stage<QKV>(shared, keys, values, 0, T);
    copy_barrier();
    u32 queries[HS / 16][4], douts[HS / 16][4];
    load_rows(queries, shared + STAGE);
    load_rows(douts, shared + STAGE + TILE * STRIDE);
    f32 log2_sum[2] = {}, mean[2] = {};                                    // lse in units of log 2, and delta
    const i64 stat = ((i64)at.batch * NH + at.head) * T + row;
    UNROLL for (int r = 0; r < 2; r++)
        if (row + 8 * r < T) log2_sum[r] = lse[stat + 8 * r] * LOG2E, mean[r] = delta[stat + 8 * r];
    f32 dq[HS / 8][4] = {};
    for (i32 key0 = 0, stage = 0, end = min(row0 + TILE, T); key0 < end; key0 += TILE, stage = STAGE - stage) {
        copy_barrier();
        if (key0 + TILE < end) load_stage<QKV>(shared + STAGE - stage, keys, values, key0 + TILE, T);
#pragma unroll 1
        for (int sub = 0; sub < TILE; sub += DQ_SUB) {
            if (key0 + sub > warp_row + 15) break;                         // all keys are later than the warp's queries
            const bf16* tile = shared + stage + sub * STRIDE;
            f32 p[DQ_SUB / 8][4] = {}, ds[DQ_SUB / 8][4] = {};
            multiply_transposed<DQ_SUB>(p, queries, tile);
            multiply_transposed<DQ_SUB>(ds, douts, tile + TILE * STRIDE);
            mask_later_keys<DQ_SUB, false>(p, key0 + sub - warp_row);
            UNROLL for (int i = 0; i < DQ_SUB / 2; i++)
                ds[i / 4][i % 4] = exp2_approx(fmaf(p[i / 4][i % 4], scale * LOG2E, -log2_sum[i % 4 / 2])) *
                                   (ds[i / 4][i % 4] - mean[i % 4 / 2]);
            multiply_add<DQ_SUB>(dq, ds, tile);
        }
    }
    store_rows<QKV>(dqkv + ((i64)at.batch * T + warp_row) * QKV + at.head * HS, dq, T - warp_row, scale, scale);
}
