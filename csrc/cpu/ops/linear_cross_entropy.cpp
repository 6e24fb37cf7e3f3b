// The operators linear_cross_entropy_forward and _backward on the CPU: checks, chunks of rows, products by torch's
// GEMM. The softmax is in cross_entropy-inl.h.
//
// The logits of a chunk are computed once, replaced by their gradients while they are in the cache, and multiplied into
// the gradients of input and weight: (N, V) logits never exist. Rows with ignore_index take part in nothing.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/isa/kernel_table.h"
#include "cpu/kernels/cross_entropy_params.h"
#include "cpu/ops/arguments.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/pool.h"

namespace fastseq::cpu {
namespace {

using torch::stable::narrow;
using torch::stable::transpose;

// Bytes of the logits of a chunk. Fewer rows would cost time, because each chunk reads and writes the weight gradient:
// V = 16384, H = 512, 1536 rows on a Xeon (Sapphire Rapids) with AVX2: 99 GFLOP/s in chunks of 16 MiB, 101 in 24.
constexpr int64_t kChunkBytes = 24 << 20;
constexpr int64_t kFewestRows = 64;

// out = beta * self + a b, by torch's GEMM. self may be `out`, or a row (columns,) for all rows.
void multiply(Tensor& out, const Tensor& self, const Tensor& a, const Tensor& b, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), self.get(), a.get(), b.get(), beta, 1.0));
}

Tensor rows_of(Tensor t, int64_t first, int64_t count) { return narrow(t, 0, first, count); }

struct Needs {
  bool input, weight, bias;
  bool any() const { return input || weight || bias; }
};

struct Gradients {
  Tensor input;         // (N, H)
  Tensor weight, bias;  // (V, H), (V,) acc
};

struct Arguments {
  Tensor input, weight;  // (N, H), (V, H)
  OptionalTensor bias;   // (V,)
  Tensor target;         // (N,) int64
  int64_t ignore_index;
  double label_smoothing;

  int64_t rows() const { return input.size(0); }
  int64_t size() const { return input.size(1); }
  int64_t classes() const { return weight.size(0); }
  ScalarType dtype() const { return input.scalar_type(); }

  void check(const char* op) const;
  std::vector<int64_t> valid_rows(const char* op) const;
  Gradients empty_gradients(Needs needs) const;
};

void Arguments::check(const char* op) const {
  check_rank(op, "input", input, 2, "(N, H)");
  check_rank(op, "weight", weight, 2, "(V, H)");
  check_cpu(op, "input", input, {rows(), size()}, dtype());
  check_cpu(op, "weight", weight, {classes(), size()}, dtype());
  check_optional(op, "bias", bias, {classes()}, dtype());
  check_cpu(op, "target", target, {rows()}, ScalarType::Long);
  check_extent(op, "the logits", Shape{rows(), classes()});
  STD_TORCH_CHECK(classes() > 0, op, ": weight must have at least one class, got (0, ", size(), ")");
}

std::vector<int64_t> Arguments::valid_rows(const char* op) const {
  const int64_t* const classes_of = read<int64_t>(target);
  std::vector<int64_t> valid;
  valid.reserve(rows());
  for (int64_t n = 0; n < rows(); ++n) {
    if (classes_of[n] == ignore_index) continue;
    STD_TORCH_CHECK(classes_of[n] >= 0 && classes_of[n] < classes(), op, ": target must lie in 0 .. ", classes() - 1,
                    " or be ignore_index = ", ignore_index, ", got target[", n, "] = ", classes_of[n]);
    valid.push_back(n);
  }
  return valid;
}

Gradients Arguments::empty_gradients(Needs needs) const {
  const ScalarType acc = accumulate_type(dtype());
  return {result_empty(needs.input ? Shape{rows(), size()} : Shape{0}, dtype()),
          result_empty(needs.weight ? Shape{classes(), size()} : Shape{0}, acc),
          result_empty(needs.bias ? Shape{classes()} : Shape{0}, acc)};
}

// Values of each row, read or written at the rows of a chunk; null where not given.
template <class S>
struct RowValues {
  Acc<S>* losses;       // (N,) out
  Acc<S>* statistics;   // (2, N): peak and log_total
  const Acc<S>* scale;  // (N,) factors of the gradients
  bool has_statistics;  // read them
};

