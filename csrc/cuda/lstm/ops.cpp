// Operators lstm_recurrence_{forward,backward,fits} on CUDA: checks, outputs, choice of the kernel.
#include "cuda/lstm/params.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/common/operators.h"
#include "cuda/common/stall.h"
#include "cuda/lstm/cost.h"
#include "cuda/lstm/step_loop.h"
#include "cuda/lstm/steps.h"

namespace fastseq::cuda {
namespace {

// FASTSEQ_LSTM_KERNEL=grid|cluster|steps restricts the choice, for tests and measurements. Unset: all are allowed.
std::string_view demanded() {
  const char* name = std::getenv("FASTSEQ_LSTM_KERNEL");
  return name ? name : "";
}

bool allowed(std::string_view kernel) { return demanded().empty() || kernel == demanded(); }

// FASTSEQ_SPIN_TIMEOUT in units of SpinLimit: seconds that a block waits for another one; 0: for ever. Default: ten
// minutes, because a collective of another process may hold multiprocessors while that process writes a checkpoint.
unsigned spin_limit() {
  const char* text = std::getenv("FASTSEQ_SPIN_TIMEOUT");
  if (!text || !*text) text = "600";
  char* end = nullptr;
  const double seconds = std::strtod(text, &end);
  STD_TORCH_CHECK(*end == 0 && seconds >= 0 && seconds <= 30000, "FASTSEQ_SPIN_TIMEOUT must be between 0 and 30000 ",
                  "seconds, 0 to wait for ever, got '", text, "'");
  constexpr double kUnit = 0x1p24 * 1e-9;  // seconds
  return seconds == 0 ? 0 : std::max(1u, static_cast<unsigned>(seconds / kUnit));
}

// Raises once for all kernels that have ended so; again if one of them was still running. None of this call has begun.
void check_no_stall(const char* op) {
  STD_TORCH_CHECK(!take_stall(), op,
                  ": an earlier LSTM of this process waited longer than FASTSEQ_SPIN_TIMEOUT allows "
                  "for multiprocessors that other kernels held; numbers that it did not compute are NaN. Set "
                  "FASTSEQ_SPIN_TIMEOUT to more seconds, or run the LSTM and the collective on the same stream");
}

LstmShape shape_of(const char* op,
                   const Tensor& c0,
                   const Tensor& weight_hh,
                   int64_t steps,
                   const OptionalTensor& lengths,
                   bool reverse,
                   bool tf32,
                   bool beside) {
  check_no_stall(op);
  check_rank(op, "c0", c0, 3, "(D, B, H)");
  const int64_t D = c0.size(0), B = c0.size(1), H = c0.size(2);
  const ScalarType dtype = weight_hh.scalar_type(), states = c0.scalar_type();
  const bool wide = dtype != ScalarType::Float && states == ScalarType::Float;
  STD_TORCH_CHECK(D == 1 || (D == 2 && !reverse), op, ": c0 must be of one direction, or two without reverse, got ", D);
  check_like(op, "c0", c0, {D, B, H}, wide ? states : dtype, c0);
  check_like(op, "weight_hh", weight_hh, {D, 4 * H, H}, dtype, c0);
  check_like(op, "lengths", lengths, {B}, ScalarType::Long, c0);
  return {.steps = steps,
          .batch = B,
          .directions = D,
          .hidden = H,
          .lengths = static_cast<const int64_t*>(read(lengths)),
          .reverse = reverse,
          .tf32 = tf32,
          .spin_limit = spin_limit(),
          .beside = beside,
          .wide_states = wide};
}

Tensor zeros(const Tensor& like, size_t bytes) {
  Tensor t = empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  return torch::stable::zero_(t);
}

// A recurrence kernel in one direction of time. P: its parameters.
template <class P>
struct Kernel {
  const char* name;
  std::optional<LstmPlan<P>> (*plan)(const LstmShape&, Type);
};

constexpr Kernel<LstmForwardParams> kForward[] = {{"cluster", plan_lstm_cluster_forward},
                                                  {"grid", plan_lstm_grid_forward}};
constexpr Kernel<LstmBackwardParams> kBackward[] = {{"cluster", plan_lstm_cluster_backward},
                                                    {"grid", plan_lstm_grid_backward}};

// The allowed kernels that fit, with their plans, the cheapest first (cost.h). A cluster precedes a grid that is hardly
// cheaper: it leaves multiprocessors to other layers.
template <class P>
std::vector<LstmPlan<P>> plans_of(const Kernel<P> (&kernels)[2], const LstmShape& s, Type type) {
  std::vector<LstmPlan<P>> plans;
  for (const Kernel<P>& kernel : kernels) {
    if (!allowed(kernel.name)) continue;
    if (auto plan = kernel.plan(s, type)) plans.push_back(std::move(*plan));
  }
  if (plans.size() == 2 && plans[1].microseconds < cost::kGridGain * plans[0].microseconds) {
    std::swap(plans[0], plans[1]);
  }
  return plans;
}

// True if a product and a cell a step are modelled as cheaper than the kernel, and allowed.
template <class P>
bool steps_are_cheaper(const LstmPlan<P>& plan, const LstmShape& s, Type type) {
  constexpr bool kBackward = std::is_same_v<P, LstmBackwardParams>;
  return demanded().empty() && lstm_steps_microseconds(s, type, kBackward) < plan.microseconds;
}

// Runs the cheapest kernel that is allowed, fits, and for which the device has room. Returns false if there is none, or
// if single steps are modelled as cheaper.
template <class P>
bool run(const char* op, const Kernel<P> (&kernels)[2], P& p, Type type, const Tensor& like, Stream stream) {
  for (const LstmPlan<P>& plan : plans_of(kernels, p.shape, type)) {
    if (steps_are_cheaper(plan, p.shape, type)) break;
    Tensor workspace = zeros(like, plan.workspace);
    p.workspace = write(workspace);
    const Outcome outcome = plan.launch(p, stream);
    if (outcome.refused && p.shape.beside) break;
    if (outcome.refused) continue;
    check_launch(op, outcome.error);
    return true;
  }
  return false;
}

void check_steps_allowed(const char* op, const LstmShape& s) {
  STD_TORCH_CHECK(allowed("steps"), op, ": no CUDA kernel fits batch ", s.batch, ", hidden size ", s.hidden,
                  " on this device among those that FASTSEQ_LSTM_KERNEL allows; unset it");
}

// Direction d of a tensor whose last dimension holds both, and of one whose first dimension does.
Tensor columns_of(Tensor t, int64_t d) {
  if (t.numel() == 0) return t;
  const int64_t last = t.dim() - 1, size = t.size(last) / 2;
  return torch::stable::contiguous(torch::stable::narrow(t, last, d * size, size));
}

OptionalTensor columns_of(const OptionalTensor& t, int64_t d) { return t ? OptionalTensor(columns_of(*t, d)) : t; }

Tensor rows_of(Tensor t, int64_t d) { return torch::stable::narrow(t, 0, d, 1); }

OptionalTensor rows_of(const OptionalTensor& t, int64_t d) { return t ? OptionalTensor(rows_of(*t, d)) : t; }

void put_columns(Tensor& all, int64_t d, const Tensor& part) {
  if (all.numel() == 0) return;
  const int64_t last = all.dim() - 1, size = all.size(last) / 2;
  Tensor to = torch::stable::narrow(all, last, d * size, size);
  torch::stable::copy_(to, part);
}

void put_rows(Tensor& all, int64_t d, const Tensor& part) {
  Tensor to = rows_of(all, d);
  torch::stable::copy_(to, part);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_recurrence_forward_cuda(Tensor gates,
                                                                                Tensor h0,
                                                                                Tensor c0,
                                                                                Tensor weight_hh,
                                                                                OptionalTensor lengths,
                                                                                bool reverse,
                                                                                bool tf32,
                                                                                bool need_activations,
                                                                                bool need_cell_states,
                                                                                bool beside) {
  const char* op = "lstm_recurrence_forward";
  check_rank(op, "gates", gates, 3, "(T, B, D * 4H)");
  const int64_t T = gates.size(0);
  const LstmShape s = shape_of(op, c0, weight_hh, T, lengths, reverse, tf32, beside);
  const int64_t D = s.directions, B = s.batch, H = s.hidden;
  const ScalarType dtype = weight_hh.scalar_type(), states = c0.scalar_type();
  const Type type = type_of(op, dtype, false);
  weight_hh = with_aligned_rows(weight_hh);
  check_like(op, "gates", gates, {T, B, D * 4 * H}, dtype, c0);
  check_like(op, "h0", h0, {D, B, H}, dtype, c0);
  h0 = with_aligned_rows(h0);

  const OnDeviceOf device(c0);
  Tensor output = empty(c0, {T, B, D * H}, dtype), h_n = empty(c0, {D, B, H}, dtype),
         c_n = empty(c0, {D, B, H}, states);
  Tensor activations = empty(c0, need_activations ? Shape{T, B, D * 4 * H} : Shape{0}, dtype);
  Tensor cell_states = empty(c0, need_cell_states ? Shape{T, B, D * H} : Shape{0}, ScalarType::Float);
  LstmForwardParams p{.shape = s,
                      .gates = read(gates),
                      .h0 = read(h0),
                      .c0 = read(c0),
                      .weight_hh = read(weight_hh),
                      .output = write(output),
                      .h_n = write(h_n),
                      .c_n = write(c_n),
                      .activations = write(activations),
                      .cell_states = static_cast<float*>(write(cell_states)),
                      .workspace = nullptr};
  if (B * H == 0) return {output, h_n, c_n, activations, cell_states};

  if (run(op, kForward, p, type, c0, device.stream())) return {output, h_n, c_n, activations, cell_states};
  if (D == 1) {
    check_steps_allowed(op, s);
    run_lstm_forward_steps(op, p, type, h0, c0, weight_hh, h_n, c_n, device.stream());
  }
  for (int64_t d = 0; d < D && D == 2; ++d) {
    const auto [of_output, of_h_n, of_c_n, of_activations, of_cell_states] =
        lstm_recurrence_forward_cuda(columns_of(gates, d), rows_of(h0, d), rows_of(c0, d), rows_of(weight_hh, d),
                                     lengths, d == 1, tf32, need_activations, need_cell_states, beside);
    put_columns(output, d, of_output);
    put_columns(activations, d, of_activations);
    put_columns(cell_states, d, of_cell_states);
    put_rows(h_n, d, of_h_n);
    put_rows(c_n, d, of_c_n);
  }
  return {output, h_n, c_n, activations, cell_states};
}

std::tuple<Tensor, Tensor, Tensor> lstm_recurrence_backward_cuda(OptionalTensor grad_output,
                                                                 OptionalTensor grad_h_n,
                                                                 OptionalTensor grad_c_n,
                                                                 OptionalTensor grad_cell_states,
                                                                 Tensor activations,
                                                                 Tensor cell_states,
                                                                 Tensor c0,
                                                                 Tensor weight_hh,
                                                                 OptionalTensor lengths,
                                                                 bool reverse,
                                                                 bool tf32,
                                                                 bool beside) {
  const char* op = "lstm_recurrence_backward";
  check_rank(op, "activations", activations, 3, "(T, B, D * 4H)");
  const int64_t T = activations.size(0);
  const LstmShape s = shape_of(op, c0, weight_hh, T, lengths, reverse, tf32, beside);
  const int64_t D = s.directions, B = s.batch, H = s.hidden;
  const ScalarType dtype = weight_hh.scalar_type(), states = c0.scalar_type();
  const Type type = type_of(op, dtype, false);
  weight_hh = with_aligned_rows(weight_hh);
  check_like(op, "activations", activations, {T, B, D * 4 * H}, dtype, c0);
  check_like(op, "cell_states", cell_states, {T, B, D * H}, ScalarType::Float, c0);
  check_like(op, "grad_output", grad_output, {T, B, D * H}, dtype, c0);
  check_like(op, "grad_h_n", grad_h_n, {D, B, H}, states, c0);
  check_like(op, "grad_c_n", grad_c_n, {D, B, H}, states, c0);
  check_like(op, "grad_cell_states", grad_cell_states, {T, B, D * H}, dtype, c0);

  const OnDeviceOf device(c0);
  Tensor grad_gates = empty(c0, {T, B, D * 4 * H}, dtype);
  Tensor grad_h0 = empty(c0, {D, B, H}, states), grad_c0 = empty(c0, {D, B, H}, states);
  LstmBackwardParams p{.shape = s,
                       .grad_output = read(grad_output),
                       .grad_h_n = read(grad_h_n),
                       .grad_c_n = read(grad_c_n),
                       .grad_cell_states = read(grad_cell_states),
                       .activations = read(activations),
                       .cell_states = static_cast<const float*>(read(cell_states)),
                       .c0 = read(c0),
                       .weight_hh = read(weight_hh),
                       .grad_gates = write(grad_gates),
                       .grad_h0 = write(grad_h0),
                       .grad_c0 = write(grad_c0),
                       .workspace = nullptr};
  if (B * H == 0) return {grad_gates, grad_h0, grad_c0};

  if (run(op, kBackward, p, type, c0, device.stream())) return {grad_gates, grad_h0, grad_c0};
  if (D == 1) {
    check_steps_allowed(op, s);
    run_lstm_backward_steps(op, p, type, grad_h_n, grad_c_n, weight_hh, grad_gates, device.stream());
  }
  for (int64_t d = 0; d < D && D == 2; ++d) {
    const auto [of_gates, of_h0, of_c0] = lstm_recurrence_backward_cuda(
        columns_of(grad_output, d), rows_of(grad_h_n, d), rows_of(grad_c_n, d), columns_of(grad_cell_states, d),
        columns_of(activations, d), columns_of(cell_states, d), rows_of(c0, d), rows_of(weight_hh, d), lengths, d == 1,
        tf32, beside);
    put_columns(grad_gates, d, of_gates);
    put_rows(grad_h0, d, of_h0);
    put_rows(grad_c0, d, of_c0);
  }
  return {grad_gates, grad_h0, grad_c0};
}

LstmShape one_step(int64_t batch, int64_t directions, int64_t hidden, bool tf32) {
  return {.steps = 1,
          .batch = std::max<int64_t>(batch, 1),
          .directions = directions,
          .hidden = hidden,
          .lengths = nullptr,
          .reverse = false,
          .tf32 = tf32};
}

Type type_of_size(int64_t itemsize) { return itemsize == 2 ? Type::kBFloat16 : Type::kFloat; }

bool lstm_recurrence_fits_cuda(int64_t batch, int64_t directions, int64_t hidden, int64_t itemsize, bool tf32) {
  const LstmShape s = one_step(batch, directions, hidden, tf32);
  const Type type = type_of_size(itemsize);
  return demanded() == "steps" || (!plans_of(kForward, s, type).empty() && !plans_of(kBackward, s, type).empty());
}

template <class P>
double microseconds_of(const Kernel<P>& kernel, const LstmShape& s, Type type) {
  const auto plan = kernel.plan(s, type);
  return plan ? plan->microseconds : std::numeric_limits<double>::infinity();
}

std::tuple<double, double> lstm_recurrence_cost_cuda(
    int64_t kernel, int64_t batch, int64_t directions, int64_t hidden, int64_t itemsize, bool tf32) {
  const LstmShape s = one_step(batch, directions, hidden, tf32);
  const Type type = type_of_size(itemsize);
  STD_TORCH_CHECK(0 <= kernel && kernel <= 3, "lstm_recurrence_cost: kernel must be 0 to 3, got ", kernel);
  if (kernel < 2) return {microseconds_of(kForward[kernel], s, type), microseconds_of(kBackward[kernel], s, type)};
  const auto launches = kernel == 2 ? lstm_steps_microseconds : lstm_torch_microseconds;
  return {launches(s, type, false), launches(s, type, true)};
}

// Microseconds of a step, and the share of the device, of the kernel that the operators would take beside others; share
// 0: none fits.
template <class P>
std::pair<double, double> cheapest(const Kernel<P> (&kernels)[2], const LstmShape& s, Type type) {
  const std::vector<LstmPlan<P>> plans = plans_of(kernels, s, type);
  if (plans.empty() || steps_are_cheaper(plans.front(), s, type)) return {0, 0};
  return {plans.front().microseconds, plans.front().share};
}

std::tuple<double, double, double, double> lstm_recurrence_share_cuda(
    int64_t batch, int64_t directions, int64_t hidden, int64_t itemsize, bool tf32) {
  LstmShape s = one_step(batch, directions, hidden, tf32);
  s.beside = true;
  const Type type = type_of_size(itemsize);
  const auto [forward, of_forward] = cheapest(kForward, s, type);
  const auto [backward, of_backward] = cheapest(kBackward, s, type);
  return {forward, of_forward, backward, of_backward};
}

}  // namespace
}  // namespace fastseq::cuda

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_LIBRARY, FASTSEQ_DISPATCH, m) {
  m.impl("lstm_recurrence_forward", TORCH_BOX(&fastseq::cuda::lstm_recurrence_forward_cuda));
  m.impl("lstm_recurrence_backward", TORCH_BOX(&fastseq::cuda::lstm_recurrence_backward_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(FASTSEQ_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("lstm_recurrence_fits", TORCH_BOX(&fastseq::cuda::lstm_recurrence_fits_cuda));
  m.impl("lstm_recurrence_share", TORCH_BOX(&fastseq::cuda::lstm_recurrence_share_cuda));
  m.impl("lstm_recurrence_cost", TORCH_BOX(&fastseq::cuda::lstm_recurrence_cost_cuda));
}
