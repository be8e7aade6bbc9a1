// decode_linear.cu - the matrix-vector products of decoding, each fused with what surrounds it: weights are read once.
//
// MATH      norm(x) = x * weight / sqrt(mean(x^2) + eps)
//           decode_qkv      out_o = matrix_o · norm(x) + bias_o
//           decode_add      x_o += matrix_o · inp                                    (output and down projections)
//           decode_gate_up  out_f = silu(matrix_f · norm(x)) * (matrix_(F+f) · norm(x)),  F = O / 2
//           decode_head     out_o = matrix_o · norm(x), and each block's largest score of an id below `vocab`
// SHAPES    matrix (O, I) floatX, weight (I,) floatX, bias (O,) floatX; activations are f32: x (B, I), or (B, O) in
//           decode_add, inp (B, I), out (B, O), (B, F) in gate_up; best_score (B, grid) f32, best_id (B, grid) i32
// WRITES    out =, x += (decode_add), best_score =, best_id = (-1: the block has no id below vocab;
//           -2: one of its scores is not a number)
// BAKED     I, O, B, EPS, BLOCK (threads), ROWS (matrix rows per block; in gate_up half of them gate), FLOATX
// RUNTIME   vocab
// LAUNCH    decode_qkv, decode_add, decode_head  grid (ceil(O / ROWS)) block (BLOCK)
//           decode_gate_up                       grid (ceil(O / ROWS)) block (BLOCK), ROWS even
// MEMORY    OIs bytes of weights once, for all B inputs; s = bytes of floatX
// FLOPS     2BOI: bandwidth bound
// NUMERICS  sums in float: a thread's vectors in turn, then the warp, then the warps in turn; a row's sum does not
//           depend on B or ROWS, so a sequence has the same bits alone and in a batch. The norm's factor is applied to
//           the finished sum. bf16: fast exponential and division in silu, 2 ulp of a float
// CONTRACT  contracts/decode_linear-v1.yaml      REFERENCE  apr/reference/linear.py, rmsnorm.py, residual.py, swiglu.py
//
// The weights that a thread needs first are loaded before it waits for the kernel that makes its input: so memory is
// busy while the grid before is still ending.
#include "common.cuh"
constexpr int I = K_I, O = K_O, B = K_B, BLOCK = K_BLOCK, ROWS = K_ROWS, W = vector_width(I), VECTORS = I / W;
constexpr int EACH = (VECTORS + BLOCK - 1) / BLOCK, WARPS = BLOCK / 32;
constexpr float EPS = K_EPS;
using Row = Vec<floatX, W>;
using Input = Vec<f32, W>;

// Weights of one vector column for the block's rows.
struct Weights {
    Row row[ROWS];
    __device__ __forceinline__ void load(const floatX* __restrict__ matrix, const int (&rows)[ROWS], int vector) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (rows[r] < O) row[r] = reinterpret_cast<const Row*>(matrix + (i64)rows[r] * I)[vector];
    }
};

// f32 neighbours: W of them are 32 bytes in bf16, two accesses.
__device__ __forceinline__ Input load_input(const f32* inp, int vector) {
    constexpr int PART = W < 4 ? W : 4;
    Input out;
#pragma unroll
    for (int p = 0; p < W / PART; p++)
        reinterpret_cast<Vec<f32, PART>*>(&out)[p] =
            reinterpret_cast<const Vec<f32, PART>*>(inp)[vector * (W / PART) + p];
    return out;
}

// sums[b][r] of the block's rows with B inputs, the same in every thread of warp 0; `square` the inputs' mean squares.
// With NORM the inputs are multiplied by `weight` on the way. Waits for the kernel before.
template <bool NORM>
__device__ __forceinline__ void products(float (&sums)[B][ROWS], float (&square)[B], const floatX* __restrict__ matrix,
                                         const int (&rows)[ROWS], const f32* inp, const floatX* __restrict__ weight) {
    Weights w;
    Row gain;
    if (threadIdx.x < VECTORS) {
        w.load(matrix, rows, threadIdx.x);
        if (NORM) gain = reinterpret_cast<const Row*>(weight)[threadIdx.x];
    }
    let_next_start();
    wait_for_previous();
#pragma unroll
    for (int b = 0; b < B; b++) {
        square[b] = 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) sums[b][r] = 0.0f;
    }
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int vector = threadIdx.x + e * BLOCK;
        if (vector >= VECTORS) break;
        if (e > 0) {
            w.load(matrix, rows, vector);
            if (NORM) gain = reinterpret_cast<const Row*>(weight)[vector];
        }
