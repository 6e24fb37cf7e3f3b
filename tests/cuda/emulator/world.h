// The host-side device: blocks, warps, barriers, shared memory and a scheduler. It runs the source of a kernel on the
// CPU, one thread at a time; threads yield at barriers, shuffles and polls. Overview: docs/kernels/proof.md
//
// Errors with block and thread: deadlock (a barrier that some threads never reach, or all threads poll), a shuffle with
// missing lanes, too much shared memory, access to the shared memory of a block that has ended. Errors by sanitizers:
// out of bounds (AddressSanitizer, red zones between arrays), misaligned vectors (UBSan), races (ThreadSanitizer).
// Shared memory starts as NaN.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr unsigned count() const { return x * y * z; }
};

namespace host {

constexpr int kWarpSize = 32;
constexpr size_t kRedZone = 128;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
  // Happens-before edges of this generation and the next, so that a thread that leaves late is not ordered after one
  // that has already arrived again.
  char edge[2] = {};
};

struct Warp {
  Barrier barrier;
  int size = 0, live = 0;
  // Values that lanes exchange in a shuffle. Two buffers, because a fast lane may begin the next shuffle.
  uint64_t slots[2][kWarpSize][8];
};

struct Block {
  dim3 index;
  int size = 0, live = 0;
  unsigned cluster = 0, rank = 0;  // cluster launches only
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> memory;
  char* shared = nullptr;  // dynamic shared memory, then static arrays; red zones between them
  size_t used = 0, capacity = 0;
  std::vector<std::pair<const void*, char*>> arrays;  // static arrays, by declaration

  ~Block() {
    if (memory) __asan_unpoison_memory_region(shared, capacity);
  }
  Block() = default;
  Block(Block&&) = default;
};

struct PendingCopy {
  void* to;
  const void* from;
  int bytes, group;
};

// A store in flight to a block of the cluster (st.async). It arrives when a thread waits for its mbarrier.
struct Delivery {
  void* to;
  uint64_t value;
  int bytes;
  uint64_t* mbarrier;
};

struct Thread {
  Stack stack;
  uint3 index;
  int linear = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  Barrier* waits_for = nullptr;
  unsigned generation = 0;  // of waits_for when the wait began
  const char* waits_in = "";
  bool done = false;
  std::vector<PendingCopy> copies;  // cp.async in flight
  int groups = 0;                   // committed groups
};

struct Options {
  uint64_t seed = 0;
  bool shuffle = false;     // random order of threads; half of the warps are held back at times
  long idle_passes = 2000;  // rounds in which threads only poll, before a deadlock is reported
  int multiprocessors = 132;
  int resident_blocks = 132;  // limit of a cooperative launch
  int placed_blocks = 0;      // blocks of a cooperative launch that run before the others begin; 0: all run together
  int capability = 90;
  size_t shared_memory = 227 << 10;  // largest of a block, bytes
  size_t static_shared = 16 << 10;
};

struct World {
  dim3 grid, block;
  const std::function<void()>* body = nullptr;
  Stack scheduler;
  Thread* running = nullptr;
  std::string error;
  long progress = 0;                      // counts all events except polls
  long passes = 0;                        // rounds of the scheduler, the clock of the device
  char start_edge = 0, end_edge = 0;      // happens-before edges of the start and end of the launch
  std::vector<Block*> blocks;             // resident blocks by linear index
  std::vector<Barrier> cluster_barriers;  // by cluster
  unsigned cluster_size = 1;
  std::vector<Delivery> deliveries;
  std::mt19937_64 random;  // decides if a store arrives at once
};

inline Options& options() {
  static Options value;
  return value;
}

inline World& world() {
  static World value;
  return value;
}

HOST_RAW inline void give_way() { switch_stack(world().running->stack, world().scheduler); }

HOST_RAW inline std::string describe(const Thread& t) {
  const dim3& b = t.block->index;
  return "block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) + ") thread " +
         std::to_string(t.linear);
}

// Ends the launch with an error.
[[noreturn]] HOST_RAW inline void fail(const std::string& message) {
  World& w = world();
  if (w.error.empty()) w.error = message + " [" + describe(*w.running) + "]";
  for (;;) give_way();
}

HOST_RAW inline void release_when_full(Barrier& barrier, int live) {
  if (barrier.arrived == 0 || barrier.arrived < live) return;
  barrier.arrived = 0;
  ++barrier.generation;
  ++world().progress;
}

HOST_RAW inline void arrive_and_wait(Barrier& barrier, int live, const char* name) {
  Thread* t = world().running;
  const unsigned generation = barrier.generation;
  char* edge = &barrier.edge[generation & 1];
  __tsan_release(edge);
  ++barrier.arrived;
  release_when_full(barrier, live);
  if (barrier.generation == generation) {
    t->waits_for = &barrier;
    t->generation = generation;
    t->waits_in = name;
    give_way();
  }
  __tsan_acquire(edge);
}

