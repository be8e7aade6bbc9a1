// attention.cuh - what the attention kernels of bf16 share: sizes, the order of work, the mask, how rows are stored.
//
// A warp's 16 rows of N columns lie in registers as mma.sync and wgmma leave them: element e of lane l of x[n] is in
// row l/4 + e/2*8 and column n*8 + l%4*2 + e%2.
#ifndef APR_ATTENTION_CUH
#define APR_ATTENTION_CUH
#include "common.cuh"
#define UNROLL _Pragma("unroll")
#define DEVICE __device__ __forceinline__
#define MINUS_INF __uint_as_float(0xff800000u)
constexpr int HS = K_HS, NH = K_NH, NKV = K_NKV, G = NH / NKV, QKV = (NH + 2 * NKV) * HS, OUT = NH * HS;
constexpr float LOG2E = 1.4426950408889634f;     // exp(x) = exp2(x * LOG2E)
static_assert(same_type<floatX, bf16>::value, "FLOATX is bf16 here; attention_f32.cu is for f32");
static_assert(NH % NKV == 0 && QKV > OUT, "NH, NKV");

// A block's work. Blocks start in linear order, so the longest (rank 0) of all heads and batches come first.
struct Place { i32 rank, head, batch; };
DEVICE Place place() {
    const u32 linear = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z), heads = gridDim.y * gridDim.z;
    return {(i32)(linear / heads), (i32)(linear % heads % gridDim.y), (i32)(linear % heads / gridDim.y)};
}

// Four 8x8 matrices, lane l gives the address of row l%8 of matrix l/8.
DEVICE void load_matrices(u32 (&r)[4], const bf16* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}

// score = -inf where the key is later than the query. `ahead`: the first column of s less its first row.
template <int N, bool KEY_ROWS> DEVICE void mask_later_keys(f32 (&s)[N / 8][4], i32 ahead) {
    if (KEY_ROWS ? ahead >= 15 : ahead <= 1 - N) return;                   // away from the diagonal
    ahead += (i32)(threadIdx.x % 4 * 2) - (i32)(threadIdx.x % 32 / 4);
    UNROLL for (int i = 0; i < N / 2; i++) {
        const i32 distance = ahead + i / 4 * 8 + i % 2 - i % 4 / 2 * 8;
        if (KEY_ROWS ? distance < 0 : distance > 0) s[i / 4][i % 4] = MINUS_INF;
    }
}

// The warp's rows = acc * factor (low of its rows 0..7, high of 8..15); `count` of them exist
template <int LENGTH>
DEVICE void store_rows(bf16* first, const f32 (&acc)[HS / 8][4], i32 count, f32 low, f32 high) {
    const int row = threadIdx.x % 32 / 4;
    bf16* to = first + row * LENGTH + threadIdx.x % 4 * 2;
    UNROLL for (int n = 0; n < HS / 8; n++) {
        if (row < count) *(u32*)(to + n * 8) = pack(acc[n][0] * low, acc[n][1] * low);
        if (row + 8 < count) *(u32*)(to + 8 * LENGTH + n * 8) = pack(acc[n][2] * high, acc[n][3] * high);
    }
}

#endif
