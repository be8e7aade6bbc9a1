// attention_sm90.cu - attention.cu's forward for Hopper: wgmma on tiles that TMA brings, a role for each warpgroup.
//
// MATH      as in attention.cu      its gradient: attention_sm90_backward.cu
// SOURCE    as there; roles, registers, turns and the order of products after Shah et al. 2024 (FlashAttention-3),
//           arXiv:2407.08608
// SHAPES    as in attention.cu; tokens: tensor map of qkv (B, T, QKV), boxes of 64 x 64, 128 bytes swizzled; rows from
//           T on read as zero
// WRITES    out =   lse =
// BAKED     FLOATX (bf16), HS (64, 128), NH, NKV      RUNTIME  B >= 1, T >= 1, scale > 0
// LAUNCH    forward  grid (min(SMs, ceil(T/64W)*NH*B))   block (128W + 128)   64W queries at a time: W warpgroups
//           compute, one copies; W = 3 for HS 64, 2 for HS 128; dynamic shared bytes sizeof(Forward) + 1024
// MEMORY    2BT(QKV + NH*HS) bytes; tiles are streamed mostly from L2: 1 byte per 192 FLOP (HS 128: 128)
// FLOPS     2*B*NH*HS*T^2
// NUMERICS  as in attention.cu: f32 sums in fixed order, softmax f32, ex2.approx (2 ulp), prob rounded to bf16
// CONTRACT  contracts/attention-v1.yaml      REFERENCE  apr/reference/attention.py
#include "attention_sm90.cuh"
constexpr int KEYS = 128;                                                  // of a stage

struct Forward {
    static constexpr int STAGES = 2;
    Tile<ROWS> queries;
    Tile<KEYS> keys[STAGES], values[STAGES];
    Pipe<1> q;
    Pipe<STAGES> k, v;
};

