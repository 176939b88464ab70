// Step functions of activations with parameters that do more than stretch them: found when they are asked for.
#pragma once

#include <lomem/ops/step_function.h>

#include <cstdint>
#include <string_view>

#include "table.h"

namespace lomem::detail {

/// One of the tables that the library ships.
StepFunction shipped_steps(std::string_view function, Criterion criterion, int64_t bits);

/// Of alpha (e^x - 1) below 0 and x above. Where the derivative jumps, at 0, the best step function has a boundary, or
/// its last piece begins before; both are looked at.
StepFunction elu_steps(double alpha, Criterion criterion, int64_t bits);

/// Of log(1 + e^x) up to the threshold and x above. For "primitive", of log(1 + e^x) everywhere: h~ is continuous, and
/// torch's function is not.
StepFunction softplus_steps(double threshold, Criterion criterion, int64_t bits);

}  // namespace lomem::detail
