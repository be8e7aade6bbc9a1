// attention_sm90_backward.cu - attention.cu's gradient for Hopper, as attention_sm90.cu is its forward.
//
// MATH      as in attention.cu, row by row; dq comes first and computes delta, which dkv reads
// SOURCE    as in attention_sm90.cu
// SHAPES    as in attention.cu; tokens, douts: tensor maps of qkv (B, T, QKV) and dout (B, T, NH*HS), boxes of 64 x 64,
//           128 bytes swizzled; rows from T on read as zero
// WRITES    dkv: the key and value columns of dqkv =   dq: the query columns =, delta =
// BAKED     FLOATX (bf16), HS (64, 128), NH, NKV      RUNTIME  B >= 1, T >= 1, scale > 0
// LAUNCH    dkv  grid (ceil(T/128), NKV*S, B)   block (384)   128 keys, 64 per warpgroup, and one that copies; clusters
//                of (1, S, 1): S = 1, or 2 to 8 blocks that share the G query heads of a key head, where there are few
//           dq   grid (min(SMs, ceil(T/64W)*NH*B))   block (128W + 128)   as attention_sm90.cu's forward
//           dynamic shared bytes sizeof(Dkv) + 1024, sizeof(Dq) + 1024
// MEMORY    dkv and dq 2BT(QKV + NH*HS) bytes and what each writes; tiles come mostly from L2: 1 byte per 128 FLOP
// FLOPS     B*NH*HS*T^2 times 4 (dkv), 3 (dq): score and dprob twice, as dq is summed without atomics
// NUMERICS  as in attention.cu: f32 sums in fixed order, ex2.approx, prob and dscore rounded to bf16
// CONTRACT  contracts/attention-v1.yaml      REFERENCE  apr/reference/attention.py
#include "attention_sm90.cuh"
constexpr int DKV_KEYS = 128, DKV_BLOCK = 384, DKV_TAKE = 240, DKV_GIVE = 24;

// dk and dv of a cluster's blocks are added in the order of the blocks, each block adding its part of the keys. `sums`:
// shared memory for 2 * DKV_KEYS rows of HS floats; `first`: the warp's first key; `count` keys exist from `to` on.
DEVICE void add_shares(bf16* to, f32* sums, const f32 (&dk)[HS / 8][4], const f32 (&dv)[HS / 8][4], int first,
                       i32 count, f32 scale) {
    asm volatile("bar.sync 1, 256;" ::: "memory");                         // both warpgroups are done with the tiles
    f32* own = sums + (first + threadIdx.x % 32 / 4) * HS + threadIdx.x % 4 * 2;
    UNROLL for (int i = 0; i < HS / 4; i++) {
        Vec<f32, 2>*k = (Vec<f32, 2>*)(own + i % 2 * 8 * HS + i / 2 * 8), *v = k + DKV_KEYS * HS / 2;
        k->set(0, dk[i / 2][i % 2 * 2]), k->set(1, dk[i / 2][i % 2 * 2 + 1]);
        v->set(0, dv[i / 2][i % 2 * 2]), v->set(1, dv[i / 2][i % 2 * 2 + 1]);
    }
    cluster_barrier();
    const int shares = (int)cluster_blocks(), share = blockIdx.y % shares;
    for (int i = share * 256 + threadIdx.x; i < 2 * DKV_KEYS * HS / 2; i += shares * 256) {
        const int row = i * 2 / HS % DKV_KEYS, column = i * 2 % HS, part = i * 2 / HS / DKV_KEYS;
        f32 a = 0.0f, b = 0.0f;
        for (int s = 0; s < shares; s++) {
            const Vec<f32, 2> x = load_of_block(sums + i * 2, s);
            a += x[0], b += x[1];
        }
        const f32 factor = part == 0 ? scale : 1.0f;
        if (row < count) *(u32*)(to + (i64)row * QKV + part * NKV * HS + column) = pack(a * factor, b * factor);
    }
    cluster_barrier();                                                     // no block ends while another reads from it
}

struct Dkv {
    static constexpr int STAGES = HS == 64 ? 4 : 2;
    Tile<DKV_KEYS> keys, values;
    Tile<64> queries[STAGES], douts[STAGES];
    f32 sums[STAGES][64], means[STAGES][64];                               // lse and delta of a tile's queries
    Pipe<STAGES> pipe;
    u64 loaded;
};

