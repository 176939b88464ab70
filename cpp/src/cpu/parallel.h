// Parallel loops. Fewer elements than elements_per_thread are not worth a thread.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "subnormals.h"

#ifndef _OPENMP
// Without OpenMP, at::parallel_for silently compiles to a serial loop.
#error "compile the CPU ops with OpenMP"
#endif

namespace lomem::detail {

inline constexpr int64_t elements_per_thread = 32768;

/// A multiple of every vector length and of the number of codes in a byte: ranges that start there stay aligned.
inline constexpr int64_t cache_line_elements = 64;

/// at::parallel_for whose threads treat subnormal numbers like the calling thread.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  const Subnormals mode = Subnormals::of_this_thread();
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    const SubnormalsScope same(mode);
    body(begin, end);
  });
}

/// Calls body(begin, end) for ranges of elements of [0, n) that start at multiples of `unit`.
template <class Body>
void parallel_over_elements(int64_t n, int64_t unit, const Body& body) {
  parallel_for((n + unit - 1) / unit, elements_per_thread / unit, [&](int64_t begin, int64_t end) {
    body(begin * unit, std::min(end * unit, n));
  });
}

}  // namespace lomem::detail
