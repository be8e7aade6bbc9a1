// cross_entropy_sm90.cu - cross-entropy and its gradient on Hopper, each row of scores read once: a cluster of blocks
// holds it in shared memory.
//
// MATH      loss_n = log(sum_v exp(logit_nv)) - logit_n,target       dlogit_nv = (softmax_nv - [v = target_n]) * dloss
//           A row whose target is IGNORE has loss 0 and gradient 0, and is not read.
//           bf16: exp(x - maximum) = 2^(x LOG2E - shift), shift = maximum LOG2E rounded; that rounding, which makes the
//           sum larger or smaller by a factor, is taken from the logarithm again and cancels in the softmax.
// SHAPES    logits (N, VP) floatX, of which V columns are scores and the rest padding   targets (N,) i32
//           losses (N,) f32   dloss (1,) f64: 1 / counted targets for the gradient of the mean
// WRITES    losses =   logits = dlogits (forward_backward only; padding becomes 0)
// BAKED     V, VP (a multiple of 128), IGNORE, FLOATX, CLUSTER (1, 2, 4 or 8 blocks)      RUNTIME  N
// LAUNCH    forward, forward_backward  grid (N CLUSTER) block (256), VPs / CLUSTER bytes of dynamic shared memory
// MEMORY    forward NVs bytes, forward_backward 2NVs
// FLOPS     about 8NV, and 2NV exponentials: bandwidth bound
// NUMERICS  maximum and sum in float, in one pass that rescales, fixed order; bf16 logits use the fast exponential, and
//           must be below 2e38. A target that is neither IGNORE nor in [0, V) gives NaN, which the guard sees.
// CONTRACT  contracts/cross_entropy-v1.yaml      REFERENCE  apr/reference/cross_entropy.py
#include "barrier.cuh"
constexpr int V = K_V, VP = K_VP, IGNORE = K_IGNORE, CLUSTER = K_CLUSTER, BLOCK = 256, WARPS = BLOCK / 32;
constexpr int PART = VP / VEC / CLUSTER;  // vectors of a row that a block has
constexpr int STEPS = 2, CHUNK = STEPS * BLOCK, CHUNKS = (PART + CHUNK - 1) / CHUNK;  // a part arrives in chunks
constexpr int FULL = V / VEC;  // vectors of a row before the first with padding
constexpr bool PADDED = V < VP;
constexpr bool FAST = same_type<floatX, bf16>::value;
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr float LOW = -2.3e38f;  // below any score; its product with LOG2E is finite, as differences with it must be
static_assert(VP % (VEC * CLUSTER) == 0, "a row divides into CLUSTER parts of whole vectors");
using Part = Vec<floatX, VEC>;

// What a part of a row has in it: its highest score, and the sum of power(score, shift(highest)).
struct Statistics {
    float highest, sum;
};

// Exponentials are relative to a shift, which comes from a score: rounded here, and never fused with a subtraction, or
// the difference of two equal shifts of LOW would be the rounding, whose exponential is infinite.
__device__ __forceinline__ float shift_of(float score) { return FAST ? __fmul_rn(score, LOG2E) : score; }
__device__ __forceinline__ float power(float score, float shift) {
    return FAST ? exp2_approx(fmaf(score, LOG2E, -shift)) : expf(score - shift);
}
__device__ __forceinline__ float rescale(float from, float to) {
    return FAST ? exp2_approx(from - to) : expf(from - to);
}
// log of the sum of exp(score - highest)
__device__ __forceinline__ float log_sum(const Statistics& s) {
    return FAST ? logf(s.sum) - fmaf(s.highest, LOG2E, -shift_of(s.highest)) * LN2 : logf(s.sum);
}

__device__ __forceinline__ void merge(Statistics& s, float highest, float sum) {
    const float high = fmaxf(s.highest, highest), shift = shift_of(high);
    s.sum = s.sum * rescale(shift_of(s.highest), shift) + sum * rescale(shift_of(highest), shift);
    s.highest = high;
}

// Every lane gets the statistics of all 32, to the same bit.
__device__ __forceinline__ Statistics warp_statistics(const Statistics& s) {
    float high = s.highest;
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, lane));
    return {high, warp_sum(s.sum * rescale(shift_of(s.highest), shift_of(high)))};
}

// Start the copies of this block's part; each chunk tells its barrier. Of one thread.
__device__ __forceinline__ void fetch(Part* part, const Part* from, u64 (&arrived)[CHUNKS]) {
    for (int c = 0; c < CHUNKS; c++) barrier_init(&arrived[c], 1);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copies see the barriers
    for (int c = 0; c < CHUNKS; c++) {
        const u32 bytes = min(CHUNK, PART - c * CHUNK) * (u32)sizeof(Part);
        barrier_expect(&arrived[c], bytes);
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(part + c * CHUNK)),
                     "l"(from + c * CHUNK), "r"(bytes), "r"(shared_address(&arrived[c])) : "memory");
    }
}

__device__ __forceinline__ void say_begun() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void all_have_begun() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Put the statistics into `slot` of the block number `to` of the cluster, whose barrier `gathered` counts the bytes.
__device__ __forceinline__ void send(const Statistics* slot, const u64* gathered, int to, const Statistics& s) {
    asm volatile("{\n.reg .u32 there, barrier;\nmapa.shared::cluster.u32 there, %0, %2;\n"
                 "mapa.shared::cluster.u32 barrier, %1, %2;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%3, %4}, [barrier];\n}" ::"r"(
                     shared_address(slot)), "r"(shared_address(gathered)), "r"(to), "f"(s.highest), "f"(s.sum)
                 : "memory");
}

