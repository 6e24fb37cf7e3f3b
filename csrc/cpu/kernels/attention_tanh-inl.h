// tanh(q + k) of the additive score, and the kernel that prepares keys for it.
//
// The additive score needs tanh(q + k) for T * S * A pairs. Each value is composed of one function of q and one of k,
// evaluated only (T + S) * A times. Three methods keep all digits, each for a range of |q| and |k|:
//
//     one <= kSmall, the other <= kNotLarge:   (tanh q + tanh k) / (1 + tanh q tanh k)
//     both <= kModerate:                       (e - 1) / (e + 1),  e = e^2q e^2k
//     else, or for a single step:              tanh(q + k) directly
//
// Chosen per sentence from max abs(q) and max abs(k), so a result never depends on the rest of the batch.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/kernels/attention_params.h"
#include "cpu/kernels/attention_rows-inl.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

constexpr double kSmall = 0.5;      // addition magnifies roundings by up to e^(2 kSmall)
constexpr double kNotLarge = 4.0;   // beyond it, 1 - tanh^2 of the addition loses digits: tanh is close to +-1
constexpr double kModerate = 20.0;  // exponentials cannot overflow: e^(4 kModerate) < 1e38

// Methods to compute tanh(q + k): `prepare` is applied to every element of q and k, `tanh` to every pair.
template <class A>
struct DirectTanh {
  static FASTSEQ_INLINE Vec<A> prepare(Vec<A> x) { return x; }
  static FASTSEQ_INLINE Vec<A> tanh(Vec<A> q, Vec<A> k) { return vtanh(q + k); }
  static FASTSEQ_INLINE Vec<A> add(Vec<A> sum, Vec<A> v, Vec<A> q, Vec<A> k) { return fma(v, tanh(q, k), sum); }
};

template <class A>
struct AdditionTanh {
  static FASTSEQ_INLINE Vec<A> prepare(Vec<A> x) { return vtanh(x); }
  static FASTSEQ_INLINE Vec<A> tanh(Vec<A> q, Vec<A> k) { return (q + k) * reciprocal(fma(q, k, splat(A(1)))); }
  static FASTSEQ_INLINE Vec<A> add(Vec<A> sum, Vec<A> v, Vec<A> q, Vec<A> k) { return fma(v, tanh(q, k), sum); }
};

template <class A>
struct ExponentialTanh {
  static FASTSEQ_INLINE Vec<A> prepare(Vec<A> x) { return vexp(x + x); }
  static FASTSEQ_INLINE Vec<A> tanh(Vec<A> q, Vec<A> k) {
    return fma(q, k, splat(A(-1))) * reciprocal(fma(q, k, splat(A(1))));
  }
  static FASTSEQ_INLINE Vec<A> add(Vec<A> sum, Vec<A> v, Vec<A> q, Vec<A> k) { return fma(v, tanh(q, k), sum); }
};

// Largest |x| of a matrix; NaN if an element is NaN.
template <class A>
A largest_element(Matrix<const A> x, int64_t rows, int64_t columns) {
  Vec<A> largest{}, nan{};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<A>) {
      const Vec<A> magnitude = vabs(vload(x.row(r) + c));
      largest = magnitude > largest ? magnitude : largest;
      nan = magnitude == magnitude ? nan : magnitude;
    }
  }
  A result = 0;
  for (int i = 0; i < kLanes<A>; ++i) result = largest[i] > result ? largest[i] : result;
  return result + sum_lanes(nan);
}

enum class TanhMethod { kDirect, kAddition, kExponential };

template <class A>
TanhMethod best_tanh_method(A largest_query, A largest_key) {
  const bool small = largest_query <= A(kSmall) || largest_key <= A(kSmall);
  if (small && largest_query <= A(kNotLarge) && largest_key <= A(kNotLarge)) return TanhMethod::kAddition;
  return largest_query <= A(kModerate) && largest_key <= A(kModerate) ? TanhMethod::kExponential : TanhMethod::kDirect;
}

// Method of all prepared keys of a sentence; kDirect if they differ. The number of the method follows each key.
template <class S>
TanhMethod prepared_tanh_method(const AttentionInputParams<S>& in, int64_t b, Positions where) {
  const int64_t columns = prepared_columns(in.size);
  const Acc<S>* methods = in.prepared + b * in.positions * columns + whole_columns(in.size);
  for (int64_t i = 1; i < where.count; ++i) {
    if (methods[where[i] * columns] != methods[where[0] * columns]) return TanhMethod::kDirect;
  }
  return where.count ? static_cast<TanhMethod>(static_cast<int>(methods[where[0] * columns])) : TanhMethod::kDirect;
}

// query + bias, (T, A).
template <class S>
Matrix<Acc<S>> biased_query(const AttentionInputParams<S>& in, int64_t b, Arena& arena) {
  const Matrix<Acc<S>> sum = arena.take_rows<Acc<S>>(in.steps, in.size);
  const Acc<S>* bias = in.bias ? wide_vector(in.bias, in.size, arena) : nullptr;
  for (int64_t t = 0; t < in.steps; ++t) {
    load_row(in.query.data + b * in.query.batch + t * in.query.row, in.query.column, in.size, sum.row(t));
    for (int64_t c = 0; bias && c < in.size; c += kLanes<S>) {
      vstore(vload(sum.row(t) + c) + vload(bias + c), sum.row(t) + c);
    }
  }
  return sum;
}

