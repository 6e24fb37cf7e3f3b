// Operands of attention: matrices of Acc<S> over the positions that at least one step attends to.
//
// Rows are padded with zeros to whole vectors. A tensor whose rows already have that form is read in place; any other
// is copied to scratch memory. Positions that no step attends to are left out: their contents affect no result.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa/region.h"
#include "cpu/kernels/attention_params.h"
#include "cpu/kernels/vector-inl.h"

FASTSEQ_REGION_BEGIN
namespace fastseq::cpu::FASTSEQ_ISA {

template <class A>
struct Matrix {
  A* data;
  int64_t stride;
  FASTSEQ_INLINE A* row(int64_t i) const { return data + i * stride; }
};

// Bump allocator of scratch memory. Pass it by value: memory that a function takes is free again when it returns.
struct Arena {
  char* next;

  template <class T>
  FASTSEQ_INLINE T* take(int64_t count) {
    T* block = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return block;
  }
  template <class A>
  FASTSEQ_INLINE Matrix<A> take_rows(int64_t rows, int64_t columns) {
    return {take<A>(rows * spread_columns(columns)), spread_columns(columns)};
  }
};

// Positions of one sentence that at least one step attends to, in increasing order.
struct Positions {
  int64_t count;
  const int64_t* index;  // null: first .. first + count - 1
  int64_t first;
  FASTSEQ_INLINE int64_t operator[](int64_t i) const { return index ? index[i] : first + i; }
  FASTSEQ_INLINE Positions part(int64_t begin, int64_t n) const {
    return index ? Positions{n, index + begin, 0} : Positions{n, nullptr, first + begin};
  }
};

template <class S>
FASTSEQ_INLINE int64_t padded_to_vectors(int64_t columns) {
  return (columns + kLanes<S> - 1) / kLanes<S> * kLanes<S>;
}

// Positions of sentence b, from its length or its mask. Indices of masked positions take arena memory.
template <class S>
Positions attended(const AttentionInputParams<S>& in, int64_t b, Arena& arena) {
  if (in.lengths) {
    const int64_t length = in.lengths[b] < 0 ? 0 : in.lengths[b];
    return {length < in.positions ? length : in.positions, nullptr, 0};
  }
  if (!in.mask.data) return {in.positions, nullptr, 0};
  int64_t* index = arena.take<int64_t>(in.positions);
  int64_t count = 0;
  const bool* mask = in.mask.data + b * in.mask.batch;
  for (int64_t s = 0; s < in.positions; ++s) {
    bool any = false;
    for (int64_t t = 0; t < (in.mask.row ? in.steps : 1); ++t) any |= mask[t * in.mask.row + s * in.mask.column];
    if (any) index[count++] = s;
  }
  return {count, count > 0 && index[count - 1] == count - 1 ? nullptr : index, 0};
}

// Loads one row and pads it with zeros to whole vectors.
template <class S>
FASTSEQ_INLINE void load_row(const S* x, int64_t column_stride, int64_t columns, Acc<S>* row) {
  if (column_stride == 1) {
    int64_t c = 0;
    for (; c + kLanes<S> <= columns; c += kLanes<S>) vstore(vload(x + c), row + c);
    if (c < columns) vstore(vload(x + c, columns - c), row + c);
    return;
  }
  for (int64_t c = 0; c < columns; ++c) row[c] = load(x[c * column_stride]);
  for (int64_t c = columns; c < padded_to_vectors<S>(columns); ++c) row[c] = 0;
}

// Rows `where` of x as Acc<S>: in place if they are contiguous whole vectors of Acc<S>, else a copy.
template <class S>
Matrix<const Acc<S>> wide_rows(Strided<const S> x, int64_t b, Positions where, int64_t columns, Arena& arena) {
  const S* base = x.data + b * x.batch;
  if constexpr (sizeof(S) == sizeof(Acc<S>)) {
    if (!where.index && x.column == 1 && columns % kLanes<S> == 0) return {base + where.first * x.row, x.row};
  }
  const Matrix<Acc<S>> copy = arena.take_rows<Acc<S>>(where.count, columns);
  for (int64_t i = 0; i < where.count; ++i) load_row(base + where[i] * x.row, x.column, columns, copy.row(i));
  return {copy.data, copy.stride};
}

template <class S>
const Acc<S>* wide_vector(const S* x, int64_t columns, Arena& arena) {
  Acc<S>* row = arena.take<Acc<S>>(whole_columns(columns));
  load_row(x, 1, columns, row);
  return row;
}

// Rows in which a result is computed: the result itself if its rows are whole vectors, else scratch memory.
template <class S>
Matrix<Acc<S>> result_rows(S* data, int64_t columns, Positions where, Arena& arena) {
  if constexpr (sizeof(S) == sizeof(Acc<S>)) {
    if (!where.index && columns % kLanes<S> == 0) return {data, columns};
  }
  return arena.take_rows<Acc<S>>(where.count, columns);
}

template <class S>
FASTSEQ_INLINE void store_row(const Acc<S>* row, int64_t columns, S* data) {
  int64_t c = 0;
  for (; c + kLanes<S> <= columns; c += kLanes<S>) vstore(vload(row + c), data + c);
  if (c < columns) vstore(vload(row + c), data + c, columns - c);
}

// Clears the rows that are not in `where`.
template <class S>
void clear_other_rows(S* data, int64_t rows, int64_t columns, Positions where) {
  for (int64_t r = 0, i = 0; r < rows; ++r) {
    if (i < where.count && where[i] == r) {
      ++i;
    } else {
      std::memset(data + r * columns, 0, columns * sizeof(S));
    }
  }
}

// Stores the rows of result_rows() that are in scratch memory, and clears the rows that are not in `where`.
template <class S>
void finish_rows(Matrix<Acc<S>> result, S* data, int64_t rows, int64_t columns, Positions where) {
  clear_other_rows(data, rows, columns, where);
  if (static_cast<void*>(result.data) == static_cast<void*>(data)) return;
  for (int64_t i = 0; i < where.count; ++i) store_row(result.row(i), columns, data + where[i] * columns);
}

}  // namespace fastseq::cpu::FASTSEQ_ISA
FASTSEQ_REGION_END