// Rows are keys and columns are queries here, so prob and dscore come out transposed, as left operands of the sums.
extern "C" __global__ void __launch_bounds__(DKV_BLOCK, 1) attention_backward_dkv(
    floatX* __restrict__ dqkv, const __grid_constant__ TensorMap tokens, const __grid_constant__ TensorMap douts,
    const f32* __restrict__ lse, const f32* __restrict__ delta, i32 T, f32 scale) {
    Dkv& shared = shared_layout<Dkv>();
    if (threadIdx.x == 0) {
        shared.pipe.init(1 + 32, 2), barrier_init(&shared.loaded, 1);
        barriers_visible();
    }
    __syncthreads();
    const i32 shares = (i32)cluster_blocks(), share = blockIdx.y % shares;
    const Place at = shares == 1 ? place() : Place{(i32)blockIdx.x, (i32)blockIdx.y / shares, (i32)blockIdx.z};
    const int lane = threadIdx.x % 32, group = threadIdx.x / 128;
    const i32 key0 = at.rank * DKV_KEYS, key_column = (NH + at.head) * HS; // the first keys have the most queries
    Cursor<Dkv::STAGES> c;
    if (group == 2) {
        give_registers<DKV_GIVE>();
        if (threadIdx.x % 128 >= 32) return;
        if (lane == 0) {
            barrier_expect(&shared.loaded, 2 * tile_bytes<DKV_KEYS>);
            copy_tile(shared.keys, tokens, &shared.loaded, key_column, key0, at.batch);
            copy_tile(shared.values, tokens, &shared.loaded, key_column + NKV * HS, key0, at.batch);
        }
        for (i32 head = at.head * G + share; head < (at.head + 1) * G; head += shares)  // of each, from the diagonal on
            for (i32 row0 = key0; row0 < T; row0 += 64, c.next()) {
                u64* full = shared.pipe.full + c.stage;
                shared.pipe.wait_empty(c);
                if (lane == 0) {
                    barrier_expect(full, 2 * tile_bytes<64>);
                    copy_tile(shared.queries[c.stage], tokens, full, head * HS, row0, at.batch);
                    copy_tile(shared.douts[c.stage], douts, full, head * HS, row0, at.batch);
                }
                const i64 stat = ((i64)at.batch * NH + head) * T + row0;
                UNROLL for (int i = lane; i < 64; i += 32) {
                    copy_float(&shared.sums[c.stage][i], lse + stat + i, row0 + i < T);
                    copy_float(&shared.means[c.stage][i], delta + stat + i, row0 + i < T);
                }
                barrier_arrive_after_copies(full);
            }
        return;
    }
    take_registers<DKV_TAKE>();
    const i32 group_key = key0 + group * 64, warp_key = group_key + threadIdx.x % 128 / 32 * 16;
    f32 dk[HS / 8][4] = {}, dv[HS / 8][4] = {}, prob[8][4], ds[8][4];
    u32 p[4][4], d[4][4];
    Cursor<Dkv::STAGES> last;                                              // the tile whose sums may still be under way
    bool pending = false;
    barrier_wait(&shared.loaded, 0);
    for (int head = share; head < G; head += shares)
        for (i32 row0 = key0; row0 < T; row0 += 64, c.next()) {
            shared.pipe.wait_full(c);
            if (row0 + 63 < group_key) {                                   // all queries are before the group's keys
                finish<0>();
                if (pending) shared.pipe.release(last);
                pending = false;
                shared.pipe.release(c);
            } else {
                const auto* sum = (const Vec<f32, 2>*)shared.sums[c.stage] + lane % 4;
                const auto* mean = (const Vec<f32, 2>*)shared.means[c.stage] + lane % 4;
                begin();
                scores(prob, shared.keys, group, shared.queries[c.stage]);
                commit();
                scores(ds, shared.values, group, shared.douts[c.stage]);
                commit();
                finish<2>();
                if (pending) shared.pipe.release(last);
                last = c, pending = true;
                finish<1>(prob);
                mask_later_keys<64, true>(prob, row0 - warp_key);
                UNROLL for (int e = 0; e < 32; e++) {
                    f32& x = prob[e / 4][e % 4];
                    x = exp2_approx(fmaf(x, scale * LOG2E, -LOG2E * sum[e / 4 * 4][e % 2]));
                }
                to_bf16<64>(p, prob);
                begin();
                accumulate<64>(dv, p, shared.douts[c.stage]);
                commit();
                finish<1>(ds);
                UNROLL for (int e = 0; e < 32; e++)                        // queries from T on: dout and dscore are 0
                    ds[e / 4][e % 4] = prob[e / 4][e % 4] * (ds[e / 4][e % 4] - mean[e / 4 * 4][e % 2]);
                to_bf16<64>(d, ds);
                begin();
                accumulate<64>(dk, d, shared.queries[c.stage]);
                commit();
            }
        }
    finish<0>(dv);
    finish<0>(dk);
    bf16* to = dqkv + ((i64)at.batch * T + key0) * QKV + key_column;
    if (shares > 1) {
        add_shares(to, (f32*)&shared, dk, dv, warp_key - key0, T - key0, scale);
        return;
    }
    to += (warp_key - key0) * QKV;
    store_rows<QKV>(to, dk, T - warp_key, scale, scale);
    store_rows<QKV>(to + NKV * HS, dv, T - warp_key, 1.0f, 1.0f);
}

// A quarter of a row of out . dout: the four lanes of a row add theirs.
DEVICE float dot(const bf16* a, const bf16* b) {
    float sum = 0.0f;
    UNROLL for (int i = 0; i < HS / 4; i += VEC) {
        const auto x = *(const Vec<bf16, VEC>*)(a + i), y = *(const Vec<bf16, VEC>*)(b + i);
        UNROLL for (int k = 0; k < VEC; k++) sum += x[k] * y[k];
    }
    return sum;
}

