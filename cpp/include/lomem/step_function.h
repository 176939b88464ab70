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
/// `function`: "gelu", "gelu_tanh", "quick_gelu", "silu", "mish", "sigmoid", "tanh", "tanhshrink",
/// "softplus" (parameters beta, threshold), "softsign", "logsigmoid", "elu" (alpha), "celu" (alpha), "selu" or
/// "hardswish"; `parameters`: all of them, in this order.
/// `criterion`: "primitive" for the one whose primitive is nearest to the activation (arXiv:2406.16282; GELU
/// and SiLU of 2 bits are ReGELU2 and ReSiLU2 to 1e-3), "derivative" for the one that is itself nearest to
/// its derivative (arXiv:2202.00441): both in the mean square over the line. bits = 1..8. Where parameters do more
/// than stretch a function (alpha of ELU, a low threshold of softplus), it is fitted when first asked for.
LOMEM_API StepFunction step_function(
    std::string_view function, int64_t bits, std::string_view criterion = "derivative",
    const std::vector<double>& parameters = {});

}  // namespace lomem
