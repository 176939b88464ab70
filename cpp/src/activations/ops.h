// Declarations shared by the implementations of the activation ops.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "../op.h"
#include "table.h"

namespace lomem::detail {

/// Runs the torch op of an activation in the dtype of its input, even under autocast.
at::Tensor activation_value(const Activation& activation, const at::Tensor& input, Doubles parameters);

/// The elements of `input` in the memory order of `output`, which is dense, as a 1-D tensor.
at::Tensor in_memory_order(const at::Tensor& input, const at::Tensor& output);

/// Uninitialised codes of a tensor whose sizes may be symbolic.
at::Tensor empty_codes_like(const at::Tensor& input, int64_t bits);

}  // namespace lomem::detail
