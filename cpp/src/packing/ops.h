// Packing of masks.
#pragma once

#include <ATen/core/Tensor.h>

namespace lomem::detail {

/// A mask of bools, or of bytes 0 and 1, with 1 bit per element in row-major order.
at::Tensor packed_mask(const at::Tensor& mask);

}  // namespace lomem::detail