template <class S>
class Chunks {
 public:
  Chunks(const Arguments& x, const std::vector<int64_t>& valid, Needs needs, Gradients& grads, RowValues<S> values)
      : x_(x),
        valid_(valid),
        needs_(needs),
        grads_(grads),
        values_(values),
        count_(static_cast<int64_t>(valid.size())),
        height_(chunk_height()),
        dense_(count_ == x.rows()),
        logits_(pooled_empty({height_, x.classes()}, x.dtype())),
        gathered_(pooled_empty({dense_ ? 0 : height_, x.size()}, x.dtype())),
        grad_rows_(pooled_empty({dense_ || !needs.input ? 0 : height_, x.size()}, x.dtype())),
        product_(pooled_empty(needs.weight && !kInPlace ? Shape{x.classes(), x.size()} : Shape{0}, x.dtype())),
        numbers_(4 * height_ * sizeof(Acc<S>) + height_ * sizeof(int64_t)),
        bias_sums_(needs.bias ? tasks(height_) * x.classes() * sizeof(Acc<S>) : 0) {}

  void run() {
    if (needs_.input && !dense_) fill_zero(write<S>(grads_.input), grads_.input.numel());
    if (needs_.bias) fill_zero(write<Acc<S>>(grads_.bias), x_.classes());
    if (needs_.weight && (count_ == 0 || !kInPlace)) fill_zero(write<Acc<S>>(grads_.weight), grads_.weight.numel());
    for (int64_t first = 0; first < count_; first += height_) run_chunk(first, std::min(height_, count_ - first));
  }

 private:
  static constexpr bool kInPlace = sizeof(S) == sizeof(Acc<S>);  // the GEMM adds to the weight gradient itself

  static int64_t tasks(int64_t rows) { return divide_up(rows, kCrossEntropyRows); }

  // Rows of a chunk: about kChunkBytes of logits, and all chunks of nearly equal height.
  int64_t chunk_height() const {
    const int64_t row_bytes = x_.classes() * static_cast<int64_t>(sizeof(S));
    const int64_t most = std::max(kFewestRows, kChunkBytes / row_bytes);
    return divide_up(count_, std::max<int64_t>(1, divide_up(count_, most)));
  }

  void run_chunk(int64_t first, int64_t n) {
    const Tensor rows = dense_ ? rows_of(x_.input, first, n) : gather(first, n);
    Tensor logits = rows_of(logits_, 0, n);
    multiply(logits, x_.bias ? *x_.bias : logits, rows, transpose(x_.weight, 0, 1), x_.bias ? 1 : 0);
    softmax(first, n);
    if (needs_.input) {
      Tensor grad = dense_ ? rows_of(grads_.input, first, n) : rows_of(grad_rows_, 0, n);
      multiply(grad, grad, logits, x_.weight, 0);
      if (!dense_) scatter(first, n);
    }
    if (needs_.weight) add_weight_gradient(transpose(logits, 0, 1), rows, first == 0);
  }

  Tensor gather(int64_t first, int64_t n) {
    const int64_t H = x_.size();
    const S* const from = read<S>(x_.input);
    for (int64_t r = 0; r < n; ++r) std::copy_n(from + valid_[first + r] * H, H, write<S>(gathered_) + r * H);
    return rows_of(gathered_, 0, n);
  }

  void scatter(int64_t first, int64_t n) {
    const int64_t H = x_.size();
    const S* const from = read<S>(grad_rows_);
    for (int64_t r = 0; r < n; ++r) std::copy_n(from + r * H, H, write<S>(grads_.input) + valid_[first + r] * H);
  }

