// What torch draws for a dropout on the CPU.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace lomem::detail {

/// The mask of elements that torch's dropout keeps on the CPU for a contiguous input, with a probability of `kept`
/// each. Leaves the generator, by default torch's, in the state in which torch leaves it.
at::Tensor draw_mask(
    at::IntArrayRef sizes, at::ScalarType dtype, double kept, const std::optional<at::Generator>& generator = {});

}  // namespace lomem::detail
