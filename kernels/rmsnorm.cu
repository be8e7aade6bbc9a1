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
// BAKED     C, EPS, BLOCK (128, 256 or 512), FLOATX      RUNTIME  N
// LAUNCH    forward          grid (ceil(N/ROWS)) block (BLOCK)     ROWS rows per block, THREADS threads to each
//           backward         grid (PARTS)        block (BLOCK)     ROWS rows at a time, part by part in turns
//           weight_backward  grid (ceil(C/32))   block (32, 32)    programmatic: it waits for backward itself
// MEMORY    forward 4NCs + 4N bytes with an update (2NCs without), backward 5NCs + 4N + 4PC, weight_backward 4PC + 8C
// FLOPS     forward 5NC, backward 12NC: bandwidth bound
// NUMERICS  the mean is of the stored (rounded) residual, so that backward sees what forward saw; sums in float in a
//           fixed order (bit-reproducible); division and square root rounded correctly; eps baked as 32-bit float
// CONTRACT  contracts/rmsnorm-v1.yaml      REFERENCE  apr/reference/rmsnorm.py, apr/reference/residual.py
#include "common.cuh"
constexpr int C = K_C, BLOCK = K_BLOCK, W = vector_width(C), VECTORS = C / W;
constexpr int FEW = 4;  // vectors of a row that a thread holds in registers, unless even BLOCK threads are too few
constexpr float EPS = K_EPS;
using Row = Vec<floatX, W>;
using Sums = Vec<f32, W < 4 ? W : 4>;

__host__ __device__ constexpr int row_threads() {
    int threads = 32;
    while (threads < BLOCK && threads * FEW < VECTORS) threads *= 2;
    return threads;
}
constexpr int THREADS = row_threads(), ROWS = BLOCK / THREADS, EACH = (VECTORS + THREADS - 1) / THREADS;

// Which row, and which of its vectors, are this thread's.
struct Place {
    i64 n;
    int lane;
    bool there;  // whether there is such a row
    __device__ __forceinline__ Place(i64 first, i32 N)
        : n(first + threadIdx.x / THREADS), lane(threadIdx.x % THREADS), there(n < N) {}
    __device__ __forceinline__ int vector(int e) const { return lane + e * THREADS; }
    __device__ __forceinline__ bool has(int e) const { return there && vector(e) < VECTORS; }
    __device__ __forceinline__ i64 at(int e) const { return n * VECTORS + vector(e); }
};

// Make the compiler forget what it has computed of these bf16, which would take twice their registers or more:
// `nothing` is 0, and it cannot know that.
__device__ __forceinline__ void forget(Row& row, u32 nothing) {
    if constexpr (sizeof(Row) == 16 && sizeof(floatX) == 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) reinterpret_cast<u32*>(&row)[i] ^= nothing;
    }
}

// A vector of the weight, from the cache each time: the compiler would keep all of them in registers.
__device__ __forceinline__ Row weight_again(const floatX* __restrict__ weight, int i) {
    Row out;
    if constexpr (sizeof(Row) != 16) {
        out = reinterpret_cast<const Row*>(weight)[i];
    } else {
        u32* word = reinterpret_cast<u32*>(&out);
        asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                     : "l"(reinterpret_cast<const Row*>(weight) + i));
    }
    return out;
}

extern "C" __global__ void __launch_bounds__(BLOCK) rmsnorm_forward(
    floatX* __restrict__ out, f32* __restrict__ rstd, floatX* __restrict__ residual, const floatX* __restrict__ inp,
    const floatX* __restrict__ update, const floatX* __restrict__ weight, i32 N) {
    const Place row((i64)blockIdx.x * ROWS, N);
    Row x[EACH], u[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {  // all of the row before anything is waited for
        x[e] = read(reinterpret_cast<const Row*>(inp) + row.at(e), row.has(e));
        if (update != nullptr) u[e] = read(reinterpret_cast<const Row*>(update) + row.at(e), row.has(e));
    }
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        if (update != nullptr) {
            x[e].fill([&](int k) { return x[e][k] + u[e][k]; });
            if (row.has(e)) write(reinterpret_cast<Row*>(residual) + row.at(e), x[e]);
        }
#pragma unroll
        for (int k = 0; k < W; k++) sum += x[e][k] * x[e][k];
    }
    const float r = 1.0f / sqrtf(block_sum<BLOCK, THREADS>(sum) / C + EPS);
    if (row.there && row.lane == 0) rstd[row.n] = r;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        if (!row.has(e)) continue;
        const Row w = reinterpret_cast<const Row*>(weight)[row.vector(e)];
        Row o;
        o.fill([&](int k) { return x[e][k] * r * w[k]; });
        write(reinterpret_cast<Row*>(out) + row.at(e), o);
    }
}

