// A team of threads that runs one recurrence in lockstep. Each thread has a share of the hidden units.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastseq::cpu {

class ThreadTeam {
 public:
  // Shares [begin, end) of `members` that one thread computes; empty if begin == end.
  struct Share {
    int64_t begin, end;
    int64_t barriers;  // passed by this thread
  };

  explicit ThreadTeam(int64_t members) : members_(members) {}

  // Each thread calls this once with the member range it represents; the runtime may start fewer threads than
  // requested. Blocks until all members have arrived. On timeout the first arrival takes every share, and late threads
  // get an empty one.
  Share join(int64_t begin, int64_t end);

  // Barrier of all members. Returns true if this thread continues. On an oversubscribed machine a member may be
  // descheduled for a time slice; on timeout the member with share 0 continues with all shares, and the others stop.
  bool wait(Share& share);

  // True for 2 to 128 ms after a timeout: one thread is faster than a team for now.
  static bool oversubscribed();

 private:
  enum State { kGathering, kTogether, kAlone };

  const int64_t members_;
  std::atomic<int64_t> present_{0};
  std::atomic<int> state_{kGathering};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> alone_after_{INT64_MAX};  // last barrier before share 0 continues alone
};

}  // namespace fastseq::cpu
