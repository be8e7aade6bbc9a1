// sampling.cu - the next token of each sequence, chosen on the device; and the start of the next step: its embedding.
//
// MATH      sample   at temperature 0 the first id of the largest score below vocab; else
//                    w_i = floor(2^30 exp((score_i - max) / temperature)); kept: the top_k largest scores, then of
//                    those the fewest, largest first, that hold top_p of the weight (equal scores stay together);
//                    r = (u * sum of kept w) >> 64, u 64 random bits; the first id whose running sum exceeds r
//           embed    x_b = matrix[token_b]
//           u is Philox4x32-10 of key seed, counter (position, sequence, 0, 0): a pure function, like everything here
// SOURCE    Salmon et al. 2011 (Philox); Holtzman et al. 2020 (top-p), arXiv:1904.09751
// SHAPES    logits (B, V) f32   best_score, best_id (B, BESTS) as decode_head leaves them   matrix (Vp, C) floatX
//           x (B, C) f32   token, pos, step (B,) i32   tokens (LIMIT, B) i32, on the host
//           settings (5,) i64: vocab, seed, number of the first sequence, top_k (0: all), LIMIT;
//           odds (2,) f64: 1 / temperature (0 for temperature 0), top_p
// WRITES    token =, pos += 1, step += 1, x = the token's embedding, tokens[step] = the token, or -2 where a score is
//           not a number or the largest is infinite
//           embed: x = the embedding of token
// BAKED     B, BESTS, C, V, FLOATX
// LAUNCH    sample, embed  grid (B) block (1024)
// MEMORY    8 B BESTS bytes; where it draws, 4 B V bytes 2 to 11 times, from L2
// FLOPS     sample 2 exponentials per score and pass: latency bound
// NUMERICS  weights are integers, so their sums are exact in any order. exp is of float: a last bit that differs from
//           the CPU's can move a weight by one in 2^30
// CONTRACT  contracts/sampling-v1.yaml      REFERENCE  apr/reference/sampling.py
#include "common.cuh"
constexpr int B = K_B, BESTS = K_BESTS, C = K_C, V = K_V, BLOCK = 1024, WARPS = BLOCK / 32, BINS = 2048;
constexpr float NONE = -3.4e38f;  // a score that weighs nothing
constexpr int CHUNK = ((V + BLOCK - 1) / BLOCK + 31) / 32 * 32, CHUNKS = (V + CHUNK - 1) / CHUNK;
enum { VOCAB, SEED, FIRST, TOP_K, LIMIT };

__device__ __forceinline__ void embed_row(f32* x, const floatX* __restrict__ matrix, int token) {
    for (int i = threadIdx.x; i < C; i += BLOCK) x[i] = to_float(matrix[(i64)token * C + i]);
}

// The chosen token goes to the device's state and to the host; then the next step's input is made of it.
__device__ __forceinline__ void finish(f32* x, i32* token, i32* pos, i32* step, volatile i32* tokens,
                                       const floatX* __restrict__ matrix, const i64* settings, int chosen) {
    const int b = blockIdx.x;
    embed_row(x + (i64)b * C, matrix, chosen < 0 ? 0 : chosen);
    if (threadIdx.x > 0) return;
    const int now = step[b];
    token[b] = chosen < 0 ? 0 : chosen;
    pos[b] += 1;
    step[b] = now + 1;
    if (now < settings[LIMIT]) tokens[(i64)now * B + b] = chosen;
    __threadfence_system();
}

// The best of two (score, id): the larger score, the smaller id of equals; -2 wins over all, -1 over none.
__device__ __forceinline__ void better(float& score, int& id, float score2, int id2) {
    if (id == -2 || id2 == -1) return;
    if (id2 == -2 || id == -1 || score2 > score || (score2 == score && id2 < id)) score = score2, id = id2;
}

// The first id of the largest score, the same in every thread; -2 if a score is not a number.
__device__ __forceinline__ int largest(const f32* best_score, const i32* best_id, float& score) {
    __shared__ float scores[WARPS];
    __shared__ int ids[WARPS];
    const i64 row = (i64)blockIdx.x * BESTS;
    int id = -1;
    score = 0.0f;
    for (int i = threadIdx.x; i < BESTS; i += BLOCK) better(score, id, best_score[row + i], best_id[row + i]);
    for (int apart = 16; apart > 0; apart /= 2) {
        const float score2 = __shfl_xor_sync(0xffffffffu, score, apart);
        better(score, id, score2, __shfl_xor_sync(0xffffffffu, id, apart));
    }
    if (threadIdx.x % 32 == 0) scores[threadIdx.x / 32] = score, ids[threadIdx.x / 32] = id;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) better(score, id, scores[w], ids[w]);
    return id;
}

