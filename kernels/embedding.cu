// embedding.cu - token ids to rows of the table; and the gradient summed into those rows.
//
// MATH      out_n = weight[ids_n]                       dweight_v += sum over n with ids_n = v of dout_n
// SHAPES    out, dout (N, C) floatX   weight (Vp, C) floatX   dweight (Vp, C) f32   ids, order (N,) i32
//           runs (N+1,) i32: order lists the positions sorted by token (stable); run r is order[runs_r .. runs_r+1),
//           all of one token; runs beyond the last are empty, at N
// WRITES    out =   dweight +=
// BAKED     C, FLOATX      RUNTIME  N
// LAUNCH    both: grid (N) block (128); forward one row per block, backward one run per block
// MEMORY    forward 2NCs + 4N bytes, backward NCs + 8UC + 8N for U different tokens, s = bytes of floatX
// FLOPS     forward 0, backward NC: bandwidth bound
// NUMERICS  a run is summed in float in the order of its positions, by one block: bit-reproducible. Ids are checked
//           on the host; nothing here can be out of range.
// CONTRACT  contracts/embedding-v1.yaml      REFERENCE  apr/reference/embedding.py
#include "common.cuh"
constexpr int C = K_C, BLOCK = 128, W = vector_width(C), VECTORS = C / W;
using Row = Vec<floatX, W>;

extern "C" __global__ void __launch_bounds__(BLOCK) embedding_forward(
    floatX* __restrict__ out, const floatX* __restrict__ weight, const i32* __restrict__ ids, i32 N) {
    const i64 n = blockIdx.x;
    const Row* from = reinterpret_cast<const Row*>(weight + (i64)ids[n] * C);
    Row* to = reinterpret_cast<Row*>(out + n * C);
    for (int i = threadIdx.x; i < VECTORS; i += BLOCK) to[i] = from[i];
}

extern "C" __global__ void __launch_bounds__(BLOCK) embedding_backward(
    f32* __restrict__ dweight, const floatX* __restrict__ dout, const i32* __restrict__ ids,
    const i32* __restrict__ order, const i32* __restrict__ runs, i32 N) {
    const int begin = runs[blockIdx.x], end = runs[blockIdx.x + 1];
    if (begin >= end) return;
    f32* row = dweight + (i64)ids[order[begin]] * C;
    for (int i = threadIdx.x; i < VECTORS; i += BLOCK) {
        float sum[W] = {};
#pragma unroll 1
        for (int at = begin; at < end; at++) {
            const Row d = reinterpret_cast<const Row*>(dout + (i64)order[at] * C)[i];
#pragma unroll
            for (int k = 0; k < W; k++) sum[k] += d[k];
        }
#pragma unroll
        for (int k = 0; k < W; k++) row[i * W + k] += sum[k];
    }
}
