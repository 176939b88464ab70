// The activations whose values and codes a kernel makes in one pass, and what tests know of each: tests of such kernels
// run for all of them.
#pragma once

#include <lomem/core/activation.h>
#include <lomem/core/dtype.h>
#include <lomem/core/fast_forward.h>

#include <cmath>

#include "../../../cpp/src/cpu/kernel_table.h"

template <class Function>
struct Fused;

template <>
struct Fused<lomem::GELU> {
  static constexpr const char* name = "gelu";
  using Fast = lomem::fast::GELU;
  static constexpr auto kernels = &lomem::cpu::KernelTable::gelu;

  static double definition(double x) {
    return x / 2 * std::erfc(-x / std::sqrt(2.0));
  }
};

template <>
struct Fused<lomem::GELUTanh> {
  static constexpr const char* name = "gelu_tanh";
  using Fast = lomem::fast::GELUTanh;
  static constexpr auto kernels = &lomem::cpu::KernelTable::gelu_tanh;

  static double definition(double x) {
    // 1 + tanh(u) = 2 / (1 + exp(-2u)), without cancellation.
    const double u = std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
    return x / (1 + std::exp(-2 * u));
  }
};

template <>
struct Fused<lomem::SiLU> {
  static constexpr const char* name = "silu";
  using Fast = lomem::fast::SiLU;
  static constexpr auto kernels = &lomem::cpu::KernelTable::silu;

  static double definition(double x) {
    return x / (1 + std::exp(-x));
  }
};

template <class... Functions>
struct FunctionList {
  static constexpr int size = sizeof...(Functions);

  template <template <class...> class List>
  using as = List<Functions...>;

  /// Calls body(Type<Function>{}) for every one.
  template <class Body>
  static void for_each(Body&& body) {
    (body(lomem::Type<Functions>{}), ...);
  }
};

using FusedFunctions = FunctionList<lomem::GELU, lomem::GELUTanh, lomem::SiLU>;
