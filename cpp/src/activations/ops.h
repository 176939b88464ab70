// Declarations shared by the implementations of the activation ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "../op.h"
#include "table.h"

namespace lomem::detail {

/// Runs the torch op of an activation in the dtype of its input, even under autocast.
at::Tensor activation_value(const Activation& activation, const at::Tensor& input, Doubles parameters);

}  // namespace lomem::detail
