// common.cuh - what every kernel file shares: the storage type, and sums over a warp and over a block.
//
// MATH      warp_sum(x) = sum of x over the 32 lanes        block_sum<BLOCK>(x) = sum of x over the BLOCK threads
// BAKED     FLOATX (f32 or bf16): floatX, the type in which activations and weights are stored
// LAUNCH    both are called by all threads of the warp or block together; blockDim is (BLOCK, 1, 1)
// MEMORY    block_sum: BLOCK/32 floats of shared memory, the same for all calls of one BLOCK
// NUMERICS  float sums in a fixed order, no atomics: same input, same bits, and the same bits in every thread
//
// The expanded text of this file is part of the key of every kernel that includes it.
#ifndef APR_COMMON_CUH
#define APR_COMMON_CUH
#include <cuda_bf16.h>

#ifndef K_FLOATX
#error "K_FLOATX is not baked: there is no default storage type"
#endif

using f32 = float;
using bf16 = __nv_bfloat16;
using floatX = K_FLOATX;

template <typename A, typename B> struct same_type { static constexpr bool value = false; };
template <typename A> struct same_type<A, A> { static constexpr bool value = true; };
static_assert(same_type<floatX, f32>::value || same_type<floatX, bf16>::value, "FLOATX is f32 or bf16");

// Every lane gets the sum. Butterfly: both partners of a step add the same two numbers, so all lanes agree to the bit.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

// Every thread gets the sum: each warp's, then each warp adds all of those by the same butterfly.
template <int BLOCK>
__device__ __forceinline__ float block_sum(float x) {
    static_assert(BLOCK % 32 == 0 && BLOCK >= 32 && BLOCK <= 1024, "BLOCK is a multiple of 32 from 32 to 1024");
    constexpr int WARPS = BLOCK / 32;
    x = warp_sum(x);
    if constexpr (WARPS > 1) {
        __shared__ float partial[WARPS];
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        if (lane == 0) partial[warp] = x;
        __syncthreads();
        x = warp_sum(lane < WARPS ? partial[lane] : 0.0f);
        __syncthreads();  // the next call may write
    }
    return x;
}

#endif