template <class Form, class A>
void prepare_rows(Matrix<const A> x, int64_t rows, int64_t columns, Matrix<A> out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<A>) vstore(Form::prepare(vload(x.row(r) + c)), out.row(r) + c);
  }
}

// Calls body(form, queries, keys, part, first, arena) for each block of kKeyBlock keys of a sentence. queries, keys:
// prepared; part: their positions; first: index of the block's first key.
template <class Form, class A, class Body>
void for_each_block(Matrix<A> queries,  // (T, columns), prepared in place
                    int64_t T,
                    Matrix<const A> keys,  // (count, columns)
                    bool keys_are_prepared,
                    Positions where,
                    int64_t columns,
                    Arena arena,
                    const Body& body) {
  prepare_rows<Form>(Matrix<const A>{queries.data, queries.stride}, T, columns, queries);
  for (int64_t first = 0; first < where.count; first += kKeyBlock) {
    const Positions part = where.part(first, where.count - first < kKeyBlock ? where.count - first : kKeyBlock);
    Arena block_arena = arena;
    Matrix<const A> block{keys.row(first), keys.stride};
    if (!keys_are_prepared) {
      const Matrix<A> prepared = block_arena.take_rows<A>(part.count, columns);
      prepare_rows<Form>(block, part.count, columns, prepared);
      block = {prepared.data, prepared.stride};
    }
    body(Form{}, Matrix<const A>{queries.data, queries.stride}, block, part, first, block_arena);
  }
}

// for_each_block with the method chosen for this sentence.
template <class S, class Body>
void with_tanh(const AttentionInputParams<S>& in, int64_t b, Positions where, Arena arena, const Body& body) {
  using A = Acc<S>;
  const int64_t T = in.steps, columns = padded_to_vectors<S>(in.size);
  const Matrix<A> queries = biased_query(in, b, arena);
  const A largest_query = largest_element(Matrix<const A>{queries.data, queries.stride}, T, columns);
  TanhMethod method = in.prepared ? prepared_tanh_method(in, b, where) : TanhMethod::kDirect;
  if (!(largest_query <= A(method == TanhMethod::kAddition ? kNotLarge : kModerate))) method = TanhMethod::kDirect;
  const bool prepared = method != TanhMethod::kDirect;
  const int64_t stride = prepared_columns(in.size);
  const Strided<const A> prepared_keys{in.prepared, in.positions * stride, stride, 1};
  const Matrix<const A> keys =
      prepared ? wide_rows(prepared_keys, b, where, columns, arena) : wide_rows(in.keys, b, where, in.size, arena);
  if (!prepared && T > 1) method = best_tanh_method(largest_query, largest_element(keys, where.count, columns));
  switch (method) {
    case TanhMethod::kAddition:
      return for_each_block<AdditionTanh<A>>(queries, T, keys, prepared, where, columns, arena, body);
    case TanhMethod::kExponential:
      return for_each_block<ExponentialTanh<A>>(queries, T, keys, prepared, where, columns, arena, body);
    default:
      return for_each_block<DirectTanh<A>>(queries, T, keys, true, where, columns, arena, body);
  }
}

// Prepares the keys of a sentence for prepared_tanh_method(). Keys that no step attends to are marked kDirect.
template <class S>
void attention_prepare_sentence(const AttentionPrepareParams<S>& p, int64_t b, Arena arena) {
  using A = Acc<S>;
  const AttentionInputParams<S>& in = p.in;
  const int64_t columns = prepared_columns(in.size), padded = padded_to_vectors<S>(in.size);
  A* prepared = p.prepared + b * in.positions * columns;
  std::memset(prepared, 0, in.positions * columns * sizeof(A));
  const Positions where = attended(in, b, arena);
  const Matrix<const A> keys = wide_rows(in.keys, b, where, in.size, arena);
  const A largest = largest_element(keys, where.count, padded);
  const TanhMethod method = best_tanh_method(largest, largest);
  for (int64_t i = 0; i < where.count; ++i) {
    const Matrix<const A> key{keys.row(i), columns};
    const Matrix<A> out{prepared + where[i] * columns, columns};
    if (method == TanhMethod::kAddition) prepare_rows<AdditionTanh<A>>(key, 1, padded, out);
    if (method == TanhMethod::kExponential) prepare_rows<ExponentialTanh<A>>(key, 1, padded, out);
    out.data[whole_columns(in.size)] = static_cast<A>(method);
  }
}

template <class S>
void attention_prepare(const AttentionPrepareParams<S>& p, int64_t begin, int64_t end, void* scratch) {
  const FlushDenormals flush;
  for (int64_t b = begin; b < end; ++b) attention_prepare_sentence(p, b, Arena{static_cast<char*>(scratch)});
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