struct Dq {
    static constexpr int STAGES = HS == 64 ? 4 : 3;
    Tile<ROWS> queries, douts;
    Tile<64> keys[STAGES], values[STAGES];
    Pipe<1> rows;
    Pipe<STAGES> pipe;
};

extern "C" __global__ void __launch_bounds__(BLOCK, 1) attention_backward_dq(
    floatX* __restrict__ dqkv, const __grid_constant__ TensorMap tokens, const __grid_constant__ TensorMap douts,
    const f32* __restrict__ lse, f32* __restrict__ delta, const floatX* __restrict__ out,
    const floatX* __restrict__ dout, i32 B, i32 T, f32 scale) {
    Dq& shared = shared_layout<Dq>();
    if (threadIdx.x == 0) {
        shared.rows.init(1, CONSUMERS), shared.pipe.init(1, CONSUMERS);
        barriers_visible();
    }
    __syncthreads();
    const int lane = threadIdx.x % 32, group = threadIdx.x / 128;
    const i32 tiles = (T + ROWS - 1) / ROWS;
    Work w;
    Cursor<1> r;
    Cursor<Dq::STAGES> c;
    if (group == CONSUMERS) {
        give_registers<GIVE>();
        if (threadIdx.x % 128 != 0) return;
        for (i32 turn = 0; take_work(w, turn, tiles, B); turn++, r.next()) {
            const i32 key_column = (NH + w.head / G) * HS;
            shared.rows.wait_empty(r);
            barrier_expect(shared.rows.full, 2 * tile_bytes<ROWS>);
            copy_tile(shared.queries, tokens, shared.rows.full, w.head * HS, w.row0, w.batch);
            copy_tile(shared.douts, douts, shared.rows.full, w.head * HS, w.row0, w.batch);
            for (i32 key0 = 0; key0 < min(w.row0 + ROWS, T); key0 += 64, c.next()) {
                shared.pipe.wait_empty(c);
                barrier_expect(shared.pipe.full + c.stage, 2 * tile_bytes<64>);
                copy_tile(shared.keys[c.stage], tokens, shared.pipe.full + c.stage, key_column, key0, w.batch);
                copy_tile(shared.values[c.stage], tokens, shared.pipe.full + c.stage, key_column + NKV * HS, key0,
                          w.batch);
            }
        }
        return;
    }
    take_registers<TAKE>();
    for (i32 turn = 0; take_work(w, turn, tiles, B); turn++, r.next()) {
        const i32 group_row = w.row0 + group * 64, warp_row = group_row + threadIdx.x % 128 / 32 * 16;
        f32 log2_sum[2] = {}, mean[2] = {}, dq[HS / 8][4] = {}, prob[8][4], ds[8][4];
        u32 d[4][4];
        UNROLL for (int h = 0; h < 2; h++) {                               // lse in units of log 2, and delta
            const i32 row = warp_row + lane / 4 + 8 * h;
            const i64 stat = ((i64)w.batch * NH + w.head) * T + row;
            if (row < T) {
                const i64 first = ((i64)w.batch * T + row) * OUT + w.head * HS + lane % 4 * (HS / 4);
                log2_sum[h] = lse[stat] * LOG2E, mean[h] = dot(out + first, dout + first);
            }
            mean[h] = warp_sum<4>(mean[h]);
            if (row < T && lane % 4 == 0) delta[stat] = mean[h];
        }
        shared.rows.wait_full(r);
        Cursor<Dq::STAGES> last;                                           // the tile whose sum may still be under way
        for (i32 key0 = 0; key0 < min(w.row0 + ROWS, T); key0 += 64, c.next()) {
            shared.pipe.wait_full(c);
            if (key0 <= group_row && group_row < T) {
                begin();
                scores(prob, shared.queries, group, shared.keys[c.stage]);
                commit();
                scores(ds, shared.douts, group, shared.values[c.stage]);
                commit();
                finish<2>();
                if (key0 > 0) shared.pipe.release(last);
                last = c;
                finish<1>(prob);
                mask_later_keys<64, false>(prob, key0 - warp_row);
                UNROLL for (int e = 0; e < 32; e++) {
                    f32& x = prob[e / 4][e % 4];
                    x = exp2_approx(fmaf(x, scale * LOG2E, -log2_sum[e % 4 / 2]));
                }
                finish<0>(ds);
                UNROLL for (int e = 0; e < 32; e++)
                    ds[e / 4][e % 4] = prob[e / 4][e % 4] * (ds[e / 4][e % 4] - mean[e % 4 / 2]);
                to_bf16<64>(d, ds);
                begin();
                accumulate<64>(dq, d, shared.keys[c.stage]);
                commit();
            } else {                                                       // all keys are later, or the rows from T on
                shared.pipe.release(c);
            }
        }
        finish<0>(dq);
        if (group_row < T) shared.pipe.release(last);
        shared.rows.release(r);
        store_rows<QKV>(dqkv + ((i64)w.batch * T + warp_row) * QKV + w.head * HS, dq, T - warp_row, scale, scale);
    }
}
