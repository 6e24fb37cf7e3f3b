// Runs csrc/cpu/runtime/team.cpp with late members. Checks that every share of every step is computed exactly once,
// after all shares of the previous step. On failure it prints a sentence and exits with 1.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

// The team's clock. The second poll of a holding thread returns a time past spin_timeout, and only after all other
// threads have passed the barrier: the last moment at which it can time out.
struct HeldClock : std::chrono::steady_clock {
  static thread_local int polls_left;  // until this thread holds; 0: it does not
  static std::atomic<bool> holding;
  static std::atomic<int64_t> passed, others;

  static time_point now() {
    if (polls_left == 0 || --polls_left > 0) return steady_clock::now();
    holding = true;
    while (passed < others) std::this_thread::yield();
    return steady_clock::now() + std::chrono::hours(1);
  }
};
thread_local int HeldClock::polls_left = 0;
std::atomic<bool> HeldClock::holding{false};
std::atomic<int64_t> HeldClock::passed{0}, HeldClock::others{0};

}  // namespace

#define FASTSEQ_CLOCK ::HeldClock
#include "cpu/runtime/team.cpp"

using fastseq::cpu::ThreadTeam;

namespace {

constexpr int64_t kMostMembers = 6, kSteps = 40;

struct Scenario {
  const char* name;
  int64_t members, threads;  // each thread represents members / threads members
  int64_t late;              // index of the thread that sleeps, or -1
  int64_t step;              // step before which it sleeps, or -1: before join()
  std::chrono::microseconds sleep = std::chrono::milliseconds(20);
  bool hold = false;  // the first thread holds its clock at the first barrier, which the last thread then completes
};

// Number of times each share of each step was computed. Plain integers, so that ThreadSanitizer reports accesses that
// no barrier orders.
struct Work {
  int done[kSteps][kMostMembers] = {};
  bool in_order[kMostMembers];
  std::atomic<int64_t> ready{0};     // running threads: starting one takes longer than spin_timeout
  std::atomic<int64_t> finished{0};  // threads that took part in every step
};

void sleep_if_late(const Scenario& scenario, int64_t thread, int64_t step) {
  if (thread == scenario.late && step == scenario.step) std::this_thread::sleep_for(scenario.sleep);
}

// Calls the team as every kernel does: join, then all shares of each step, with a barrier after each step.
void run_thread(const Scenario& scenario, int64_t thread, ThreadTeam& team, Work& work) {
  const int64_t each = scenario.members / scenario.threads;
  ++work.ready;
  while (work.ready < scenario.threads) std::this_thread::yield();
  sleep_if_late(scenario, thread, -1);
  ThreadTeam::Share share = team.join(thread * each, (thread + 1) * each);
  if (share.begin == share.end) return;
  if (scenario.hold && thread == 0) HeldClock::polls_left = 2;
  for (int64_t step = 0; step < kSteps; ++step) {
    sleep_if_late(scenario, thread, step);
    for (int64_t member = share.begin; member < share.end; ++member) {
      for (int64_t other = 0; step > 0 && other < scenario.members; ++other) {
        if (work.done[step - 1][other] != 1) work.in_order[member] = false;
      }
      ++work.done[step][member];
    }
    const bool completes = scenario.hold && step == 0 && thread == scenario.threads - 1;
    while (completes && !HeldClock::holding) std::this_thread::yield();
    if (!team.wait(share)) return;
    ++HeldClock::passed;
  }
  ++work.finished;
}

int together = 0;   // runs of several threads without a timeout
int timed_out = 0;  // runs with a timeout

bool check(const Scenario& scenario) {
  ThreadTeam team(scenario.members);
  Work work;
  for (bool& in_order : work.in_order) in_order = true;
  HeldClock::holding = false, HeldClock::passed = 0, HeldClock::others = scenario.threads - 1;
  fastseq::cpu::oversubscribed_until = fastseq::cpu::period = 0;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < scenario.threads; ++i) {
    threads.emplace_back([&, i] { run_thread(scenario, i, team, work); });
  }
  for (std::thread& thread : threads) thread.join();
  const bool all = work.finished == scenario.threads;
  if (scenario.threads > 1 && all) ++together;
  if (!all) ++timed_out;
  for (int64_t member = 0; member < scenario.members; ++member) {
    for (int64_t step = 0; step < kSteps; ++step) {
      if (work.done[step][member] == 1 && work.in_order[member]) continue;
      std::printf("%s: share %d of step %d was computed %d times%s\n", scenario.name, int(member), int(step),
                  work.done[step][member], work.in_order[member] ? "" : ", too early");
      return false;
    }
  }
  // A timeout means that the machine is oversubscribed.
  if (all || fastseq::cpu::oversubscribed_until > 0) return true;
  std::printf("%s: the machine should count as oversubscribed\n", scenario.name);
  return false;
}

