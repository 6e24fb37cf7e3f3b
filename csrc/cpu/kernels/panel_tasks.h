// How the members of a team divide a product among each other: by panels, and by rows where there are fewer panels.
#pragma once

#include <cstdint>

#include "cpu/runtime/team.h"

namespace fastseq::cpu {

// The tasks of one member: a panel of the weight and a range of rows each.
class PanelTasks {
 public:
  static constexpr int64_t kRows = 3;  // of a task at least: fewer wait for the panel
  struct Task {
    int64_t panel, row, rows;  // first row, number of rows
  };

  PanelTasks(int64_t panels, int64_t rows, int64_t members, const ThreadTeam::Share& share) : rows_(rows) {
    if (0 < panels && panels < members) groups_ = (members + panels - 1) / panels;
    if (groups_ > rows / kRows) groups_ = rows < kRows ? 1 : rows / kRows;
    first_ = panels * groups_ * share.begin / members;
    last_ = panels * groups_ * share.end / members;
  }

  int64_t count() const { return last_ - first_; }
  // The k-th task of a step. The order alternates, so that a step begins with panels that the step before left in the
  // L2 cache.
  Task at(int64_t k, int64_t step) const {
    const int64_t task = step % 2 == 0 ? first_ + k : last_ - 1 - k, group = task % groups_;
    const int64_t row = rows_ * group / groups_;
    return {task / groups_, row, rows_ * (group + 1) / groups_ - row};
  }

 private:
  int64_t rows_, groups_ = 1;  // groups: row ranges of one panel
  int64_t first_, last_;
};

}  // namespace fastseq::cpu
