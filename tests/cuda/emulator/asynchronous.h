// Asynchronous copies and stores: cp.async, clusters, mbarrier, st.async. Each takes effect as late as allowed, so a
// kernel without the wait reads the old value. With Options::shuffle half of the stores take effect at once, which
// exposes stores that overwrite a word before it is read.
#pragma once

#include "world.h"

namespace host {

HOST_RAW inline void copy_async(void* to, const void* from, int bytes) {
  __tsan_read_range(const_cast<void*>(from), bytes);
  const Unseen unseen;
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) {
    fail("copy_async: an address is not aligned to " + std::to_string(bytes) + " bytes");
  }
  Thread* t = world().running;
  t->copies.push_back({to, from, bytes, t->groups});
}

HOST_RAW inline void commit_copies() { ++world().running->groups; }

// Not HOST_RAW: sanitizers check these writes as writes of the thread.
inline void copy_bytes(void* to, const void* from, int bytes) {
  volatile char* d = static_cast<char*>(to);
  const volatile char* s = static_cast<const char*>(from);
  for (int i = 0; i < bytes; ++i) d[i] = s[i];
}

inline void wait_copies(int pending) {
  Thread* t = world().running;
  std::vector<PendingCopy> later;
  for (const PendingCopy& c : t->copies) {
    if (c.group < t->groups - pending)
      copy_bytes(c.to, c.from, c.bytes);
    else
      later.push_back(c);
  }
  t->copies.swap(later);
}

HOST_RAW inline void need_cluster(const char* name) {
  if (world().cluster_size == 1) fail(std::string(name) + ": the launch has no clusters");
}

HOST_RAW inline void cluster_barrier() {
  const Unseen unseen;
  World& w = world();
  need_cluster("cluster_barrier");
  const unsigned cluster = w.running->block->cluster;
  int live = 0;
  for (unsigned k = 0; k < w.cluster_size; ++k) live += w.blocks[cluster * w.cluster_size + k]->live;
  arrive_and_wait(w.cluster_barriers[cluster], live, "cluster_barrier");
}

HOST_RAW inline void* cluster_address(const void* p, unsigned rank) {
  const Unseen unseen;
  World& w = world();
  need_cluster("cluster_address");
  if (rank >= w.cluster_size) fail("cluster_address: rank " + std::to_string(rank) + " is not in the cluster");
  const Block& block = *w.running->block;
  Block& target = *w.blocks[block.cluster * w.cluster_size + rank];
  if (target.live != target.size) fail("cluster_address: that block has ended");
  const ptrdiff_t offset = static_cast<const char*>(p) - block.shared;
  if (offset < 0 || static_cast<size_t>(offset) >= block.capacity) fail("cluster_address: not in shared memory");
  return target.shared + offset;
}

// The 64 bits of an mbarrier on the host-side device.
struct Mbarrier {
  uint16_t arrivals;    // per phase
  uint16_t missing;     // arrivals still missing in the current phase
  int32_t bytes : 31;   // still expected in the current phase; here, unlike on a GPU, they must be announced first
  uint32_t parity : 1;  // of the current phase
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

HOST_RAW inline void mbarrier_init(uint64_t* mbarrier, unsigned arrivals) {
  if (reinterpret_cast<uintptr_t>(mbarrier) % 8) fail("mbarrier_init: not aligned to 8 bytes");
  const Mbarrier initial{static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0, 0};
  std::memcpy(static_cast<void*>(mbarrier), &initial, sizeof initial);
  ++world().progress;
}

HOST_RAW inline void mbarrier_update(uint64_t* mbarrier, int arrivals, int bytes) {
  Mbarrier* m = reinterpret_cast<Mbarrier*>(mbarrier);
  if (m->bytes + bytes < 0) fail("mbarrier: more bytes than the phase expects");
  if (m->missing < arrivals) fail("mbarrier: more arrivals than the phase has");
  m->missing -= arrivals;
  m->bytes += bytes;
  ++world().progress;
  if (m->missing || m->bytes) return;
  m->missing = m->arrivals;
  m->parity = !m->parity;
}

HOST_RAW inline void mbarrier_arrive_expect(uint64_t* mbarrier, unsigned bytes) {
  __tsan_release(mbarrier);
  mbarrier_update(mbarrier, 1, static_cast<int>(bytes));
}

HOST_RAW inline void deliver(const Delivery& d) {
  for (int i = 0; i < d.bytes; ++i) {
    static_cast<volatile char*>(d.to)[i] = reinterpret_cast<const volatile char*>(&d.value)[i];
  }
  mbarrier_update(d.mbarrier, 0, -d.bytes);
}

HOST_RAW inline void store_async(void* to, uint64_t* mbarrier, uint64_t value, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes) fail("store_async: not aligned to " + std::to_string(bytes) + " bytes");
  __tsan_write_range(to, bytes);  // the value may change from here on
  __tsan_release(mbarrier);
  const Unseen unseen;
  World& w = world();
  for (const Block* block : w.blocks) {
    if (!block || to < block->shared || to >= block->shared + block->capacity) continue;
    if (block->live != block->size) fail("store_async: that block has ended");
  }
  if (options().shuffle && w.random() % 2)
    deliver({to, value, bytes, mbarrier});
  else
    w.deliveries.push_back({to, value, bytes, mbarrier});
  ++w.progress;
}

// Delivers the stores in flight to this mbarrier. Returns true if the phase of this parity has ended.
HOST_RAW inline bool mbarrier_phase_ended(uint64_t* mbarrier, unsigned parity) {
  poll();
  const Unseen unseen;
  std::vector<Delivery> others;
  std::vector<Delivery> arriving;
  for (const Delivery& d : world().deliveries) (d.mbarrier == mbarrier ? arriving : others).push_back(d);
  world().deliveries.swap(others);
  for (const Delivery& d : arriving) deliver(d);
  if (reinterpret_cast<Mbarrier*>(mbarrier)->parity == parity) return false;
  __tsan_acquire(mbarrier);
  return true;
}

}  // namespace host