// The block's row of partial: the sums of its ROWS rows of threads, added in order.
__device__ __forceinline__ void write_partial(f32* __restrict__ partial, float (&dweight)[EACH][W]) {
    const int lane = threadIdx.x % THREADS, row = threadIdx.x / THREADS;
    if constexpr (ROWS > 1) {
        __shared__ float others[EACH][W][THREADS];
        for (int other = 1; other < ROWS; other++) {
            __syncthreads();
#pragma unroll
            for (int e = 0; e < EACH; e++)
#pragma unroll
                for (int k = 0; k < W; k++)
                    if (row == other) others[e][k][lane] = dweight[e][k];
            __syncthreads();
#pragma unroll
            for (int e = 0; e < EACH; e++)
#pragma unroll
                for (int k = 0; k < W; k++)
                    if (row == 0) dweight[e][k] += others[e][k][lane];
        }
    }
    constexpr int WIDTH = sizeof(Sums) / sizeof(f32);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const int i = lane + e * THREADS;
        if (row > 0 || i >= VECTORS) continue;
#pragma unroll
        for (int part = 0; part < W / WIDTH; part++) {
            Sums sums;
#pragma unroll
            for (int k = 0; k < WIDTH; k++) sums.set(k, dweight[e][part * WIDTH + k]);
            reinterpret_cast<Sums*>(partial + (i64)blockIdx.x * C + i * W)[part] = sums;
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 512 / BLOCK) rmsnorm_backward(
    floatX* dinp, floatX* __restrict__ out, f32* __restrict__ partial, const floatX* __restrict__ dout,
    const floatX* dresidual, const floatX* __restrict__ inp, const floatX* __restrict__ weight,
    const f32* __restrict__ rstd, i32 N) {
    let_next_start();
    const u32 nothing = (u32)N >> 31;
    const bool skips = dresidual != nullptr;
    float dweight[EACH][W] = {};
    for (i64 first = (i64)blockIdx.x * ROWS; first < N; first += (i64)gridDim.x * ROWS) {
        const Place row(first, N);
        Row x[EACH], d[EACH], skip[EACH];
#pragma unroll
        for (int e = 0; e < EACH; e++) {  // all of the row before anything is waited for
            x[e] = read(reinterpret_cast<const Row*>(inp) + row.at(e), row.has(e));
            d[e] = read(reinterpret_cast<const Row*>(dout) + row.at(e), row.has(e));
            skip[e] = read(reinterpret_cast<const Row*>(dresidual) + row.at(e), skips && row.has(e));
        }
        const float r = row.there ? rstd[row.n] : 0.0f;
        float sum = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const Row w = weight_again(weight, min(row.vector(e), VECTORS - 1));
#pragma unroll
            for (int k = 0; k < W; k++) sum += d[e][k] * w[k] * (x[e][k] * r);
        }
        const float mean = block_sum<BLOCK, THREADS>(sum) / C;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            forget(x[e], nothing);
            forget(d[e], nothing);
            if (!row.has(e)) continue;
            const Row w = weight_again(weight, row.vector(e));
#pragma unroll
            for (int k = 0; k < W; k++) dweight[e][k] += d[e][k] * (x[e][k] * r);
            Row o, din;
            o.fill([&](int k) { return x[e][k] * r * w[k]; });
            din.fill([&](int k) { return skip[e][k] + r * (d[e][k] * w[k] - x[e][k] * r * mean); });
            write(reinterpret_cast<Row*>(out) + row.at(e), o);
            write(reinterpret_cast<Row*>(dinp) + row.at(e), din);
        }
    }
    write_partial(partial, dweight);
}

extern "C" __global__ void __launch_bounds__(1024) rmsnorm_weight_backward(
    f32* __restrict__ dweight, const f32* __restrict__ partial, i32 parts) {
    wait_for_previous();
    add_parts(dweight, partial, parts, C, C);
}