  void softmax(int64_t first, int64_t n) {
    const int64_t N = x_.rows();
    Acc<S>* const numbers = numbers_.template at<Acc<S>>(0);
    int64_t* const target = reinterpret_cast<int64_t*>(numbers + 4 * height_);
    CrossEntropyParams<S> p{};
    p.rows = n, p.classes = x_.classes();
    p.logits = write<S>(logits_);
    p.target = target;
    p.smoothing = static_cast<Acc<S>>(x_.label_smoothing);
    p.gradients = needs_.any();
    p.has_statistics = values_.has_statistics;
    p.peak = numbers, p.log_total = numbers + height_, p.losses = numbers + 2 * height_;
    Acc<S>* const scale = values_.scale ? numbers + 3 * height_ : nullptr;
    p.scale = scale;
    p.bias_sums = needs_.bias ? bias_sums_.template at<Acc<S>>(0) : nullptr;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t row = valid_[first + r];
      target[r] = read<int64_t>(x_.target)[row];
      if (scale) scale[r] = values_.scale[row];
      if (!p.has_statistics) continue;
      p.peak[r] = values_.statistics[row];
      p.log_total[r] = values_.statistics[N + row];
    }
    const int64_t grain = kGrain / (kCrossEntropyRows * x_.classes()) + 1;
    parallel_for(tasks(n), grain, [&](int64_t begin, int64_t end) { kernels<S>().cross_entropy(p, begin, end); });
    for (int64_t r = 0; r < n && !p.has_statistics; ++r) {
      const int64_t row = valid_[first + r];
      values_.losses[row] = p.losses[r];
      values_.statistics[row] = p.peak[r];
      values_.statistics[N + row] = p.log_total[r];
    }
    if (p.bias_sums) add_bias_gradient(p.bias_sums, tasks(n));
  }

  void add_bias_gradient(const Acc<S>* sums, int64_t count) {
    Acc<S>* const total = write<Acc<S>>(grads_.bias);
    for (int64_t k = 0; k < count; ++k, sums += x_.classes()) {
      for (int64_t j = 0; j < x_.classes(); ++j) total[j] += sums[j];
    }
  }

  // Adds a product to the weight gradient, which is wider than the product's operands for 16-bit types.
  void add_weight_gradient(const Tensor& grad_logits, const Tensor& rows, bool is_first) {
    if constexpr (kInPlace) {
      return multiply(grads_.weight, grads_.weight, grad_logits, rows, is_first ? 0 : 1);
    }
    multiply(product_, product_, grad_logits, rows, 0);
    Acc<S>* const total = write<Acc<S>>(grads_.weight);
    const S* const product = read<S>(product_);
    parallel_for(product_.numel(), kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) total[i] += load(product[i]);
    });
  }

  const Arguments& x_;
  const std::vector<int64_t>& valid_;
  const Needs needs_;
  Gradients& grads_;
  const RowValues<S> values_;
  const int64_t count_, height_;
  const bool dense_;  // no row is ignored
  Tensor logits_;     // (height, V)
  Tensor gathered_;   // (height, H) rows of the input, unless dense
  Tensor grad_rows_;  // (height, H) their gradients
  Tensor product_;    // (V, H) gradient of a chunk, for 16-bit types
  const PooledScratch numbers_, bias_sums_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward_cpu(Tensor input,
                                                                                    Tensor weight,
                                                                                    OptionalTensor bias,
                                                                                    Tensor target,
                                                                                    int64_t ignore_index,
                                                                                    double label_smoothing,
                                                                                    bool need_input,
                                                                                    bool need_weight,
                                                                                    bool need_bias) {
  const char* op = "linear_cross_entropy_forward";
  const Arguments x{input, weight, bias, target, ignore_index, label_smoothing};
  x.check(op);
  const std::vector<int64_t> valid = x.valid_rows(op);
  const Needs needs{need_input, need_weight, need_bias};
  const ScalarType acc = accumulate_type(x.dtype());
  Tensor losses = result_empty({x.rows()}, acc), statistics = result_empty({2, x.rows()}, acc);
  Gradients grads = x.empty_gradients(needs);
  with_storage_type(op, x.dtype(), [&](auto zero) {
    using S = decltype(zero);
    if (x.rows() == 0) return Chunks<S>(x, valid, needs, grads, {}).run();
    RowValues<S> values{write<Acc<S>>(losses), write<Acc<S>>(statistics), nullptr, false};
    fill_zero(values.losses, x.rows());
    fill_zero(values.statistics, 2 * x.rows());
    Chunks<S>(x, valid, needs, grads, values).run();
  });
  return {losses, statistics, grads.input, grads.weight, grads.bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_cpu(Tensor grad,
                                                                     Tensor statistics,
                                                                     Tensor input,
                                                                     Tensor weight,
                                                                     OptionalTensor bias,
                                                                     Tensor target,
                                                                     int64_t ignore_index,
                                                                     double label_smoothing,
                                                                     bool need_input,
                                                                     bool need_weight,
                                                                     bool need_bias) {
  const char* op = "linear_cross_entropy_backward";
  const Arguments x{input, weight, bias, target, ignore_index, label_smoothing};
  x.check(op);
  const std::vector<int64_t> valid = x.valid_rows(op);
  const Needs needs{need_input, need_weight, need_bias};
  const ScalarType acc = accumulate_type(x.dtype());
  check_cpu(op, "grad", grad, {x.rows()}, acc);
  check_cpu(op, "statistics", statistics, {2, x.rows()}, acc);
  Gradients grads = x.empty_gradients(needs);
  with_storage_type(op, x.dtype(), [&](auto zero) {
    using S = decltype(zero);
    RowValues<S> values{nullptr, write<Acc<S>>(statistics), read<Acc<S>>(grad), true};
    Chunks<S>(x, valid, needs, grads, values).run();
  });
  return {grads.input, grads.weight, grads.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastseq, CPU, m) {
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&Retried<&linear_cross_entropy_forward_cpu>::run));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&Retried<&linear_cross_entropy_backward_cpu>::run));
}

}  // namespace fastseq::cpu
