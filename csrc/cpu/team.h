// Threads that run one recurrence in lockstep, each with its share of the hidden units.
#pragma once

#include <atomic>
#include <cstdint>

namespace fastseq {

class Team {
 public:
  // What one caller does: shares [begin, end) of `members`, or nothing.
  struct Share {
    int64_t begin, end;
    int64_t barriers;  // passed so far
  };

  explicit Team(int64_t members) : members_(members) {}

  // Called once by every thread of the team, with the members that it stands for: a parallel region may bring fewer
  // threads than asked for. Waits for all; whoever is not there in time is left out, and the first to come does the
  // work of all.
  Share join(int64_t begin, int64_t end);

  // Waits for all members and returns whether to go on. On a machine with more running threads than cores a member may
  // be away for a time slice; then the member with share 0 goes on with all shares, and the others are done.
  bool wait(Share& share);

  // Whether a barrier was that late a short while ago, so that one thread is the better choice for now.
  static bool machine_is_crowded();

 private:
  enum State { kGathering, kTogether, kAlone };

  const int64_t members_;
  std::atomic<int64_t> present_{0};
  std::atomic<int> state_{kGathering};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> alone_after_{INT64_MAX};  // the barrier after which share 0 goes on by itself
};

}  // namespace fastseq
