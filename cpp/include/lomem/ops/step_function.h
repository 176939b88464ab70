// Step functions as values: the boundaries and levels that approximate a derivative; and levels that are drawn at
// random.
#pragma once

#include <lomem/config.h>
#include <lomem/core/drawn.h>

#include <cstdint>
#include <string_view>
#include <vector>

namespace lomem {

/// Defines the gradient grad_output * levels[#{i : x > boundaries[i]}]. `boundaries` must be ascending; `levels` has
/// one more entry, at most 256. ceil(log2(levels.size())) bits per element are saved for backward.
struct LOMEM_API StepFunction {
  std::vector<double> boundaries;
  std::vector<double> levels;
};

/// The library's step function of `bits` bits for an activation.
///
/// `function` is the name of one of the smooth activations in lomem/ops/activations.h, or "gelu_tanh"; `parameters` are
/// all of its parameters, in the order of that function's arguments.
/// `criterion` is "derivative" for the step function closest to the derivative (arXiv:2202.00441), "primitive" for the
/// one whose integral is closest to the activation (arXiv:2406.16282), both in the mean square over the line, or
/// "paper" for the one published in arXiv:2406.16282, which exists for GELU (either form), SiLU and
/// x sigmoid(1.702 x) at 2 bits. bits = 1..8. If parameters do more than stretch a function, its step
/// function is fitted on first use.
LOMEM_API StepFunction step_function(
    std::string_view function, int64_t bits, std::string_view criterion = "derivative",
    const std::vector<double>& parameters = {});

/// The levels among which rounding "stochastic" draws the derivative of an activation: low + step * code, with codes
/// from 0 to 2^bits - 1 (core/drawn.h). Arguments as above. The standard deviation of what is drawn is step / sqrt(12).
LOMEM_API DrawnLevels<double> drawn_levels(
    std::string_view function, int64_t bits, const std::vector<double>& parameters = {});

}  // namespace lomem
