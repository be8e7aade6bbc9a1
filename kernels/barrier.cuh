// barrier.cuh - barriers in shared memory (mbarrier), which count threads and the bytes of copies. Needs sm_90.
//
// A phase ends when `count` arrivals were made and the expected bytes have come; phases alternate 0, 1, 0, ...
// SOURCE    PTX ISA 8.3, "mbarrier"
#ifndef APR_BARRIER_CUH
#define APR_BARRIER_CUH
#include "common.cuh"

__device__ __forceinline__ void barrier_init(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// After barrier_init and before the block's or cluster's threads meet: the others and the copy engine see the barriers.
__device__ __forceinline__ void barriers_visible() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// This thread's cp.async copies so far count as one arrival when they have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 phase) {
    asm volatile("{\n.reg .pred done;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra end;\nbra again;\nend:\n}"
                 ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}
// The same, for what other blocks of the cluster wrote.
__device__ __forceinline__ void barrier_wait_cluster(u64* barrier, u32 phase) {
    asm volatile("{\n.reg .pred done;\nagain:\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra end;\nbra again;\nend:\n}"
                 ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}

#endif
