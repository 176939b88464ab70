// A fast float32 forward of GELU, tanh-GELU and SiLU: max(x, 0) - W(|x|), with W evaluated by a table of minimax
// polynomials instead of erf, tanh and exp. fast_forward_tables.h lists the errors with respect to the exact functions.
//
// The results differ from torch's: used only when requested (`fast`).
#pragma once

#include <lomem/config.h>
#include <lomem/core/fast_forward_tables.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lomem::fast {

// The formula is a template over `Lanes`, which is one float or a vector of floats.
//
//     struct Lanes {
//       using Floats, Words;                            // float and uint32_t, or vectors of them
//       static Floats fma(Floats a, Floats b, Floats c);  // a * b + c, rounded once
//       static Floats max(Floats a, Floats b);          // a > b ? a : b
//       static Floats min_magnitude(Floats a, Floats b);  // |a| < b ? |a| : b
//       static Words bits(Floats a);
//       struct Table {
//         explicit Table(const float (&entries)[32]);   // must outlive the table
//         Floats at(Words row) const;                   // entries[row % 32]
//       };
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

  class Table {
   public:
    LOMEM_HOST_DEVICE explicit Table(const float (&entries)[32]) : entries_(entries) {}

    LOMEM_HOST_DEVICE float at(std::uint32_t row) const {
      return entries_[row % 32];
    }

   private:
    const float* entries_;
  };
};

/// max(x, 0) - W(|x|). NaN gives NaN, and -0 gives -0.
template <class Lanes>
class ByTable {
 public:
  using Floats = typename Lanes::Floats;

  LOMEM_HOST_DEVICE ByTable(float clamp, float rows_a_unit, const float (&tail)[6][32])
      : clamp_(Floats{} + clamp),
        scale_(Floats{} + rows_a_unit),
        c0_(tail[0]),
        c1_(tail[1]),
        c2_(tail[2]),
        c3_(tail[3]),
        c4_(tail[4]),
        c5_(tail[5]) {}

  LOMEM_HOST_DEVICE Floats operator()(Floats x) const {
    const Floats zero{};
    const Floats a = Lanes::min_magnitude(x, clamp_);
    // Adding tail_magic leaves the row in the low bits of the sum.
    const Floats shifted = Lanes::fma(a, scale_, zero + tail_magic);
    const auto row = Lanes::bits(shifted);
    const Floats t = Lanes::fma(a, scale_, tail_magic - shifted);
    Floats w = c5_.at(row);
    w = Lanes::fma(w, t, c4_.at(row));
    w = Lanes::fma(w, t, c3_.at(row));
    w = Lanes::fma(w, t, c2_.at(row));
    w = Lanes::fma(w, t, c1_.at(row));
    w = Lanes::fma(w, t, c0_.at(row));
    return Lanes::max(zero, x) - w;
  }

 private:
  Floats clamp_;
  Floats scale_;
  typename Lanes::Table c0_;
  typename Lanes::Table c1_;
  typename Lanes::Table c2_;
  typename Lanes::Table c3_;
  typename Lanes::Table c4_;
  typename Lanes::Table c5_;
};

// Each has a member template `on`, which returns the evaluator. Create it once, outside of loops.

/// x * Phi(x).
struct GELU {
  template <class Lanes>
  LOMEM_HOST_DEVICE static ByTable<Lanes> on() {
    return {gelu_clamp, gelu_rows_a_unit, gelu_tail};
  }
};

/// GELU with tanh instead of erf.
struct GELUTanh {
  template <class Lanes>
  LOMEM_HOST_DEVICE static ByTable<Lanes> on() {
    return {gelu_tanh_clamp, gelu_tanh_rows_a_unit, gelu_tanh_tail};
  }
};

/// x * sigmoid(x).
struct SiLU {
  template <class Lanes>
  LOMEM_HOST_DEVICE static ByTable<Lanes> on() {
    return {silu_clamp, silu_rows_a_unit, silu_tail};
  }
};

/// Value of Function for a single float.
template <class Function>
LOMEM_HOST_DEVICE inline float value(float x) {
  return Function::template on<ScalarLanes>()(x);
}

}  // namespace lomem::fast
