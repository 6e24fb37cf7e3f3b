// The portable instantiation of every CPU kernel: 16-byte vectors, whatever the compiler makes of them.
#include "region.h"

#define FASTSEQ_ISA baseline
#define FASTSEQ_VECTOR_BYTES 16
#define FASTSEQ_BF16_DOT 0

#include "kernels.inc"

namespace fastseq {
namespace baseline {
template Kernels<float> make_kernels();
template Kernels<double> make_kernels();
template Kernels<BFloat16> make_kernels();
template Kernels<Half> make_kernels();
}  // namespace baseline
}  // namespace fastseq
