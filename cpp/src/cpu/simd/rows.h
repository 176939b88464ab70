// Rows of elements: loading and storing them in any dtype, vector by vector, and summing them in an order that does not
// depend on the instruction set.
#pragma once

#include <lomem/core/dtype.h>

#include "vector.h"

namespace lomem::cpu {
namespace {

/// An element type known only at run time: costs a predictable branch per vector. Without AVX a vector is short and
/// there are many of them: a call each, since inlining them all took the compiler a minute.
struct Any {};
#if defined(__AVX__)
#define LOMEM_ANY_ELEMENT inline
#else
#define LOMEM_ANY_ELEMENT [[gnu::noinline]]
#endif

template <int i>
struct Index {
  static constexpr int value = i;
};

/// Whether a vector starts a cache line. Of the vectors of `partial_sums` elements, only those are prefetched.
template <class T, int vector>
constexpr bool begins_line(Index<vector> /*vector*/) {
  return vector * lanes * sizeof(T) % 64 == 0;
}

template <class C, class T>
struct Source {
  const T* data;

  explicit Source(const Array& array) : data(static_cast<const T*>(array.data)) {}

  template <class Part>
  Vector<C> load(std::int64_t i, Part part) const {
    return load_as<C>(data + i, part);
  }
  template <int vector>
  void prefetch(std::int64_t i, Index<vector> index) const {
    if (begins_line<T>(index)) {
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(data) + i * sizeof(T)));
    }
  }
};

/// Calls visitor(Type<T>{}) for a dtype that C can hold: if float64 occurs, C is double.
template <class C, class Visitor>
inline void visit_dtype_within(DType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DType::float64:
      if constexpr (sizeof(C) == sizeof(double)) {
        visitor(Type<double>{});
      }
      return;
    case DType::float32: return visitor(Type<float>{});
    case DType::bfloat16: return visitor(Type<bfloat16>{});
    case DType::float16: return visitor(Type<float16>{});
  }
}

template <class C>
struct Source<C, Any> {
  Array array;

  explicit Source(const Array& array_) : array(array_) {}

  template <class Part>
  LOMEM_ANY_ELEMENT Vector<C> load(std::int64_t i, Part part) const {
    Vector<C> result{};
    visit_dtype_within<C>(array.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      result = load_as<C>(static_cast<const T*>(array.data) + i, part);
    });
    return result;
  }
  template <int vector>
  void prefetch(std::int64_t /*i*/, Index<vector> /*index*/) const {}
};

template <class C, class T>
struct Target {
  T* data;
  bool stream;

  Target(const MutableArray& array, bool stream_) : data(static_cast<T*>(array.data)), stream(stream_) {}

  template <class Part>
  void store(std::int64_t i, const Vector<C>& x, Part part) const {
    store_as<C>(x, data + i, stream, part);
  }
  /// Prefetches for a later store, which would otherwise wait for the line to be read.
  template <int vector>
  void prefetch(std::int64_t i, Index<vector> index) const {
    if (!stream && begins_line<T>(index)) {
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(data) + i * sizeof(T)), 1);
    }
  }
};

template <class C>
struct Target<C, Any> {
  MutableArray array;

  Target(const MutableArray& array_, bool /*stream*/) : array(array_) {}

  template <class Part>
  LOMEM_ANY_ELEMENT void store(std::int64_t i, const Vector<C>& x, Part part) const {
    visit_dtype_within<C>(array.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      store_as<C>(x, static_cast<T*>(array.data) + i, false, part);
    });
  }
  template <int vector>
  void prefetch(std::int64_t /*i*/, Index<vector> /*index*/) const {}
};

/// Sums over a row are added in an order that does not depend on the instruction set: within each 1024 elements,
/// element j is added to partial sum j % 32, and the partial sums are added in double, pairwise, halves first.
constexpr int partial_sums = 32;
constexpr int sum_vectors = partial_sums / lanes;
constexpr std::int64_t sum_cols = 1024;

/// Calls body(Index<0>{}), body(Index<1>{}), ... for the vectors of `partial_sums` elements: with constant indices,
/// partial sums stay in registers.
template <class Body>
inline __attribute__((always_inline)) void unroll(Body&& body) {
  body(Index<0>{}), body(Index<1>{});
  if constexpr (sum_vectors > 2) {
    body(Index<2>{}), body(Index<3>{});
  }
  if constexpr (sum_vectors > 4) {
    body(Index<4>{}), body(Index<5>{}), body(Index<6>{}), body(Index<7>{});
  }
  static_assert(sum_vectors == 2 || sum_vectors == 4 || sum_vectors == 8);
}

/// Calls body(Index<0>{}) to body(Index<count - 1>{}) for the rows of a block.
template <int count, class Body>
inline __attribute__((always_inline)) void for_rows(Body&& body) {
  if constexpr (count > 1) {
    for_rows<count - 1>(body);
  }
  body(Index<count - 1>{});
}

template <class C>
struct Sum {
  Vector<C> partial[sum_vectors] = {};

  template <int vector>
  void add(Index<vector>, const Vector<C>& x) {
    partial[vector] += x;
  }

  /// (Always inlined: if the address of a sum escapes, it is stored and loaded for every addition.)
  __attribute__((always_inline)) double total() const {
    Doubles sum[sum_vectors];
    unroll([&](auto i) __attribute__((always_inline)) {
      if constexpr (sizeof(C) == sizeof(double)) {
        sum[i.value] = partial[i.value];
      } else {
        sum[i.value] = to_doubles(partial[i.value]);
      }
    });
    for (int half = sum_vectors / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        sum[i] += sum[i + half];
      }
    }
    return sum_of_lanes(sum[0]);
  }
};

/// The part of a vector filled by the `left` remaining elements, which may be empty.
inline Partial part_of(std::int64_t left) {
  return {left < 0 ? 0 : left < lanes ? static_cast<int>(left) : lanes};
}

/// Number of columns up to the end of the last vector that for_each_vector visits.
inline std::int64_t padded(std::int64_t cols) {
  return (cols + partial_sums - 1) / partial_sums * partial_sums;
}

/// Calls body(j, vector, part) for the vectors of elements [begin, end), and for empty ones up to the next multiple of
/// `partial_sums`.
template <class Body>
inline __attribute__((always_inline)) void for_each_vector(std::int64_t begin, std::int64_t end, Body&& body) {
  std::int64_t j = begin;
  for (; j + partial_sums <= end; j += partial_sums) {
    unroll([&](auto vector) __attribute__((always_inline)) { body(j + vector.value * lanes, vector, Full{}); });
  }
  if (j < end) {
    unroll([&](auto vector) __attribute__((always_inline)) {
      body(j + vector.value * lanes, vector, part_of(end - j - vector.value * lanes));
    });
  }
}

/// Adds terms over the columns of some rows: `totals[i]` becomes the sum over j of what `body` adds to sums[i].
template <class C, int count, class Body>
inline __attribute__((always_inline)) void sum_over(std::int64_t cols, double (&totals)[count], Body&& body) {
  for (int i = 0; i < count; ++i) {
    totals[i] = 0;
  }
  for (std::int64_t begin = 0; begin < cols; begin += sum_cols) {
    const std::int64_t end = cols - begin < sum_cols ? cols : begin + sum_cols;
    Sum<C> sums[count];
    for_each_vector(begin, end, [&](std::int64_t j, auto vector, auto part) __attribute__((always_inline)) {
      body(sums, j, vector, part);
    });
    for (int i = 0; i < count; ++i) {
      totals[i] += sums[i].total();
    }
  }
}

}  // namespace
}  // namespace lomem::cpu