extern "C" __global__ void __launch_bounds__(BLOCK, 1) embed(
    f32* __restrict__ x, const i32* token, const floatX* __restrict__ matrix) {
    let_next_start();
    wait_for_previous();
    embed_row(x + (i64)blockIdx.x * C, matrix, token[blockIdx.x]);
}

// 64 random bits of Philox4x32-10.
__device__ __forceinline__ u64 random_bits(u64 seed, u32 position, u32 sequence) {
    u32 c0 = position, c1 = sequence, c2 = 0, c3 = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const u32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return (u64)c0 << 32 | c1;
}

// Floats in the order of unsigned integers.
__device__ __forceinline__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(x == 0.0f ? 0.0f : x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ u64 weight_of(float score, float top, float inverse) {
    return (u64)(expf((score - top) * inverse) * 1073741824.0f);
}

// use(score) for each score of the thread's share: several are on their way at a time, since L2 is far.
template <typename Use>
__device__ __forceinline__ void for_scores(const f32* logits, int vocab, const Use& use) {
    constexpr int AT_ONCE = 8;
    for (int first = threadIdx.x; first < vocab; first += BLOCK * AT_ONCE) {
        float score[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) score[u] = first + u * BLOCK < vocab ? logits[first + u * BLOCK] : 0.0f;
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++)
            if (first + u * BLOCK < vocab) use(score[u]);
    }
}

// Sum over the block, in every thread.
__device__ __forceinline__ u64 total_of(u64 x) {
    __shared__ u64 sums[WARPS];
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    u64 total = 0;
    for (int w = 0; w < WARPS; w++) total += sums[w];
    return total;
}

// Which of a warp's lanes, each with a sum, holds number `rest` of what they count in turn; `rest` becomes its number
// there.
__device__ __forceinline__ int lane_with(u64 sum, u64& rest) {
    const int lane = threadIdx.x % 32;
    u64 running = sum;
    for (int apart = 1; apart < 32; apart *= 2) {
        const u64 before = __shfl_up_sync(0xffffffffu, running, apart);
        if (lane >= apart) running += before;
    }
    const u32 beyond = __ballot_sync(0xffffffffu, rest < running);
    const int holder = beyond == 0 ? 31 : __ffs(beyond) - 1;
    rest -= __shfl_sync(0xffffffffu, running - sum, holder);
    return holder;
}

// The smallest key that is kept: those are kept above which, strictly, the others weigh at most `rest`. 11 bits at a
// time from the top. A score weighs its weight (MASS), or 1; keys below `least` are out already. Shared memory adds 32
// bits at a time natively, so a sum is kept in three parts of 14 bits.
template <bool MASS>
__device__ __forceinline__ u32 threshold(u32 (&bins)[3][BINS], const f32* logits, int vocab, float top, float inverse,
                                         u32 least, u64 rest) {
    __shared__ u32 chosen;
    __shared__ u64 left;
    constexpr int EACH = BINS / 32;
    static_assert(V <= 1 << 18, "a part of a sum would overflow");
    const auto weight = [&](int bin) { return bins[0][bin] + ((u64)bins[1][bin] << 14) + ((u64)bins[2][bin] << 28); };
    u32 prefix = 0;
    for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
        for (int i = threadIdx.x; i < 3 * BINS; i += BLOCK) bins[0][i] = 0;
        __syncthreads();
        const u32 known = shift == 21 ? 0u : shift == 10 ? ~0u << 21 : ~0u << 10, digit = shift == 0 ? 1023 : 2047;
        for_scores(logits, vocab, [&](float score) {
            const u32 key = ordered(score);
            if (key < least || (key & known) != prefix) return;
            const u32 bin = key >> shift & digit, w = MASS ? (u32)weight_of(score, top, inverse) : 1;
            if (w & 16383) atomicAdd(&bins[0][bin], w & 16383);
            if (w >> 14) atomicAdd(&bins[1][bin], w >> 14 & 16383);
            if (w >> 28) atomicAdd(&bins[2][bin], w >> 28);
        });
        __syncthreads();
        if (threadIdx.x < 32) {
            u64 sum = 0;
            for (int e = 0; e < EACH; e++) sum += weight(BINS - 1 - (threadIdx.x * EACH + e));
            if (lane_with(sum, rest) == threadIdx.x) {
                int bin = BINS - 1 - threadIdx.x * EACH;
                for (const int last = bin - EACH + 1; bin > last && rest >= weight(bin); bin--) rest -= weight(bin);
                chosen = prefix | (u32)bin << shift;
                left = rest;
            }
        }
        __syncthreads();
        prefix = chosen;
        rest = left;
    }
    return prefix;
}

