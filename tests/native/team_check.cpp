// Runs csrc/cpu/team.cpp with members that come late, and checks that every share of every step is done exactly once,
// after all shares of the step before. Exits with 1 and a sentence where that is not so.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

// The clock of the team. A thread that holds finds its second look to be late, and gets the answer only when
// everybody else has passed the barrier: the last moment at which it can give somebody up.
struct HeldClock : std::chrono::steady_clock {
  static thread_local int looks_left;  // 0: does not hold
  static std::atomic<bool> holding;
  static std::atomic<int64_t> passed, others;

  static time_point now() {
    if (looks_left == 0 || --looks_left > 0) return steady_clock::now();
    holding = true;
    while (passed < others) std::this_thread::yield();
    return steady_clock::now() + std::chrono::hours(1);
  }
};
thread_local int HeldClock::looks_left = 0;
std::atomic<bool> HeldClock::holding{false};
std::atomic<int64_t> HeldClock::passed{0}, HeldClock::others{0};

}  // namespace

#define FASTSEQ_CLOCK ::HeldClock
#include "../csrc/cpu/team.cpp"

using fastseq::Team;

namespace {

constexpr int64_t kMostMembers = 6, kSteps = 40;

struct Scenario {
  const char* name;
  int64_t members, threads;  // each thread stands for members / threads members
  int64_t late;              // the thread that sleeps, or -1
  int64_t step;              // before which step it does, or -1: before it joins
  std::chrono::microseconds sleep = std::chrono::milliseconds(20);
  bool hold = false;  // the first thread holds its clock at the first barrier, which the last one completes then
};

// How often each share of each step was done. Plain integers: ThreadSanitizer reports what no barrier orders.
struct Work {
  int done[kSteps][kMostMembers] = {};
  bool in_order[kMostMembers];
  std::atomic<int64_t> ready{0};       // threads that run: starting one takes longer than a team waits
  std::atomic<int64_t> at_the_end{0};  // threads that took part in every step
};

void sleep_if_late(const Scenario& scenario, int64_t thread, int64_t step) {
  if (thread == scenario.late && step == scenario.step) std::this_thread::sleep_for(scenario.sleep);
}

// What every kernel does: join, then share by share, step by step, with a barrier after each.
void run_thread(const Scenario& scenario, int64_t thread, Team& team, Work& work) {
  const int64_t each = scenario.members / scenario.threads;
  ++work.ready;
  while (work.ready < scenario.threads) std::this_thread::yield();
  sleep_if_late(scenario, thread, -1);
  Team::Share share = team.join(thread * each, (thread + 1) * each);
  if (share.begin == share.end) return;
  if (scenario.hold && thread == 0) HeldClock::looks_left = 2;
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
  ++work.at_the_end;
}

int together = 0;  // runs of several threads in which none was given up
int given_up = 0;  // runs in which somebody was

bool check(const Scenario& scenario) {
  Team team(scenario.members);
  Work work;
  for (bool& in_order : work.in_order) in_order = true;
  HeldClock::holding = false, HeldClock::passed = 0, HeldClock::others = scenario.threads - 1;
  fastseq::crowded_until = 0;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < scenario.threads; ++i) {
    threads.emplace_back([&, i] { run_thread(scenario, i, team, work); });
  }
  for (std::thread& thread : threads) thread.join();
  const bool all = work.at_the_end == scenario.threads;
  if (scenario.threads > 1 && all) ++together;
  if (!all) ++given_up;
  for (int64_t member = 0; member < scenario.members; ++member) {
    for (int64_t step = 0; step < kSteps; ++step) {
      if (work.done[step][member] == 1 && work.in_order[member]) continue;
      std::printf("%s: share %d of step %d was done %d times%s\n", scenario.name, int(member), int(step),
                  work.done[step][member], work.in_order[member] ? "" : ", too early");
      return false;
    }
  }
  // Whoever was given up is a sign of a crowded machine.
  if (all || fastseq::crowded_until > 0) return true;
  std::printf("%s: the machine should count as crowded\n", scenario.name);
  return false;
}

}  // namespace

int main() {
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
    given_up = 0;
    for (int round = 0; round < 10; ++round) {
      if (!check(scenario)) return 1;
    }
    if (scenario.late < 0 || given_up > 0) continue;
    std::printf("%s: nobody was given up in 10 runs\n", scenario.name);
    return 1;
  }
  for (int round = 0; round < 300; ++round) {  // arrives while the others give it up
    if (!check({"late by as much as is waited for", 6, 3, round % 3, round % 5 - 1, fastseq::late_after * round / 300}))
      return 1;
  }
  fastseq::late_after = std::chrono::seconds(10);  // nobody is given up, however busy the machine
  for (int round = 0; round < 20; ++round) {
    if (!check({"gives one up when all have passed", 6, 3, -1, 0, {}, true})) return 1;
  }
  together = 0;
  for (int round = 0; round < 20; ++round) {
    if (!check({"two that stay together", 2, 2, -1, 0}) || !check({"three that stay together", 6, 3, -1, 0})) return 1;
  }
  if (together == 40) return 0;
  std::printf("only %d of 40 runs stayed together\n", together);
  return 1;
}
