// Step functions of activations with parameters that do more than stretch them, fitted on demand.
#pragma once

#include <lomem/ops/step_function.h>

#include <cstdint>
#include <string_view>

#include "table.h"

namespace lomem::detail {

/// One of the tables that ship with the library.
StepFunction shipped_steps(std::string_view function, Criterion criterion, int64_t bits);

/// For alpha (e^x - 1) below 0 and x above. At 0, where the derivative jumps, the best step function either has a
/// boundary or starts its last piece before; both are tried.
StepFunction elu_steps(double alpha, Criterion criterion, int64_t bits);

/// For log(1 + e^x) up to the threshold and x above. For "primitive", fits log(1 + e^x) everywhere: h~ is continuous,
/// and torch's function is not.
StepFunction softplus_steps(double threshold, Criterion criterion, int64_t bits);

}  // namespace lomem::detail
