// Declarations shared by the implementations of the gated units.
#pragma once

#include <ATen/core/Tensor.h>

#include "../op.h"
#include "halves.h"

namespace lomem::detail {

/// activation(gate), by the torch op.
at::Tensor gate_value(GatedActivation activation, const at::Tensor& gate);

}  // namespace lomem::detail
