// What codes drawn at random are made from: derivatives of activations as pieces of polynomials (core/drawn.h).
#pragma once

#include <lomem/core/drawn.h>

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <tuple>

#include "table.h"

namespace lomem::detail {

class DrawnFunction {
 public:
  /// Fits polynomials to a derivative.
  explicit DrawnFunction(const Derivative& derivative);

  const DrawnTable& table() const {
    return table_;
  }
  /// The least value of the derivative.
  double low() const {
    return low_;
  }
  /// Distance of neighbouring levels, of which the first is the least value and the last the largest.
  double step(int64_t bits) const {
    return (high_ - low_) / max_code(static_cast<int>(bits));
  }
  /// For the CPU: t of all elements of a 16-bit dtype, null for other dtypes. Made once, 256 KiB.
  const uint32_t* targets(DType dtype, int64_t bits) const;

 private:
  struct Targets {
    std::once_flag once;
    std::unique_ptr<uint32_t[]> values;
  };

  DrawnTable table_{};
  double low_;
  double high_;
  mutable std::array<std::array<Targets, max_bits>, 2> targets_;
};

/// That of an activation, made once.
std::shared_ptr<const DrawnFunction> resolve_drawn(const Activation& activation, Doubles parameters);

/// The table of an activation, for the library of the CUDA ops.
LOMEM_API DrawnTable drawn_table(const char* op, std::string_view function, Doubles parameters);

/// Checks the arguments of an op that draws the codes of an activation.
const Activation& check_drawn_activation(
    const char* op, const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits,
    const std::optional<at::Tensor>& seed, int64_t offset);

/// The op drawn_activation_forward, composed of other ops.
std::tuple<at::Tensor, at::Tensor, at::Tensor> drawn_activation_forward_value(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits,
    const std::optional<at::Tensor>& seed, int64_t offset);

}  // namespace lomem::detail
