#include "cpu/runtime/team.h"

#include <algorithm>
#include <chrono>
#include <thread>

#ifndef FASTSEQ_CLOCK  // tests define another clock
#define FASTSEQ_CLOCK std::chrono::steady_clock
#endif

namespace fastseq::cpu {
namespace {

using Clock = FASTSEQ_CLOCK;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// A running member arrives within about a microsecond, a descheduled one takes milliseconds.
microseconds spin_timeout{500};  // a variable, so that tests can change it
// After a timeout the machine counts as oversubscribed. The period doubles if the next timeout follows its end within
// its own length and a time slice of the scheduler: a single descheduling costs the shortest one.
constexpr Clock::duration kShortestPeriod = milliseconds(2), kLongestPeriod = milliseconds(128);
constexpr Clock::duration kTimeSlice = milliseconds(8);
constexpr int kBusySpins = 200;      // before the first pause, which takes up to 140 cycles
constexpr int kPausesPerPoll = 100;  // between two polls of the clock

std::atomic<int64_t> oversubscribed_until{0}, period{0};  // in ticks of Clock

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void note_oversubscription() {
  const int64_t now = Clock::now().time_since_epoch().count(), until = oversubscribed_until.load();
  if (now < until) return;
  const int64_t last = period.load(), shortest = kShortestPeriod.count(), longest = kLongestPeriod.count();
  const bool again = now < until + last + kTimeSlice.count();
  period.store(again ? std::clamp(2 * last, shortest, longest) : shortest);
  oversubscribed_until.store(now + period.load());
}

// Spins until done(). After spin_timeout, calls late() once per poll.
template <class Done, class Late>
void spin(const Done& done, const Late& late) {
  for (int i = 0; i < kBusySpins; ++i) {
    if (done()) return;
  }
  const auto limit = Clock::now() + spin_timeout;
  while (!done()) {
    for (int i = 0; i < kPausesPerPoll && !done(); ++i) pause();
    if (Clock::now() < limit) continue;
    late();
    std::this_thread::yield();
  }
}

}  // namespace

bool ThreadTeam::oversubscribed() {
  return Clock::now().time_since_epoch().count() < oversubscribed_until.load(std::memory_order_relaxed);
}

ThreadTeam::Share ThreadTeam::join(int64_t begin, int64_t end) {
  const Share all_shares{0, members_, 0}, no_share{0, 0, 0};
  const int64_t before = present_.fetch_add(end - begin, std::memory_order_acq_rel);
  const bool first = before == 0;
  int expected = kGathering;
  if (before + (end - begin) == members_) state_.compare_exchange_strong(expected, kTogether);
  spin([&] { return state_.load(std::memory_order_acquire) != kGathering; },
       [&] {
         int gathering = kGathering;
         if (first && state_.compare_exchange_strong(gathering, kAlone)) note_oversubscription();
       });
  if (state_.load(std::memory_order_acquire) == kTogether) return {begin, end, 0};
  return first ? all_shares : no_share;
}

bool ThreadTeam::wait(Share& share) {
  const int64_t count = share.end - share.begin;
  if (count == members_) return true;
  const int64_t barrier = ++share.barriers;
  arrived_.fetch_add(count, std::memory_order_acq_rel);
  spin([&] { return arrived_.load(std::memory_order_acquire) >= barrier * members_; },
       [&] {
         // Takes effect one barrier later, where every member is certain to read it.
         int64_t never = INT64_MAX;
         if (alone_after_.compare_exchange_strong(never, barrier + 1)) note_oversubscription();
       });
  if (alone_after_.load(std::memory_order_acquire) > barrier) return true;
  if (share.begin > 0) return false;
  share.end = members_;
  return true;
}

}  // namespace fastseq::cpu
