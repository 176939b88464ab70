// What the implementations of the activations' ops share.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "../op.h"
#include "table.h"

namespace lomem::detail {

/// The torch op that an activation is, in the dtype of its input whatever autocast does.
at::Tensor activation_value(const Activation& activation, const at::Tensor& input, Doubles parameters);

/// step_activation where no gradient is needed: the torch op itself, whatever `fast` is.
at::Tensor step_activation_value(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels, bool fast);

}  // namespace lomem::detail
