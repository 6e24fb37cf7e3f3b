// Launcher of the recurrence in clusters.
#include "launch.cuh"
#include "lstm.h"

namespace fastseq::cuda {

bool lstm_cluster_forward_fits(const LstmShape&, Type) { return false; }

size_t lstm_cluster_forward_workspace(const LstmShape&, Type) { return 0; }

std::string launch_lstm_cluster_forward(const LstmForward&, Type, Stream) { return "not built"; }

}  // namespace fastseq::cuda
