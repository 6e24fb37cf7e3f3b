#include "team.h"

#include <chrono>
#include <thread>

#ifndef FASTSEQ_CLOCK  // tests bring their own
#define FASTSEQ_CLOCK std::chrono::steady_clock
#endif

namespace fastseq {
namespace {

using Clock = FASTSEQ_CLOCK;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// A member that is running arrives within a microsecond or so; one that was put to sleep takes milliseconds.
microseconds late_after{500};  // a variable for the tests' sake
constexpr auto kCrowdedFor = milliseconds(100);
constexpr int kBusySpins = 200;  // before the first pause, which takes up to 140 cycles
constexpr int kSpins = 100;      // between two looks at the clock

std::atomic<int64_t> crowded_until{0};  // in ticks of Clock

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void note_crowd() {
  crowded_until.store((Clock::now() + kCrowdedFor).time_since_epoch().count(), std::memory_order_relaxed);
}

// Spins until done(); calls late() again and again once late_after has passed.
template <class Done, class Late>
void spin(const Done& done, const Late& late) {
  for (int i = 0; i < kBusySpins; ++i) {
    if (done()) return;
  }
  const auto limit = Clock::now() + late_after;
  while (!done()) {
    for (int i = 0; i < kSpins && !done(); ++i) pause();
    if (Clock::now() < limit) continue;
    late();
    std::this_thread::yield();
  }
}

}  // namespace

bool Team::machine_is_crowded() {
  return Clock::now().time_since_epoch().count() < crowded_until.load(std::memory_order_relaxed);
}

Team::Share Team::join(int64_t begin, int64_t end) {
  const Share everything{0, members_, 0}, nothing{0, 0, 0};
  const int64_t before = present_.fetch_add(end - begin, std::memory_order_acq_rel);
  const bool first = before == 0;
  int expected = kGathering;
  if (before + (end - begin) == members_) state_.compare_exchange_strong(expected, kTogether);
  spin([&] { return state_.load(std::memory_order_acquire) != kGathering; },
       [&] {
         int gathering = kGathering;
         if (first && state_.compare_exchange_strong(gathering, kAlone)) note_crowd();
       });
  if (state_.load(std::memory_order_acquire) == kTogether) return {begin, end, 0};
  return first ? everything : nothing;
}

bool Team::wait(Share& share) {
  const int64_t count = share.end - share.begin;
  if (count == members_) return true;
  const int64_t barrier = ++share.barriers;
  arrived_.fetch_add(count, std::memory_order_acq_rel);
  spin([&] { return arrived_.load(std::memory_order_acquire) >= barrier * members_; },
       [&] {
         // Takes effect one barrier later: by then every member must have seen it.
         int64_t never = INT64_MAX;
         if (alone_after_.compare_exchange_strong(never, barrier + 1)) note_crowd();
       });
  if (alone_after_.load(std::memory_order_acquire) > barrier) return true;
  if (share.begin > 0) return false;
  share.end = members_;
  return true;
}

}  // namespace fastseq
