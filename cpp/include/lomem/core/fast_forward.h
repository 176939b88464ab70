// A fast float32 forward of GELU, tanh-GELU and SiLU: max(x, 0) - W(|x|), with W by a table of minimax
// polynomials in place of erf, tanh and exp. How far the results are from the exact functions stands in
// fast_forward_tables.h.
//
// Not what torch computes: only where a user asks for it (`fast`).
#pragma once

#include <lomem/config.h>
#include <lomem/core/fast_forward_tables.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lomem::fast {

// The formula is written for `Lanes`: one float, or a vector of them.
//
//     struct Lanes {
//       using Floats, Words;                            // float and uint32_t, or vectors of them
//       static Floats fma(Floats a, Floats b, Floats c);  // a * b + c, rounded once
//       static Floats max(Floats a, Floats b);          // a > b ? a : b
//       static Floats min_magnitude(Floats a, Floats b);  // |a| < b ? |a| : b
//       static Words bits(Floats a);
//       static Floats lookup(const float (&table)[32], Words row);  // table[row % 32]
//     };

/// One float.
struct ScalarLanes {
  using Floats = float;
  using Words = std::uint32_t;

  LOMEM_HOST_DEVICE static float fma(float a, float b, float c) {
    return std::fma(a, b, c);
  }
  LOMEM_HOST_DEVICE static float max(float a, float b) {
    return a > b ? a : b;
  }
  LOMEM_HOST_DEVICE static float min_magnitude(float a, float b) {
    return std::fabs(a) < b ? std::fabs(a) : b;
  }
  LOMEM_HOST_DEVICE static std::uint32_t bits(float a) {
    std::uint32_t result;
    std::memcpy(&result, &a, sizeof(result));
    return result;
  }
  LOMEM_HOST_DEVICE static float lookup(const float (&table)[32], std::uint32_t row) {
    return table[row % 32];
  }
};

/// max(x, 0) - W(|x|). NaN gives NaN, and -0 gives -0.
template <class Lanes>
LOMEM_HOST_DEVICE inline typename Lanes::Floats by_table(
    typename Lanes::Floats x, float clamp, float rows_a_unit, const float (&tail)[6][32]) {
  using Floats = typename Lanes::Floats;
  const Floats zero{};
  const Floats scale = zero + rows_a_unit;
  const Floats a = Lanes::min_magnitude(x, zero + clamp);
  // Adding this number leaves the row in the last bits of the sum.
  const Floats shifted = Lanes::fma(a, scale, zero + tail_magic);
  const auto row = Lanes::bits(shifted);
  const Floats t = Lanes::fma(a, scale, tail_magic - shifted);
  Floats w = Lanes::lookup(tail[5], row);
  w = Lanes::fma(w, t, Lanes::lookup(tail[4], row));
  w = Lanes::fma(w, t, Lanes::lookup(tail[3], row));
  w = Lanes::fma(w, t, Lanes::lookup(tail[2], row));
  w = Lanes::fma(w, t, Lanes::lookup(tail[1], row));
  w = Lanes::fma(w, t, Lanes::lookup(tail[0], row));
  return Lanes::max(zero, x) - w;
}

/// x * Phi(x).
struct GELU {
  template <class Lanes>
  LOMEM_HOST_DEVICE static typename Lanes::Floats value(typename Lanes::Floats x) {
    return by_table<Lanes>(x, gelu_clamp, gelu_rows_a_unit, gelu_tail);
  }
};

/// GELU with a tanh in place of erf.
struct GELUTanh {
  template <class Lanes>
  LOMEM_HOST_DEVICE static typename Lanes::Floats value(typename Lanes::Floats x) {
    return by_table<Lanes>(x, gelu_tanh_clamp, gelu_tanh_rows_a_unit, gelu_tanh_tail);
  }
};

/// x * sigmoid(x).
struct SiLU {
  template <class Lanes>
  LOMEM_HOST_DEVICE static typename Lanes::Floats value(typename Lanes::Floats x) {
    return by_table<Lanes>(x, silu_clamp, silu_rows_a_unit, silu_tail);
  }
};

/// Function's value of one float.
template <class Function>
LOMEM_HOST_DEVICE inline float value(float x) {
  return Function::template value<ScalarLanes>(x);
}

}  // namespace lomem::fast
