#include "cpu/isa/kernel_table.h"

#include <type_traits>

#include "cpu/isa/isa.h"

namespace fastseq::cpu {

#define FASTSEQ_DECLARE(isa)          \
  namespace isa {                     \
  template <class S>                  \
  Kernels<S> make_kernels();          \
  template <class S>                  \
  void set_lstm_kernels(Kernels<S>&); \
  }
FASTSEQ_DECLARE(baseline)
FASTSEQ_DECLARE(avx2)
FASTSEQ_DECLARE(avx512)
FASTSEQ_DECLARE(avx512_bf16)
#undef FASTSEQ_DECLARE

namespace {

template <class S>
Kernels<S> choose() {
  const Isa isa = machine_isa();
  if constexpr (is_built(Isa::kAvx512Bf16) && std::is_same_v<S, BFloat16>) {
    if (isa >= Isa::kAvx512Bf16) {
      Kernels<S> table = avx512::make_kernels<S>();
      avx512_bf16::set_lstm_kernels(table);
      return table;
    }
  }
  if constexpr (is_built(Isa::kAvx512)) {
    if (isa >= Isa::kAvx512) return avx512::make_kernels<S>();
  }
  if constexpr (is_built(Isa::kAvx2)) {
    if (isa >= Isa::kAvx2) return avx2::make_kernels<S>();
  }
  if constexpr (is_built(Isa::kBaseline)) return baseline::make_kernels<S>();
  return {};  // unreachable: machine_isa() is a built set, and avx512_bf16 is built with avx512
}

}  // namespace

template <class S>
const Kernels<S>& kernels() {
  static const Kernels<S> table = choose<S>();
  return table;
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();
template const Kernels<BFloat16>& kernels();
template const Kernels<Half>& kernels();

}  // namespace fastseq::cpu