// The first id whose running sum of kept weights exceeds the drawn number.
__device__ __forceinline__ int draw(const f32* logits, int vocab, float top, float inverse, u32 least, u64 bits) {
    __shared__ u64 sums[BLOCK];
    __shared__ int found;
    const int lane = threadIdx.x % 32;
    const auto weight_in = [&](float score) { return ordered(score) >= least ? weight_of(score, top, inverse) : 0; };
    const auto weight = [&](int i) { return i < vocab ? weight_in(logits[i]) : 0; };
    sums[threadIdx.x] = 0;
    __syncthreads();
    for (int c = threadIdx.x / 32; c < CHUNKS; c += WARPS) {
        float score[CHUNK / 32];
        u64 sum = 0;
#pragma unroll
        for (int e = 0; e < CHUNK / 32; e++) {
            const int i = c * CHUNK + e * 32 + lane;
            score[e] = i < vocab ? logits[i] : NONE;
        }
#pragma unroll
        for (int e = 0; e < CHUNK / 32; e++) sum += weight_in(score[e]);
        for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
        if (lane == 0) sums[c] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        u64 sum = 0;
        for (int e = 0; e < 32; e++) sum += sums[lane * 32 + e];
        u64 all = sum;
        for (int apart = 16; apart > 0; apart /= 2) all += __shfl_xor_sync(0xffffffffu, all, apart);
        u64 rest = __umul64hi(bits, all);
        int c = lane_with(sum, rest) * 32;
        while (rest >= sums[c]) rest -= sums[c++];
        const int first = c * CHUNK + lane * (CHUNK / 32);
        u64 own = 0;
        for (int e = 0; e < CHUNK / 32; e++) own += weight(first + e);
        if (lane_with(own, rest) == lane) {
            int i = first;
            for (u64 w = weight(i); rest >= w; w = weight(i)) rest -= w, i++;
            found = i;
        }
    }
    __syncthreads();
    return found;
}

extern "C" __global__ void __launch_bounds__(BLOCK, 1) sample(
    f32* __restrict__ x, i32* token, i32* pos, i32* step, i32* tokens, const f32* all_logits, const f32* best_score,
    const i32* best_id, const floatX* __restrict__ matrix, const i64* settings, const f64* odds) {
    __shared__ u32 bins[3][BINS];
    let_next_start();
    wait_for_previous();
    float top;
    int chosen = largest(best_score, best_id, top);
    if (chosen >= 0 && top - top != 0.0f) chosen = -2;  // infinite
    if (odds[0] > 0.0 && chosen >= 0) {
        const f32* logits = all_logits + (i64)blockIdx.x * V;
        const int vocab = settings[VOCAB] < V ? settings[VOCAB] : V;
        const float inverse = (float)odds[0];
        const i64 top_k = settings[TOP_K];
        u32 least = 0;
        if (top_k > 0 && top_k < vocab) least = threshold<false>(bins, logits, vocab, top, inverse, 0, top_k - 1);
        if (odds[1] < 1.0) {
            u64 sum = 0;
            for_scores(logits, vocab, [&](float score) {
                if (ordered(score) >= least) sum += weight_of(score, top, inverse);
            });
            const u64 target = (u64)ceil(odds[1] * (f64)total_of(sum));
            const u64 rest = target > 1 ? target - 1 : 0;
            const u32 least_p = threshold<true>(bins, logits, vocab, top, inverse, least, rest);
            least = least_p > least ? least_p : least;
        }
        const u64 bits = random_bits(settings[SEED], pos[blockIdx.x] + 1, settings[FIRST] + blockIdx.x);
        chosen = draw(logits, vocab, top, inverse, least, bits);
    }
    finish(x, token, pos, step, tokens, matrix, settings, chosen);
}
