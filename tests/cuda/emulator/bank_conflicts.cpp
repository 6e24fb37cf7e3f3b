// Counts the wavefronts of the shared-memory accesses of the recurrences, from their own index functions. A line for
// each access: wavefronts of a warp, the least possible number, name. A bank serves one 4-byte word in a wavefront;
// accesses of 8 bytes are served by half warps, of 16 bytes by quarters (CUDA programming guide, "Shared Memory").
#include <algorithm>
#include <cstdio>
#include <functional>
#include <set>
#include <vector>

#include "cuda/lstm/cluster_backward.cuh"
#include "cuda/lstm/cluster_forward.cuh"
#include "cuda/lstm/grid_backward_layout.cuh"
#include "cuda/lstm/grid_forward_layout.cuh"

using namespace fastseq::cuda;

// place(lane): in units of `bytes`
static void count(const char* name, int bytes, const std::function<int(int)>& place) {
  const int lanes = 32 * 4 / std::max(bytes, 4);
  int wavefronts = 0;
  for (int first = 0; first < 32; first += lanes) {
    std::vector<std::set<int>> banks(32);
    for (int lane = first; lane < first + lanes; ++lane) {
      for (int word = 0; word < bytes / 4; ++word) {
        const int at = place(lane) * (bytes / 4) + word;
        banks[at % 32].insert(at);
      }
    }
    size_t most = 0;
    for (const std::set<int>& words : banks) most = std::max(most, words.size());
    wavefronts += static_cast<int>(most);
  }
  std::printf("%d %d %s\n", wavefronts, 32 / lanes, name);
}

static void clusters() {
  using namespace cluster;
  for (int half = 0; half < 2; ++half) {
    count("cluster forward, B fragments", 8, [=](int lane) { return read_place(lane / 4, lane % 4, half); });
  }
  for (int step = 0; step < 8; ++step) {
    count("cluster backward, B fragments", 8, [=](int lane) { return gradient_place(step, lane % 4, lane / 4); });
  }
  for (int warp = 0; warp < 8; ++warp) {
    count("cluster backward, staged gradients of 16 bits", 8,
          [=](int unit) { return unit / 4 * 32 + gradient_place(unit / 4, unit % 4, warp); });
    for (int part = 0; part < 2; ++part) {
      count("cluster backward, staged gradients of floats", 8, [=](int unit) {
        const int piece = 2 * unit + part;
        return piece / 4 * 32 + gradient_place(piece / 4, piece % 4, warp);
      });
    }
  }
}

static void grids() {
  {
    using namespace grid_forward;
    for (int e = 0; e < 2; ++e) {
      count("grid forward, sums written", 16,
            [=](int lane) { return static_cast<int>(Shared<1>::at(0, 0, 2 * (lane % 4) + e, lane / 4)) / 4; });
    }
    count("grid forward, sums read", 16,
          [](int thread) { return static_cast<int>(Shared<1>::at(0, 0, thread / kUnits, thread % kUnits)) / 4; });
    count("grid forward, sums of two groups read", 16, [](int thread) {
      const int row = thread / (2 * kUnits), unit = thread % (2 * kUnits);
      return static_cast<int>(Shared<2>::at(0, unit / kUnits, row, unit % kUnits)) / 4;
    });
  }
  using Block = grid_backward::Block<grid_backward::MmaHalf<bf16>, 1>;
  for (int k = 0; k < 4; ++k) {
    count("grid backward, sums written", 4,
          [=](int lane) { return (2 * (lane % 4) + k % 2) * Block::kStride + lane / 4 + k / 2 * 8; });
  }
  count("grid backward, sums read", 4,
        [](int thread) { return thread / Block::kBlockUnits * Block::kStride + thread % Block::kBlockUnits; });
}

int main() {
  clusters();
  grids();
}
