// adamw.cu - AdamW over flat memory: clip, moments, decoupled decay, update, and the copy that the kernels read.
//
// MATH      clip = min(1, max_norm / norm)       g = grad * clip
//           m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
//           master = master - lr * decay * master - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
//           params = round(master)
//           Nothing at all is applied, and t does not count, unless loss and norm are finite.
// SOURCE    Loshchilov & Hutter 2019, arXiv:1711.05101; operations in torch.optim.AdamW's order
// SHAPES    master, m, v, grads (size,) f32; params (size,) floatX; size and decay_end multiples of 8
//           stats (4,) f64: sum of losses, gradient norm, applied (1 or 0), t     step (2,) f64: dloss, lr
//           factors (4,) f32: clip, lr / (1 - beta1^t), sqrt(1 - beta2^t), 1 - lr * decay
// WRITES    prepare: factors =, stats[2] =, stats[3] =      update: master =, m =, v =, params = (params may be null)
// BAKED     FLOATX      RUNTIME  the rest; what changes from step to step is in device memory, so that a graph of the
//           step can be launched again
// LAUNCH    prepare grid (1) block (1)      update grid (ceil(size/8 / 256)) block (256)
//           round grid (ceil(size/256)) block (256): params of weights that were loaded
// MEMORY    update 28 bytes per parameter, 30 with a bf16 copy
// FLOPS     about 15 per parameter: bandwidth bound
// NUMERICS  factors in double, rounded once; the update in float, square root and division rounded correctly
// CONTRACT  contracts/adamw-v1.yaml      REFERENCE  apr/reference/adamw.py
#include "common.cuh"
constexpr int BLOCK = 256, EACH = 2;  // EACH quads of every array, BLOCK apart: a warp's accesses have no gaps
using Quad = Vec<f32, 4>;

extern "C" __global__ void adamw_prepare(
    f32* __restrict__ factors, f64* __restrict__ stats, const f64* __restrict__ step, f64 beta1, f64 beta2, f64 decay,
    f64 max_norm) {
    const f64 norm = stats[1], lr = step[1];
    const bool applied = isfinite(stats[0]) && isfinite(norm);
    const f64 t = stats[3] + (applied ? 1.0 : 0.0);
    stats[2] = applied ? 1.0 : 0.0;
    stats[3] = t;
    factors[0] = (f32)(norm <= max_norm ? 1.0 : max_norm / norm);
    factors[1] = (f32)(lr / (1.0 - pow(beta1, t)));
    factors[2] = (f32)sqrt(1.0 - pow(beta2, t));
    factors[3] = (f32)(1.0 - lr * decay);
}

extern "C" __global__ void __launch_bounds__(BLOCK) adamw_update(
    f32* __restrict__ master, f32* __restrict__ m, f32* __restrict__ v, floatX* __restrict__ params,
    const f32* __restrict__ grads, const f32* __restrict__ factors, const f64* __restrict__ stats, i64 size,
    i64 decay_end, f32 beta1, f32 one_minus_beta1, f32 beta2, f32 one_minus_beta2, f32 eps) {
    const i64 first = (i64)blockIdx.x * (BLOCK * EACH) + threadIdx.x, quads = size / 4;
    Quad g4[EACH], p4[EACH], m4[EACH], v4[EACH];
#pragma unroll
    for (int e = 0; e < EACH; e++) {  // all of them before anything is waited for
        const i64 at = first + e * BLOCK;
        g4[e] = read(reinterpret_cast<const Quad*>(grads) + at, at < quads);
        p4[e] = read(reinterpret_cast<const Quad*>(master) + at, at < quads);
        m4[e] = read(reinterpret_cast<const Quad*>(m) + at, at < quads);
        v4[e] = read(reinterpret_cast<const Quad*>(v) + at, at < quads);
    }
    if (stats[2] == 0.0) return;
    const float clip = factors[0], rate = factors[1], correction2 = factors[2];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
        const i64 at = first + e * BLOCK, i = at * 4;
        if (at >= quads) return;
        const float keep = i < decay_end ? factors[3] : 1.0f;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float g = g4[e][k] * clip;
            const float m_new = beta1 * m4[e][k] + one_minus_beta1 * g;
            const float v_new = beta2 * v4[e][k] + one_minus_beta2 * (g * g);
            const float p = fmaf(-rate, m_new / (sqrtf(v_new) / correction2 + eps), p4[e][k] * keep);
            m4[e].set(k, m_new);
            v4[e].set(k, v_new);
            p4[e].set(k, p);
        }
        write(reinterpret_cast<Quad*>(master) + at, p4[e]);
        write(reinterpret_cast<Quad*>(m) + at, m4[e]);
        write(reinterpret_cast<Quad*>(v) + at, v4[e]);
        Vec<floatX, 4> copy;
        copy.fill([&](int k) { return p4[e][k]; });
        if (params != nullptr) reinterpret_cast<Vec<floatX, 4>*>(params)[at] = copy;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) adamw_round(
    floatX* __restrict__ params, const f32* __restrict__ master, i64 size) {
    const i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x;
    if (i < size) params[i] = from_float<floatX>(master[i]);
}
