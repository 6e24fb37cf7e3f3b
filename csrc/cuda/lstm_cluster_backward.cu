// Launcher of the backward recurrence in clusters.
#include "launch.cuh"
#include "lstm.h"

namespace fastseq::cuda {

bool lstm_cluster_backward_fits(const LstmShape&, Type) { return false; }

size_t lstm_cluster_backward_workspace(const LstmShape&, Type) { return 0; }

std::string launch_lstm_cluster_backward(const LstmBackward&, Type, Stream) { return "not built"; }

}  // namespace fastseq::cuda
