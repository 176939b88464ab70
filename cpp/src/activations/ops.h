// Declarations shared by the implementations of the activation ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "../op.h"
#include "table.h"

namespace lomem::detail {

/// Runs the torch op of an activation in the dtype of its input, even under autocast.
at::Tensor activation_value(const Activation& activation, const at::Tensor& input, Doubles parameters);

/// step_activation without a gradient: the torch op itself, whether `fast` is set or not.
at::Tensor step_activation_value(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels, bool fast);

}  // namespace lomem::detail