#pragma unroll
        for (int b = 0; b < B; b++) {
            Input x = load_input(inp + (i64)b * I, vector);
            if (NORM) {
#pragma unroll
                for (int k = 0; k < W; k++) {
                    square[b] += x[k] * x[k];
                    x.set(k, x[k] * gain[k]);
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int k = 0; k < W; k++) sums[b][r] += w.row[r][k] * x[k];
        }
    }
    __shared__ float partial[WARPS][B][ROWS + 1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int b = 0; b < B; b++) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float sum = warp_sum(sums[b][r]);
            if (lane == 0) partial[warp][b][r] = sum;
        }
        if (NORM) {
            const float sum = warp_sum(square[b]);
            if (lane == 0) partial[warp][b][ROWS] = sum;
        }
    }
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int b = 0; b < B; b++) {
        square[b] = 0.0f;
        for (int other = 0; NORM && other < WARPS; other++) square[b] += partial[other][b][ROWS];
        const float factor = NORM ? 1.0f / sqrtf(square[b] / I + EPS) : 1.0f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float sum = 0.0f;
            for (int other = 0; other < WARPS; other++) sum += partial[other][b][r];
            sums[b][r] = sum * factor;
        }
    }
}

// The element of a small array that a thread wants, without an index that would move the array to memory.
template <int N> __device__ __forceinline__ float element(const float (&values)[N], int wanted) {
    float out = values[0];
#pragma unroll
    for (int i = 1; i < N; i++)
        if (i == wanted) out = values[i];
    return out;
}

__device__ __forceinline__ void block_rows(int (&rows)[ROWS]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) rows[r] = blockIdx.x * ROWS + r;
}

extern "C" __global__ void __launch_bounds__(BLOCK) decode_qkv(
    f32* __restrict__ out, const f32* x, const floatX* __restrict__ matrix, const floatX* __restrict__ weight,
    const floatX* __restrict__ bias) {
    float sums[B][ROWS], square[B];
    int rows[ROWS];
    block_rows(rows);
    products<true>(sums, square, matrix, rows, x, weight);
    const int r = threadIdx.x, o = blockIdx.x * ROWS + r;
    if (r >= ROWS || o >= O) return;
#pragma unroll
    for (int b = 0; b < B; b++)
        out[(i64)b * O + o] = element(sums[b], r) + (bias != nullptr ? to_float(bias[o]) : 0.0f);
}

extern "C" __global__ void __launch_bounds__(BLOCK) decode_add(
    f32* __restrict__ x, const f32* inp, const floatX* __restrict__ matrix) {
    float sums[B][ROWS], square[B];
    int rows[ROWS];
    block_rows(rows);
    products<false>(sums, square, matrix, rows, inp, nullptr);
    const int r = threadIdx.x, o = blockIdx.x * ROWS + r;
    if (r >= ROWS || o >= O) return;
#pragma unroll
    for (int b = 0; b < B; b++) x[(i64)b * O + o] += element(sums[b], r);
}

__device__ __forceinline__ float silu(float x) {
    if constexpr (same_type<floatX, bf16>::value) return x * __fdividef(1.0f, 1.0f + __expf(-x));
    return x / (1.0f + expf(-x));
}

extern "C" __global__ void __launch_bounds__(BLOCK) decode_gate_up(
    f32* __restrict__ out, const f32* x, const floatX* __restrict__ matrix, const floatX* __restrict__ weight) {
    constexpr int F = O / 2, PAIRS = ROWS / 2;
    float sums[B][ROWS], square[B];
    int rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const int f = blockIdx.x * PAIRS + r % PAIRS;
        rows[r] = f >= F ? O : r < PAIRS ? f : F + f;
    }
    products<true>(sums, square, matrix, rows, x, weight);
    const int r = threadIdx.x, f = blockIdx.x * PAIRS + r;
    if (r >= PAIRS || f >= F) return;
#pragma unroll
    for (int b = 0; b < B; b++)
        out[(i64)b * F + f] = silu(element(sums[b], r)) * element(sums[b], r + PAIRS);
}

extern "C" __global__ void __launch_bounds__(BLOCK) decode_head(
    f32* __restrict__ out, f32* __restrict__ best_score, i32* __restrict__ best_id, const f32* x,
    const floatX* __restrict__ matrix, const floatX* __restrict__ weight, const i64* __restrict__ vocab) {
    float sums[B][ROWS], square[B];
    int rows[ROWS];
    block_rows(rows);
    products<true>(sums, square, matrix, rows, x, weight);
    if (threadIdx.x >= 32) return;
    const i64 limit = *vocab;
#pragma unroll
    for (int b = 0; b < B; b++) {
        float best = 0.0f;
        int id = -1;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const int o = blockIdx.x * ROWS + r;
            if (threadIdx.x == r && o < O) out[(i64)b * O + o] = sums[b][r];
            if (o >= limit || o >= O || id == -2) continue;
            if (sums[b][r] != sums[b][r]) id = -2;
            else if (id == -1 || sums[b][r] > best) best = sums[b][r], id = o;
        }
        if (threadIdx.x == 0) {
            best_score[(i64)b * gridDim.x + blockIdx.x] = best;
            best_id[(i64)b * gridDim.x + blockIdx.x] = id;
        }
    }
}