extern "C" __global__ void __launch_bounds__(BLOCK, 1) attention_forward(
    floatX* __restrict__ out, f32* __restrict__ lse, const __grid_constant__ TensorMap tokens, i32 B, i32 T,
    f32 scale) {
    Forward& shared = shared_layout<Forward>();
    if (threadIdx.x == 0) {
        shared.q.init(1, CONSUMERS), shared.k.init(1, CONSUMERS), shared.v.init(1, CONSUMERS);
        barriers_visible();
    }
    __syncthreads();
    const int lane = threadIdx.x % 32, group = threadIdx.x / 128;
    const i32 tiles = (T + ROWS - 1) / ROWS;
    Work w;
    Cursor<1> q;
    Cursor<Forward::STAGES> k, v;
    if (group == CONSUMERS) {
        give_registers<GIVE>();
        if (threadIdx.x % 128 != 0) return;
        for (i32 turn = 0; take_work(w, turn, tiles, B); turn++, q.next()) {
            const i32 key_column = (NH + w.head / G) * HS;
            shared.q.wait_empty(q);
            barrier_expect(shared.q.full, tile_bytes<ROWS>);
            copy_tile(shared.queries, tokens, shared.q.full, w.head * HS, w.row0, w.batch);
            for (i32 key0 = (min(w.row0 + ROWS, T) - 1) / KEYS * KEYS; key0 >= 0; key0 -= KEYS, k.next()) {
                shared.k.wait_empty(k);
                barrier_expect(shared.k.full + k.stage, tile_bytes<KEYS>);
                copy_tile(shared.keys[k.stage], tokens, shared.k.full + k.stage, key_column, key0, w.batch);
                shared.v.wait_empty(k);
                barrier_expect(shared.v.full + k.stage, tile_bytes<KEYS>);
                copy_tile(shared.values[k.stage], tokens, shared.v.full + k.stage, key_column + NKV * HS, key0,
                          w.batch);
            }
        }
        return;
    }
    take_registers<TAKE>();
    if (group == CONSUMERS - 1) pass_turn<CONSUMERS>(group);
    for (i32 turn = 0; take_work(w, turn, tiles, B); turn++, q.next()) {
        const i32 group_row = w.row0 + group * 64, warp_row = group_row + threadIdx.x % 128 / 32 * 16;
        i32 key0 = (min(w.row0 + ROWS, T) - 1) / KEYS * KEYS;
        f32 acc[HS / 8][4] = {}, s[KEYS / 8][4], top[2] = {MINUS_INF, MINUS_INF}, total[2] = {}, shrink[2];
        u32 p[KEYS / 16][4];
        const auto softmax = [&] {                                         // s becomes exp(s - top), p the same in bf16
            UNROLL for (int r = 0; r < 2; r++) {
                float above = MINUS_INF;
                UNROLL for (int n = 0; n < KEYS / 8; n++) above = fmaxf(above, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
                above = fmaxf(above, __shfl_xor_sync(0xffffffffu, above, 1));
                above = fmaxf(above, __shfl_xor_sync(0xffffffffu, above, 2));
                above = fmaxf(top[r], above * (scale * LOG2E));            // finite: the first tile has its own key
                shrink[r] = exp2_approx(top[r] - above);
                top[r] = above;
                total[r] *= shrink[r];                                     // a sum over this lane's columns only
                UNROLL for (int e = 0; e < KEYS / 4; e++) {
                    f32& x = s[e / 2][2 * r + e % 2];
                    total[r] += x = exp2_approx(fmaf(x, scale * LOG2E, -above));
                }
            }
        };
        shared.q.wait_full(q);
        // Tiles that are later than all of the group's queries; all tiles where its rows are from T on.
        for (; key0 >= 0 && (key0 > group_row + 63 || group_row >= T); key0 -= KEYS, k.next(), v.next()) {
            take_turn(group), pass_turn<CONSUMERS>(group);
            shared.k.wait_full(k), shared.k.release(k);
            shared.v.wait_full(v), shared.v.release(v);
        }
        if (group_row >= T) {
            shared.q.release(q);
            continue;
        }
        shared.k.wait_full(k);
        take_turn(group);
        begin();
        scores(s, shared.queries, group, shared.keys[k.stage]);
        commit();
        pass_turn<CONSUMERS>(group);
        finish<0>(s);
        shared.k.release(k);
        k.next();
        mask_later_keys<KEYS, false>(s, key0 - warp_row);                  // so are the keys from T on
        softmax();
        to_bf16<KEYS>(p, s);
        for (key0 -= KEYS; key0 >= 0; key0 -= KEYS) {                      // scores of a tile beside values of the last
            shared.k.wait_full(k), shared.v.wait_full(v);
            take_turn(group);
            begin();
            scores(s, shared.queries, group, shared.keys[k.stage]);
            commit();
            accumulate<KEYS>(acc, p, shared.values[v.stage]);
            commit();
            pass_turn<CONSUMERS>(group);
            finish<1>(s);
            shared.k.release(k);
            k.next();
            softmax();
            finish<0>(acc);
            shared.v.release(v);
            v.next();
            UNROLL for (int e = 0; e < HS / 2; e++) acc[e / 4][e % 4] *= shrink[e % 4 / 2];
            to_bf16<KEYS>(p, s);
        }
        shared.q.release(q);
        shared.v.wait_full(v);
        begin();
        accumulate<KEYS>(acc, p, shared.values[v.stage]);
        commit();
        finish<0>(acc);
        shared.v.release(v);
        v.next();
        const i32 row = warp_row + lane / 4;
        UNROLL for (int r = 0; r < 2; r++) {
            total[r] = warp_sum<4>(total[r]);
            if (lane % 4 == 0 && row + 8 * r < T)
                lse[((i64)w.batch * NH + w.head) * T + row + 8 * r] = top[r] / LOG2E + logf(total[r]);
        }
        store_rows<OUT>(out + ((i64)w.batch * T + warp_row) * OUT + w.head * HS, acc, T - warp_row, 1.0f / total[0],
                        1.0f / total[1]);
    }
}
