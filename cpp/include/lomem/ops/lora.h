// Low-rank adapters of linear layers (LoRA, arXiv:2106.09685) that save no copy of their input. The function is
// differentiable, and the same op as in torch.ops.lomem in Python.
//
// It throws a c10::Error that names the op, the argument, its value and the expected value.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>
#include <lomem/ops/registration.h>

#include <optional>

namespace lomem {

/// What an adapter adds to the result of a linear layer, bit for bit as by torch's ops:
///
///     at::linear(at::linear(at::dropout(input.to(lora_a.scalar_type()), p, true), lora_a), lora_b, bias) * scaling
///
/// `input` has shape (*, in_features), `lora_a` (rank, in_features), `lora_b` (out_features, rank) and `bias`
/// (out_features). The dtypes are float64, float32, bfloat16 or float16; lora_a, lora_b and bias have the same one,
/// which is that of the result. Saved for backward are `input` in its own dtype (if lora_a needs a gradient), its
/// product with lora_a (if lora_b does), one bit per element of the input if p > 0, and the weights. Second derivatives
/// are exact.
LOMEM_API at::Tensor lora(
    const at::Tensor& input, const at::Tensor& lora_a, const at::Tensor& lora_b, double scaling = 1,
    const std::optional<at::Tensor>& bias = std::nullopt, double p = 0);

}  // namespace lomem