HOST_RAW inline void note_progress() { ++world().progress; }

// Yields. Polling loops call it once per poll.
HOST_RAW inline void poll() {
  world().running->waits_in = "a poll";
  give_way();
}

HOST_RAW inline void thread_main() {
  World& w = world();
  __tsan_acquire(&w.start_edge);
  (*w.body)();
  Thread* t = w.running;
  if (!t->copies.empty()) fail("the thread ends before its cp.async copies were waited for");
  t->done = true;
  ++w.progress;
  --t->block->live;
  --t->warp->live;
  release_when_full(t->block->barrier, t->block->live);
  release_when_full(t->warp->barrier, t->warp->live);
  __tsan_release(&w.end_edge);
  for (;;) give_way();
}

// Runs the threads of a set of resident blocks.
class Scheduler {
 public:
  HOST_RAW explicit Scheduler(std::vector<Block>& blocks)
      : threads_(blocks.size() * world().block.count()), warps_((world().block.count() + kWarpSize - 1) / kWarpSize) {
    const dim3 shape = world().block;
    size_t k = 0;
    for (Block& block : blocks) {
      for (unsigned i = 0; i < shape.count(); ++i, ++k) {
        Thread& t = threads_[k];
        t.block = &block;
        t.warp = &block.warps[i / kWarpSize];
        t.linear = static_cast<int>(i);
        t.index = {i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y)};
        order_.push_back(static_cast<int>(k));
      }
    }
    held_.assign(blocks.size() * warps_, 0);
  }

  HOST_RAW void run() {
    World& w = world();
#if HOST_TSAN
    w.scheduler.tsan = __tsan_get_current_fiber();
#endif
    __tsan_release(&w.start_edge);
    for (Thread& t : threads_) t.stack.start(thread_main);
    left_ = threads_.size();
    if (options().shuffle) hold_back(true);
    while (left_ && w.error.empty()) pass();
    __tsan_acquire(&w.end_edge);
    for (Thread& t : threads_) t.stack.end(t.done);
  }

 private:
  // Runs every runnable thread once, until it yields.
  HOST_RAW void pass() {
    World& w = world();
    const long before = w.progress;
    bool ran = false, held = false;
    ++w.passes;
    if (options().shuffle) std::shuffle(order_.begin(), order_.end(), random_);
    for (int i : order_) {
      Thread& t = threads_[i];
      if (t.done || (t.waits_for && t.waits_for->generation == t.generation)) continue;
      if (held_[i / w.block.count() * warps_ + t.linear / kWarpSize]) {
        held = true;
        continue;
      }
      t.waits_for = nullptr;
      w.running = &t;
      ran = true;
      switch_stack(w.scheduler, t.stack);
      left_ -= t.done;
      if (!w.error.empty()) return;
    }
    const bool stuck = !ran || w.progress == before;
    idle_ = stuck ? idle_ + 1 : 0;
    if (held && stuck) return hold_back(idle_ < 64);
    if (left_ && stuck && (!ran || idle_ > options().idle_passes)) w.error = deadlock();
  }

  // Holds back a random half of the warps, or none. The others run ahead until they block, which exposes missing waits.
  HOST_RAW void hold_back(bool half) {
    for (char& held : held_) held = half && (random_() & 1);
  }

  HOST_RAW std::string deadlock() const {
    std::string text = "deadlock: ";
    int named = 0;
    for (const Thread& t : threads_) {
      if (t.done || named++ >= 3) continue;
      text += describe(t) + " waits in " + t.waits_in + "; ";
    }
    return text;
  }

  std::vector<Thread> threads_;
  size_t warps_;  // per block
  std::vector<int> order_;
  std::vector<char> held_;  // by warp
  std::mt19937_64 random_{options().seed};
  size_t left_ = 0;
  long idle_ = 0;
};

inline void prepare_block(Block& b, int id, size_t dynamic_shared) {
  const World& w = world();
  b.index = dim3(id % w.grid.x, id / w.grid.x % w.grid.y, id / (w.grid.x * w.grid.y));
  b.cluster = id / w.cluster_size;
  b.rank = id % w.cluster_size;
  b.size = b.live = static_cast<int>(w.block.count());
  b.warps.resize((b.size + kWarpSize - 1) / kWarpSize);
  for (int i = 0; i < b.size; ++i) {
    ++b.warps[i / kWarpSize].size;
    ++b.warps[i / kWarpSize].live;
  }
  b.capacity = dynamic_shared + options().static_shared + 4 * kRedZone;
  b.memory.reset(new char[b.capacity + kRedZone]);
  const uintptr_t address = reinterpret_cast<uintptr_t>(b.memory.get());
  b.shared = b.memory.get() + (kRedZone - address % kRedZone) % kRedZone;
  std::memset(b.shared, 0xFF, b.capacity);  // NaN in every floating-point type
  b.used = (dynamic_shared + kRedZone - 1) / kRedZone * kRedZone + kRedZone;
  __asan_poison_memory_region(b.shared + dynamic_shared, b.capacity - dynamic_shared);
}

