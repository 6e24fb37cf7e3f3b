// Thread block clusters (sm_90 and up): blocks that reach each other's shared memory. Part of device.cuh.
#pragma once

#include "cuda/common/device.cuh"

namespace fastseq::cuda {

// Kernels of clusters are compiled for every architecture; below sm_90, where they are not launched, these end them.
#if defined(FASTSEQ_HOST_DEVICE) || __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
#define FASTSEQ_HAS_CLUSTERS 1
#else
#define FASTSEQ_HAS_CLUSTERS 0
#endif

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

// All threads of all blocks of the cluster; what was written to shared memory before is seen after. Before the first
// access to another block's shared memory (it must run), and after the last (it must not have ended).
FASTSEQ_DEVICE void cluster_barrier() {
#ifdef FASTSEQ_HOST_DEVICE
  host::cluster_barrier();
#elif FASTSEQ_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  refuse_cluster();
#endif
}

// Where `p`, in this block's shared memory, lies in that of block `rank` of the cluster. A number, for store_async.
FASTSEQ_DEVICE uint64_t peer_address(const void* p, unsigned rank) {
#ifdef FASTSEQ_HOST_DEVICE
  return reinterpret_cast<uint64_t>(host::peer_address(p, rank));
#elif FASTSEQ_HAS_CLUSTERS
  const unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(p));
  unsigned peer;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(own), "r"(rank));
  return peer;
#else
  refuse_cluster();
  return 0;
#endif
}

// An mbarrier in shared memory: a phase ends when `arrivals` arrivals have come and as many bytes as were expected.
// Initialised by one thread, then cluster_barrier().
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

// One arrival at this block's own mbarrier, which also adds `bytes` to what the phase expects.
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

// Waits for the end of the phase of this parity (0 the first, then 1, 0, ...).
FASTSEQ_DEVICE void mbarrier_wait(uint64_t* mbarrier, unsigned parity) {
#ifdef FASTSEQ_HOST_DEVICE
  Patience patience;
  while (!host::mbarrier_phase_ended(mbarrier, parity)) patience.look();
#elif FASTSEQ_HAS_CLUSTERS
  Patience patience;
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
    patience.look();
  }
#else
  refuse_cluster();
#endif
}

// Sends 8 bytes to `address` in a peer's shared memory and reports them to the mbarrier at `mbarrier` there (both by
// peer_address, of the same block). They have arrived when the phase has ended.
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