// The milliseconds for which the machine counts as oversubscribed after a timeout that comes `pause` after the end of
// the period before.
double period_after(std::chrono::milliseconds pause) {
  using Clock = fastseq::cpu::Clock;
  fastseq::cpu::oversubscribed_until = (Clock::now() - pause).time_since_epoch().count();
  fastseq::cpu::note_oversubscription();
  return std::chrono::duration<double, std::milli>(Clock::duration(fastseq::cpu::period.load())).count();
}

bool check_periods() {
  constexpr std::chrono::milliseconds at_once{0}, later{500};
  fastseq::cpu::period = 0;
  for (const double expected : {2, 4, 8, 16, 32, 64, 128, 128}) {
    const double period = period_after(at_once);
    if (period == expected) continue;
    std::printf("oversubscribed for %g ms after a timeout, expected %g\n", period, expected);
    return false;
  }
  const double within = period_after(-later), period = period_after(later);
  if (within == 128 && period == 2) return true;
  std::printf("oversubscribed for %g ms after a timeout within a period, expected 128; for %g ms later, expected 2\n",
              within, period);
  return false;
}

}  // namespace

int main() {
  if (!check_periods()) return 1;
  const Scenario scenarios[] = {
      {"one thread for all", 6, 1, -1, 0},
      {"two threads", 2, 2, -1, 0},
      {"two threads for six", 6, 2, -1, 0},
      {"three threads", 6, 3, -1, 0},
      {"a thread for each", 6, 6, -1, 0},
      {"the first is late to join", 6, 3, 0, -1},
      {"the last is late to join", 6, 3, 2, -1},
      {"the first is late to the first barrier", 6, 3, 0, 0},
      {"the first is late to a barrier", 6, 2, 0, 20},
      {"another is late to a barrier", 6, 3, 1, 20},
      {"one of six is late to a barrier", 6, 6, 4, 20},
      {"the last is late to the last barrier", 6, 3, 2, kSteps - 1},
  };
  for (const Scenario& scenario : scenarios) {
    timed_out = 0;
    for (int round = 0; round < 10; ++round) {
      if (!check(scenario)) return 1;
    }
    if (scenario.late < 0 || timed_out > 0) continue;
    std::printf("%s: no timeout in 10 runs\n", scenario.name);
    return 1;
  }
  for (int round = 0; round < 300; ++round) {  // arrives while the others time out
    if (!check({"late by about the timeout", 6, 3, round % 3, round % 5 - 1, fastseq::cpu::spin_timeout * round / 300}))
      return 1;
  }
  fastseq::cpu::spin_timeout = std::chrono::seconds(10);  // no timeout, however busy the machine
  for (int round = 0; round < 20; ++round) {
    if (!check({"times out when all have passed", 6, 3, -1, 0, {}, true})) return 1;
  }
  together = 0;
  for (int round = 0; round < 20; ++round) {
    if (!check({"two that stay together", 2, 2, -1, 0}) || !check({"three that stay together", 6, 3, -1, 0})) return 1;
  }
  if (together == 40) return 0;
  std::printf("only %d of 40 runs stayed together\n", together);
  return 1;
}
