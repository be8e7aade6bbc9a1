// attention_sm90.cuh - of what attention_sm90.cu's kernels are made: stages of tiles, products of tiles, turns.
#ifndef APR_ATTENTION_SM90_CUH
#define APR_ATTENTION_SM90_CUH
#include "attention.cuh"
#include "hopper.cuh"
static_assert(HS == 64 || HS == 128, "HS");
constexpr int SLABS = HS / SLAB, PANEL = 64 * SLAB;        // slabs of a head; elements of 64 rows of one
constexpr int CONSUMERS = HS == 64 ? 3 : 2, ROWS = 64 * CONSUMERS, BLOCK = 128 * CONSUMERS + 128;  // forward, dq
constexpr int TAKE = HS == 64 ? 160 : 240, GIVE = HS == 64 ? 32 : 24;     // registers of a thread that computes, copies
extern __shared__ u64 dynamic[];

// A pipeline's place: which stage, and the phase of its barriers.
template <int STAGES> struct Cursor {
    int stage = 0;
    u32 phase = 0;
    DEVICE void next() { if (++stage == STAGES) stage = 0, phase ^= 1; }
};

// STAGES tiles come and go: `full` when one has come, `empty` when every consumer thread is done with it. Each arrives
// itself: a lane that arrives for its warp says nothing of what the others have read, as racecheck sees it.
template <int STAGES> struct Pipe {
    u64 full[STAGES], empty[STAGES];
    DEVICE void init(u32 arrivals, int consumers) {
        UNROLL for (int i = 0; i < STAGES; i++)
            barrier_init(full + i, arrivals), barrier_init(empty + i, 128 * consumers);
    }
    DEVICE void wait_full(const Cursor<STAGES>& c) { barrier_wait(full + c.stage, c.phase); }
    DEVICE void wait_empty(const Cursor<STAGES>& c) { barrier_wait(empty + c.stage, c.phase ^ 1); }
    DEVICE void release(const Cursor<STAGES>& c) { barrier_arrive(empty + c.stage); }
};

template <int N> struct Tile { bf16 panel[SLABS][N / 64][PANEL]; };     // N rows of a head
// N rows from row0 on of the head that begins at `column` of a map
template <int N> DEVICE void copy_tile(Tile<N>& to, const TensorMap& map, u64* full, i32 column, i32 row0, i32 batch) {
    UNROLL for (int i = 0; i < SLABS * (N / 64); i++)
        copy_box(to.panel[i % SLABS][i / SLABS], map, full, column + i % SLABS * SLAB, row0 + i / SLABS * 64, batch);
}
template <int N> constexpr u32 tile_bytes = N * HS * 2;

// s (64, N) = the warpgroup's 64 rows of a tile . tile^T, over HS
template <int M, int N> DEVICE void scores(f32 (&s)[N / 8][4], const Tile<M>& rows, int group, const Tile<N>& tile) {
    const u64 a = describe(rows.panel[0][group], M * SLAB_ROW), b = describe(&tile, N * SLAB_ROW);
    UNROLL for (int k = 0; k < HS / 16; k++)
        by_row(s, at_bytes(a, k / 4 * (M * SLAB_ROW) + k % 4 * 32),
               at_bytes(b, k / 4 * (N * SLAB_ROW) + k % 4 * 32), k > 0);
}
// acc (64, HS) += p (64, N) . tile
template <int N> DEVICE void accumulate(f32 (&acc)[HS / 8][4], const u32 (&p)[N / 16][4], const Tile<N>& tile) {
    const u64 b = describe(&tile, N * SLAB_ROW);
    UNROLL for (int k = 0; k < N / 16; k++) by_column(acc, p[k], at_bytes(b, k * 16 * SLAB_ROW));
}
// Results lie as a left operand wants them.
template <int N> DEVICE void to_bf16(u32 (&p)[N / 16][4], const f32 (&s)[N / 8][4]) {
    UNROLL for (int i = 0; i < N / 4; i++) p[i / 4][i % 4] = pack(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
}

// The first address of dynamic shared memory that swizzled tiles may start at.
template <class Layout> DEVICE Layout& shared_layout() {
    return *(Layout*)(((u64)dynamic + 1023) & ~1023ull);
}

// The warpgroups queue their products in turn, so that one computes on its scores while another multiplies.
DEVICE void take_turn(int group) { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
template <int GROUPS> DEVICE void pass_turn(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(group + 1 == GROUPS ? 1 : 2 + group) : "memory");
}

// What a block of forward and dq does in its turn: the last queries, which see the most keys, come first, and every
// other turn goes through the blocks backwards, so that each gets about as much. False: nothing is left.
struct Work { i32 row0, head, batch; };
DEVICE bool take_work(Work& w, i32 turn, i32 tiles, i32 B) {
    const i32 i = turn * (i32)gridDim.x + (i32)(turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x), heads = NH * B;
    w = {(tiles - 1 - i / heads) * ROWS, i % heads % NH, i % heads / NH};
    return i < tiles * heads;
}

#endif
