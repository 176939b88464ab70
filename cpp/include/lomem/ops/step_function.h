// Step functions as values: the boundaries and levels that stand in for a derivative.
#pragma once

#include <lomem/config.h>

#include <cstdint>
#include <string_view>
#include <vector>

namespace lomem {

/// The derivative grad_output * levels[#{i : x > boundaries[i]}]. `boundaries` ascend; `levels` has one
/// entry more, at most 256. The backward pass keeps ceil(log2(levels.size())) bits an element.
struct LOMEM_API StepFunction {
  std::vector<double> boundaries;
  std::vector<double> levels;
};

/// The step function of `bits` bits that the library has for an activation.
///
/// `function`: the name of one of the smooth activations in lomem/ops/activations.h, or "gelu_tanh"; `parameters`: all of
/// its own, in the order of that function's arguments.
/// `criterion`: "derivative" for the one that is nearest to the derivative (arXiv:2202.00441), "primitive" for the one
/// whose integral is nearest to the activation (arXiv:2406.16282), both in the mean square over the line; "paper" for the
/// one that arXiv:2406.16282 publishes, which exists for "gelu", "gelu_tanh", "quick_gelu" and "silu" at 2 bits. bits =
/// 1..8. Where parameters do more than stretch a function (alpha of ELU, a low threshold of softplus), it is fitted when
/// first asked for.
LOMEM_API StepFunction step_function(
    std::string_view function, int64_t bits, std::string_view criterion = "derivative",
    const std::vector<double>& parameters = {});

}  // namespace lomem
