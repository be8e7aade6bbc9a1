// common.cuh - what every kernel file shares: the storage type, 16-byte vectors, sums over a warp and over a block.
//
// MATH      warp_sum(x) = sum of x over the 32 lanes        block_sum<BLOCK>(x) = sum of x over the BLOCK threads, or
//           block_sum<BLOCK, THREADS>(x) over each THREADS neighbours
// BAKED     FLOATX (f32 or bf16): floatX, the type in which activations and weights are stored
// LAUNCH    the sums are called by all threads of the warp or block together; blockDim is (BLOCK, 1, 1)
// MEMORY    block_sum: BLOCK/32 floats of shared memory, the same for all calls of one BLOCK
// NUMERICS  float sums in a fixed order, no atomics: same input, same bits, and the same bits in every thread;
//           bf16 is rounded to nearest even, as PyTorch and ml_dtypes round it
//
// Nothing of CUDA's own headers is included: every byte that the compiler reads is in the key of the kernel.
#ifndef APR_COMMON_CUH
#define APR_COMMON_CUH

#ifndef K_FLOATX
#error "K_FLOATX is not baked: there is no default storage type"
#endif

using u16 = unsigned short;
using u32 = unsigned int;
using i32 = int;
using i64 = long long;
using u64 = unsigned long long;
using f32 = float;
using f64 = double;

// The upper half of a float. Needs sm_80, whose cvt rounds to nearest even.
struct bf16 {
    u16 bits;
};

using floatX = K_FLOATX;

template <typename A, typename B> struct same_type { static constexpr bool value = false; };
template <typename A> struct same_type<A, A> { static constexpr bool value = true; };
static_assert(same_type<floatX, f32>::value || same_type<floatX, bf16>::value, "FLOATX is f32 or bf16");

__device__ __forceinline__ float to_float(f32 x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// Two bf16 in one instruction and one register, the low one first.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <typename X> __device__ __forceinline__ X from_float(float x);
template <> __device__ __forceinline__ f32 from_float<f32>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    bf16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
    return out;
}

// W neighbours that are read and written in one access, of 16 bytes where W = VEC: addresses must be multiples of it.
template <typename X, int W> struct alignas(sizeof(X) * W) Vec {
    X lane[W];
    __device__ __forceinline__ float operator[](int i) const { return to_float(lane[i]); }
    __device__ __forceinline__ void set(int i, float x) { lane[i] = from_float<X>(x); }
    // Every element i = value(i); bf16 by twos.
    template <typename F> __device__ __forceinline__ void fill(F value) {
#pragma unroll
        for (int i = 0; i < W; i += 2) {
            if constexpr (W > 1 && sizeof(X) == 2) {
                const float high = value(i + 1);
                reinterpret_cast<u32*>(lane)[i / 2] = pack(value(i), high);
            } else {
                set(i, value(i));
                if constexpr (W > 1) set(i + 1, value(i + 1));
            }
        }
    }
};
constexpr int VEC = 16 / sizeof(floatX);

// Reading and writing 16 bytes at a time. Reads are issued in the order in which they stand, so that all are on their
// way before the first is waited for; where `there` is false nothing is read, and the elements are 0. (An assignment
// may become four accesses of 4 bytes.) Hints that no cache need keep the data cost 1 to 8 % on an H200: docs/log.md.
template <typename T> __device__ __forceinline__ T read(const T* at, bool there) {
    T out = {};
    if constexpr (sizeof(T) != 16) {
        if (there) out = *at;
    } else {
        u32* word = reinterpret_cast<u32*>(&out);
        asm volatile("{\n.reg .pred there;\nsetp.ne.u32 there, %5, 0;\nmov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\n"
                     "mov.u32 %3, 0;\n@there ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                     : "=&r"(word[0]), "=&r"(word[1]), "=&r"(word[2]), "=&r"(word[3]) : "l"(at), "r"((u32)there));
    }
    return out;
}
template <typename T> __device__ __forceinline__ void write(T* at, const T& value) {
    if constexpr (sizeof(T) != 16) {
        *at = value;
    } else {
        const u32* word = reinterpret_cast<const u32*>(&value);
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word[0]), "r"(word[1]), "r"(word[2]),
                     "r"(word[3]) : "memory");
    }
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float exp2_approx(float x) {  // 2 ulp
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// The widest access that divides `length` elements of floatX: VEC where rows of that length keep the alignment.
__host__ __device__ constexpr int vector_width(int length) {
    int width = VEC;
    while (length % width != 0) width /= 2;
    return width;
}

// Every lane gets the sum. Butterfly: both partners of a step add the same two numbers, so all lanes agree to the bit.
template <int LANES = 32>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

// Every thread gets the sum of its THREADS: each warp's, then each warp adds all of those by the same butterfly.
template <int BLOCK, int THREADS = BLOCK>
__device__ __forceinline__ float block_sum(float x) {
    static_assert(BLOCK % 32 == 0 && BLOCK >= 32 && BLOCK <= 1024, "BLOCK is a multiple of 32 from 32 to 1024");
    static_assert(THREADS % 32 == 0 && BLOCK % THREADS == 0, "whole warps, and as many in every part");
    constexpr int WARPS = THREADS / 32;
    x = warp_sum(x);
    if constexpr (WARPS > 1) {
        __shared__ float partial[BLOCK / 32];
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = THREADS == BLOCK ? 0 : warp / WARPS * WARPS;
        if (lane == 0) partial[warp] = x;
        __syncthreads();
        x = warp_sum(lane < WARPS ? partial[first + lane] : 0.0f);
        __syncthreads();  // the next call may write
    }
    return x;
}

// Programmatic dependent launch (sm_90 on; elsewhere, and in a kernel launched without it, both do nothing).
// wait_for_previous: what the kernel before in the stream wrote is there. Every thread calls it, before its first read
// of such data and its first write of any: then the kernels before that one have ended too.
// let_next_start: the next kernel's blocks may take the room that this one leaves.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// out[column] += sum over the parts of partial[part * stride + column], column < width: the second half of a sum over
// rows. 32 columns per block of (32, 32) threads; each row of 32 takes every 32nd part, then they are added in order.
__device__ __forceinline__ void add_parts(f32* __restrict__ out, const f32* __restrict__ partial, int parts, int width,
                                          int stride) {
    __shared__ float sums[32][32];
    const int column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < width)
#pragma unroll 8
        for (int part = threadIdx.y; part < parts; part += 32) sum += partial[(i64)part * stride + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
#pragma unroll
        for (int lane = 1; lane < 32; lane++) sum += sums[lane][threadIdx.x];
        out[column] += sum;
    }
}

#endif
