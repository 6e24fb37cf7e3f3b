// Thread block clusters (sm_90 and newer): blocks that access each other's shared memory. Part of device.cuh.
#pragma once

#include "cuda/common/device.cuh"

namespace fastseq::cuda {

// Cluster kernels exist for every architecture. Below sm_90, where they are not launched, their body only aborts.
#if defined(FASTSEQ_HOST_DEVICE) || __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
#define FASTSEQ_HAS_CLUSTERS 1
#else
#define FASTSEQ_HAS_CLUSTERS 0
#endif

constexpr bool kHasClusters = FASTSEQ_HAS_CLUSTERS;

FASTSEQ_DEVICE void refuse_cluster() { abort_kernel("thread block clusters need sm_90"); }

FASTSEQ_DEVICE unsigned cluster_rank() {
#ifdef FASTSEQ_HOST_DEVICE
  return host::world().running->block->rank;
#elif FASTSEQ_HAS_CLUSTERS
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  refuse_cluster();
  return 0;
#endif
}

FASTSEQ_DEVICE unsigned cluster_index() {
#ifdef FASTSEQ_HOST_DEVICE
  return host::world().running->block->cluster;
#elif FASTSEQ_HAS_CLUSTERS
  unsigned index;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
#else
  refuse_cluster();
  return 0;
#endif
}

// Barrier of all threads of all blocks of the cluster. Shared memory written before it is visible after it. Required
// before the first access to another block's shared memory, so that the block has started, and after the last access,
// so that it has not ended.
FASTSEQ_DEVICE void cluster_barrier() {
#ifdef FASTSEQ_HOST_DEVICE
  host::cluster_barrier();
#elif FASTSEQ_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  refuse_cluster();
#endif
}

// Maps `p`, in this block's shared memory, to the same offset in block `rank` of the cluster (mapa). The result is an
// operand of store_async8.
FASTSEQ_DEVICE uint64_t cluster_address(const void* p, unsigned rank) {
#ifdef FASTSEQ_HOST_DEVICE
  return reinterpret_cast<uint64_t>(host::cluster_address(p, rank));
#elif FASTSEQ_HAS_CLUSTERS
  const unsigned local = static_cast<unsigned>(__cvta_generic_to_shared(p));
  unsigned mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(local), "r"(rank));
  return mapped;
#else
  refuse_cluster();
  return 0;
#endif
}

// Initialises an mbarrier in shared memory: a phase ends after `arrivals` arrivals and all expected bytes. One thread
// calls it; cluster_barrier() must follow.
FASTSEQ_DEVICE void mbarrier_init(uint64_t* mbarrier, unsigned arrivals) {
#ifdef FASTSEQ_HOST_DEVICE
  host::mbarrier_init(mbarrier, arrivals);
#elif FASTSEQ_HAS_CLUSTERS
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(mbarrier));
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  refuse_cluster();
#endif
}

// Arrives once at an mbarrier of this block and adds `bytes` to the bytes that its phase expects.
FASTSEQ_DEVICE void mbarrier_arrive_expect(uint64_t* mbarrier, unsigned bytes) {
#ifdef FASTSEQ_HOST_DEVICE
  host::mbarrier_arrive_expect(mbarrier, bytes);
#elif FASTSEQ_HAS_CLUSTERS
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(mbarrier));
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
#else
  refuse_cluster();
#endif
}

// Waits until the phase of this parity has ended. Phases have parity 0, 1, 0, ... The blocks of a cluster always run at
// the same time, so a wait longer than `limit` is a fault: it aborts the kernel.
FASTSEQ_DEVICE void mbarrier_wait(uint64_t* mbarrier, unsigned parity, unsigned limit = 0) {
#ifdef FASTSEQ_HOST_DEVICE
  SpinTimeout timeout;
  while (!host::mbarrier_phase_ended(mbarrier, parity)) {
    if (timeout.expired({limit, nullptr})) abort_kernel("a block of a cluster waited in vain");
  }
#elif FASTSEQ_HAS_CLUSTERS
  SpinTimeout timeout;
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(mbarrier));
  for (;;) {
    unsigned ended;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(address), "r"(parity)
        : "memory");
    if (ended) break;
    if (timeout.expired({limit, nullptr})) abort_kernel("a block of a cluster waited in vain");
  }
#else
  refuse_cluster();
#endif
}

// Sends 8 bytes to `address` in another block's shared memory and counts them at that block's mbarrier (st.async). Both
// addresses come from cluster_address. The bytes are visible once the phase has ended.
FASTSEQ_DEVICE void store_async8(uint64_t address, uint64_t mbarrier, uint64_t value) {
#ifdef FASTSEQ_HOST_DEVICE
  host::store_async(reinterpret_cast<void*>(address), reinterpret_cast<uint64_t*>(mbarrier), value, 8);
#elif FASTSEQ_HAS_CLUSTERS
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(static_cast<unsigned>(address)),
      "l"(value), "r"(static_cast<unsigned>(mbarrier))
      : "memory");
#else
  refuse_cluster();
#endif
}

}  // namespace fastseq::cuda