// Runs a launch; returns the error, or "". together: all blocks are resident at once (cooperative launch) or all blocks
// of a cluster (cluster launch); else blocks run one after another.
inline std::string launch(dim3 grid,
                          dim3 block,
                          size_t dynamic_shared,
                          bool together,
                          unsigned cluster_size,
                          const std::function<void()>& body) {
  World& w = world();
  const int count = static_cast<int>(grid.count());
  if (block.count() > 1024) return "a block has at most 1024 threads, got " + std::to_string(block.count());
  if (dynamic_shared > options().shared_memory)
    return "a block has less shared memory than " + std::to_string(dynamic_shared) + " bytes";
  if (grid.x % cluster_size) return "grid.x is not a multiple of the cluster size";
  if (together && cluster_size == 1 && count > options().resident_blocks) {
    return "a cooperative launch of " + std::to_string(count) + " blocks exceeds the resident blocks";
  }
  w.grid = grid;
  w.block = block;
  w.cluster_size = cluster_size;
  w.body = &body;
  w.error.clear();
  w.deliveries.clear();
  w.random.seed(options().seed + 2);
  // Clusters run in any order. The blocks of one keep theirs: they must be resident together.
  const int size = static_cast<int>(cluster_size);
  std::vector<int> clusters(count / size), ids(count);
  std::iota(clusters.begin(), clusters.end(), 0);
  std::mt19937_64 random(options().seed + 1);
  if (options().shuffle) std::shuffle(clusters.begin(), clusters.end(), random);
  for (int i = 0; i < count; ++i) ids[i] = clusters[i / size] * size + i % size;
  const int placed = options().placed_blocks ? std::min(options().placed_blocks, count) : count;
  const size_t most = together ? (cluster_size > 1 ? cluster_size : placed) : 1;
  for (size_t first = 0, at_once; first < ids.size() && w.error.empty(); first += at_once) {
    at_once = std::min(most, ids.size() - first);
    std::vector<Block> blocks(at_once);
    w.blocks.assign(count, nullptr);
    w.cluster_barriers.assign(count / cluster_size, Barrier());
    for (size_t k = 0; k < at_once; ++k) {
      prepare_block(blocks[k], ids[first + k], dynamic_shared);
      w.blocks[ids[first + k]] = &blocks[k];
    }
    Scheduler(blocks).run();
    if (w.error.empty() && !w.deliveries.empty()) w.error = "store_async: stores in flight to blocks that have ended";
  }
  return w.error;
}

// Returns the static shared array of a declaration in the running block.
HOST_RAW inline void* shared_array(const void* declaration, size_t bytes) {
  const Unseen unseen;
  Block& b = *world().running->block;
  for (auto& [key, array] : b.arrays) {
    if (key == declaration) return array;
  }
  if (b.used + bytes + kRedZone > b.capacity) fail("static shared memory exceeds options().static_shared");
  char* array = b.shared + b.used;
  __asan_unpoison_memory_region(array, bytes);
  b.used += (bytes + kRedZone - 1) / kRedZone * kRedZone + kRedZone;
  b.arrays.emplace_back(declaration, array);
  return array;
}

// Returns the values of all lanes. Shuffles, votes and matrix instructions are built on it.
template <class T>
HOST_RAW std::array<T, kWarpSize> exchange(unsigned mask, const T& value, const char* name) {
  static_assert(sizeof(T) <= sizeof(uint64_t[8]));
  const Unseen unseen;
  Warp& warp = *world().running->warp;
  const int lane = world().running->linear % kWarpSize;
  const unsigned all = warp.size == kWarpSize ? ~0u : (1u << warp.size) - 1;
  if ((mask & all) != all) fail(std::string(name) + ": a mask without all lanes is not modelled");
  if (warp.live != warp.size) fail(std::string(name) + ": a lane of the mask has ended");
  auto& slots = warp.slots[warp.barrier.generation & 1];
  std::memcpy(slots[lane], &value, sizeof(T));
  arrive_and_wait(warp.barrier, warp.live, name);
  std::array<T, kWarpSize> seen;
  for (int k = 0; k < kWarpSize; ++k) std::memcpy(&seen[k], slots[k < warp.size ? k : lane], sizeof(T));
  return seen;
}

}  // namespace host
