// Declarations shared by the implementations of low-rank adapters.
#pragma once

#include <ATen/core/Tensor.h>

#include "../op.h"

namespace lomem::detail {

/// What the product with lora_a takes, and the mask of what was dropped: undefined if p is 0.
struct Dropped {
  at::Tensor input;
  at::Tensor mask;
};

/// input.to(dtype), with elements dropped at random, in the dtype `result`.
Dropped drop(const at::Tensor& input, double p, at::ScalarType dtype, at::ScalarType result);

/// The same input again, by its mask.
at::Tensor dropped_again(
    const at::Tensor& input, const at::Tensor& mask, double p, at::ScalarType dtype, at::ScalarType result);

/// linear(product, lora_b, bias) * scaling.
at::Tensor scaled_update(
    const at::Tensor& product, const at::Tensor& lora_b, const OptionalTensor& bias, double scaling);

/// tensor * scaling, or the tensor itself if that is the same.
at::Tensor scaled(const at::Tensor& tensor, double scaling);

}  // namespace lomem::detail