// Each warp's statistics into its slot of `warps` in every block of the cluster.
__device__ __forceinline__ void gather(Statistics (&warps)[CLUSTER * WARPS], u64* gathered, int rank,
                                       const Statistics& own) {
    const int lane = threadIdx.x % 32, slot = rank * WARPS + threadIdx.x / 32;
    if constexpr (CLUSTER == 1) {
        if (lane == 0) warps[slot] = own;
        __syncthreads();
    } else {
        all_have_begun();
        if (lane < CLUSTER) send(&warps[slot], gathered, lane, own);
        barrier_wait_cluster(gathered, 0);  // and none writes here any more, so this block may end
    }
}

// The statistics of what this thread reads of the block's part, as it arrives. `first`: the part's first vector.
__device__ __forceinline__ Statistics part_statistics(const Part* part, int first, u64 (&arrived)[CHUNKS]) {
    Statistics s = {LOW, 0.0f};
    for (int i = threadIdx.x, step = 0; i < PART; i += BLOCK, step++) {
        if (step % STEPS == 0) barrier_wait(&arrived[step / STEPS], 0);
        const Part scores = part[i];
        float x[VEC], sum = 0.0f;
#pragma unroll
        for (int k = 0; k < VEC; k++) x[k] = scores[k];
        if (PADDED && first + i >= FULL)
#pragma unroll
            for (int k = 0; k < VEC; k++)
                if ((first + i) * VEC + k >= V) x[k] = __int_as_float(0xff800000);  // -inf, whose power is 0
        float high = x[0];
#pragma unroll
        for (int k = 1; k < VEC; k++) high = fmaxf(high, x[k]);
        if (high > s.highest) {
            s.sum *= rescale(shift_of(s.highest), shift_of(high));
            s.highest = high;
        }
        const float shift = shift_of(s.highest);
#pragma unroll
        for (int k = 0; k < VEC; k += 2) sum += power(x[k], shift) + power(x[k + 1], shift);
        s.sum += sum;
    }
    return s;
}

// The gradient of the block's part, over its scores in `to`.
__device__ __forceinline__ void write_gradient(Part* to, const Part* part, int first, int target, const Statistics& row,
                                               float dloss) {
    const float scale = dloss / row.sum, shift = shift_of(row.highest);
    for (int i = threadIdx.x; i < PART; i += BLOCK) {
        const Part x = part[i];
        const int v = (first + i) * VEC;
        Part d;
        d.fill([&](int k) { return power(x[k], shift) * scale; });
        if (first + i == target / VEC)
#pragma unroll
            for (int k = 0; k < VEC; k++)
                if (v + k == target) d.set(k, power(x[k], shift) * scale - dloss);
        if (PADDED && first + i >= FULL)
#pragma unroll
            for (int k = 0; k < VEC; k++)
                if (v + k >= V) d.set(k, 0.0f);
        write(to + i, d);
    }
}

template <bool BACKWARD>
__device__ __forceinline__ void cross_entropy(f32* __restrict__ losses, floatX* logits, const i32* __restrict__ targets,
                                              const f64* __restrict__ dloss) {
    extern __shared__ __align__(128) Part part[];
    __shared__ u64 arrived[CHUNKS], gathered;
    __shared__ Statistics warps[CLUSTER * WARPS];  // of the whole cluster
    const int rank = blockIdx.x % CLUSTER, first = rank * PART, lane = threadIdx.x % 32;
    const i64 n = blockIdx.x / CLUSTER;
    const int target = targets[n];
    Part* mine = reinterpret_cast<Part*>(logits + n * VP) + first;
    if (target == IGNORE) {  // of all blocks of the cluster
        if (rank == 0 && threadIdx.x == 0) losses[n] = 0.0f;
        if constexpr (BACKWARD)
            for (int i = threadIdx.x; i < PART; i += BLOCK) mine[i] = Part{};
        return;
    }
    if (threadIdx.x == 0) {
        barrier_init(&gathered, 1);
        fetch(part, mine, arrived);
        barrier_expect(&gathered, sizeof(warps));
        barriers_visible();
    }
    __syncthreads();
    if constexpr (CLUSTER > 1) say_begun();  // from here on this block's shared memory may be written
    const Statistics own = warp_statistics(part_statistics(part, first, arrived));
    gather(warps, &gathered, rank, own);
    Statistics row = {LOW, 0.0f};
    for (int i = lane; i < CLUSTER * WARPS; i += 32) merge(row, warps[i].highest, warps[i].sum);
    row = warp_statistics(row);
    const bool known = target >= 0 && target < V;
    if (threadIdx.x == 0 && rank == (known ? target / VEC / PART : 0)) {
        const float score = known ? to_float(reinterpret_cast<const floatX*>(part)[target - first * VEC]) : 0.0f;
        losses[n] = known ? log_sum(row) - (score - row.highest) : __int_as_float(0x7fc00000);
    }
    if constexpr (BACKWARD) write_gradient(mine, part, first, target, row, (float)*dloss);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(BLOCK) cross_entropy_forward(
    f32* __restrict__ losses, const floatX* __restrict__ logits, const i32* __restrict__ targets, i32 N) {
    cross_entropy<false>(losses, const_cast<floatX*>(logits), targets, nullptr);
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(BLOCK) cross_entropy_forward_backward(
    f32* __restrict__ losses, floatX* __restrict__ logits, const i32* __restrict__ targets,
    const f64* __restrict__ dloss, i32 N) {
    cross_entropy<true>(losses, logits, targets, dloss);
}
