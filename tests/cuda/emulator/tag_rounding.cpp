// Rounding of the gate gradients that carry a sequence tag (grid_backward_arithmetic.cuh). Prints "ok", or the first
// number that is not rounded to the nearest one with a clear last bit.
#include <cmath>
#include <cstdio>
#include <random>

#include "cuda/common/device.cuh"
#include "cuda/lstm/grid_backward_arithmetic.cuh"

namespace {

using namespace fastseq::cuda;

// The value of 16 bits; infinity counts as the number that would follow the largest one.
template <class T>
double value_of(uint16_t bits) {
  const double x = to_float(T{bits});
  const double infinity = std::is_same_v<T, bf16> ? std::ldexp(1.0, 128) : 65536.0;
  return std::isinf(x) ? std::copysign(infinity, x) : x;
}

template <class T>
bool right(float x) {
  Vector<T, 4> dgates;
  const float exact[4] = {x, 1.5f, -2.5f, x};
  for (int k = 0; k < 4; ++k) from_float(exact[k], &dgates.element[k]);
  uint32_t words[2], plain[2];
  memcpy(plain, &dgates, sizeof plain);
  grid_backward::MmaHalf<T>::encode(words, dgates, exact);
  const uint16_t bits = words[0] & 0xffffu;
  if (bits & 1 || words[0] >> 16 != plain[0] >> 16 || words[1] != plain[1]) return false;
  if (std::isnan(x) || std::isinf(x)) return std::isnan(x) ? std::isnan(to_float(T{bits})) : to_float(T{bits}) == x;
  const double error = std::fabs(value_of<T>(bits) - x);
  for (int step : {-2, 2}) {  // the neighbours with a clear last bit
    const uint16_t other = static_cast<uint16_t>(bits + step);
    if (std::isnan(to_float(T{other})) || (other ^ bits) & 0x8000u) continue;
    if (std::fabs(value_of<T>(other) - x) < error) return false;
  }
  return true;
}

// Every number of T, and numbers between it and the next.
template <class T>
bool all_right(const char* name) {
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
    const float x = to_float(T{static_cast<uint16_t>(bits)});
    const float next = to_float(T{static_cast<uint16_t>(bits + 1)});
    for (float part : {0.0f, 0.25f, 0.5f, 0.75f}) {
      const float y = part == 0 ? x : x + part * (next - x);
      if (!right<T>(y)) return std::printf("%s: %a\n", name, y), false;
    }
  }
  return true;
}

bool float_right(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  const uint32_t got = grid_backward::without_last_bit(x);
  float y;
  memcpy(&y, &got, sizeof y);
  if (got & 1) return false;
  if (std::isnan(x)) return std::isnan(y);
  const uint32_t odd = bits & 1, even = bits & 2 ? bits + odd : bits - odd;  // a tie goes to the even neighbour
  return got == even;
}

}  // namespace

int main() {
  if (!all_right<bf16>("bfloat16") || !all_right<half>("float16")) return 1;
  std::mt19937 generator(1);
  for (uint32_t bits : {0u, 1u, 0x7f7fffffu, 0x7f800000u, 0xff800000u, 0x7fc00000u, 0x7fffffffu, 0xffffffffu}) {
    if (!float_right(bits)) return std::printf("float: %#x\n", bits), 1;
  }
  for (int k = 0; k < 1000000; ++k) {
    const uint32_t bits = generator();
    if ((bits & 0x7fffffffu) > 0x7f800000u) continue;  // a NaN made by arithmetic has its highest mantissa bit set
    if (!float_right(bits)) return std::printf("float: %#x\n", bits), 1;
  }
  std::puts("ok");
}
