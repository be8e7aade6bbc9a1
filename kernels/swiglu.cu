// swiglu.cu - the gated activation of the feed-forward layer, and its gradient.
//
// MATH      act = silu(gate) * up        silu(x) = x * sigmoid(x)
//           dup = dact * silu(gate)      dgate = dact * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
// SOURCE    Shazeer 2020, arXiv:2002.05202
// SHAPES    gate_up, dgate_up (N, 2F) floatX: gate in the first F columns, up in the rest   act, dact (N, F) floatX
// WRITES    act =   dgate_up =;  backward writes act again, which forward does not keep. dgate_up may be gate_up, and
//           act may be dact: each thread reads its elements before it writes them
// BAKED     F, FLOATX      RUNTIME  N
// LAUNCH    both: grid (ceil(N*F/W / 256)) block (256)      W = elements of one access
// MEMORY    forward 3NFs bytes, backward 6NFs, s = bytes of floatX
// FLOPS     forward 5NF, backward 11NF, and one exponential and one division each: bandwidth bound
// NUMERICS  float32: expf and correctly rounded division. bf16: the fast ones, 2 ulp of a float
// CONTRACT  contracts/swiglu-v1.yaml      REFERENCE  apr/reference/swiglu.py
#include "common.cuh"
constexpr int F = K_F, W = vector_width(F), VECTORS = F / W;
using Part = Vec<floatX, W>;

__device__ __forceinline__ float sigmoid(float x) {
    if constexpr (same_type<floatX, bf16>::value) return __fdividef(1.0f, 1.0f + __expf(-x));
    return 1.0f / (1.0f + expf(-x));
}

extern "C" __global__ void __launch_bounds__(256) swiglu_forward(
    floatX* __restrict__ act, const floatX* __restrict__ gate_up, i32 N) {
    const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (i64)N * VECTORS) return;
    const i64 n = i / VECTORS, column = i % VECTORS;
    const Part g = reinterpret_cast<const Part*>(gate_up)[n * 2 * VECTORS + column];
    const Part u = reinterpret_cast<const Part*>(gate_up)[n * 2 * VECTORS + VECTORS + column];
    Part a;
#pragma unroll
    for (int k = 0; k < W; k++) a.set(k, g[k] * sigmoid(g[k]) * u[k]);
    reinterpret_cast<Part*>(act)[i] = a;
}

extern "C" __global__ void __launch_bounds__(256) swiglu_backward(
    floatX* dgate_up, floatX* act, const floatX* dact, const floatX* gate_up, i32 N) {
    const i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (i64)N * VECTORS) return;
    const i64 n = i / VECTORS, column = i % VECTORS, gate_at = n * 2 * VECTORS + column, up_at = gate_at + VECTORS;
    const Part g = reinterpret_cast<const Part*>(gate_up)[gate_at];
    const Part u = reinterpret_cast<const Part*>(gate_up)[up_at];
    const Part d = reinterpret_cast<const Part*>(dact)[i];
    Part a, dg, du;
#pragma unroll
    for (int k = 0; k < W; k++) {
        const float s = sigmoid(g[k]), silu = g[k] * s;
        a.set(k, silu * u[k]);
        du.set(k, d[k] * silu);
        dg.set(k, d[k] * u[k] * s * (1.0f + g[k] * (1.0f - s)));
    }
    reinterpret_cast<Part*>(act)[i] = a;
    reinterpret_cast<Part*>(dgate_up)[gate_at] = dg;
    reinterpret_cast<Part*>(dgate_up)[up_at] = du;
}
