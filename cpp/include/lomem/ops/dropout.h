// Dropout that saves 1 bit per element, or a seed. These are the same ops as torch.ops.lomem in Python.
//
// Every function throws a c10::Error that names the op, the argument, its value and the expected value.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>
#include <lomem/ops/registration.h>

#include <string_view>
#include <tuple>

namespace lomem {

/// at::dropout(input, p, training), bit for bit for the same state of torch's generator, which is left in the same
/// state. float64, float32, bfloat16 or float16; 0 <= p < 1. Saved for backward is a mask of 1 bit per element. If
/// `training` is false or p is 0, the result is `input` itself, as torch's. Gradients can be differentiated again.
///
/// With `saves` = "seed", saved are 8 bytes: a seed, from which the backward pass draws the mask again. The seed comes
/// from torch's generator, one number of which it takes, so other elements are dropped than torch drops. Which ones
/// follows from the seed alone, on every device.
LOMEM_API at::Tensor dropout(
    const at::Tensor& input, double p = 0.5, bool training = true, std::string_view saves = "mask");

/// The result of dropout and its mask, for code with its own backward pass: 1-D uint8, with 1 bit per element in the
/// row-major order of `input`, in the layout of core/packing.h; 1 means that the element is kept. Not differentiable.
LOMEM_API std::tuple<at::Tensor, at::Tensor> dropout_forward(const at::Tensor& input, double p);

/// Dropout of `input` with the mask that dropout_forward returned for a tensor of this shape: the same result once
/// more, or, for the gradient of the result, the gradient of the input. The result is row-major. Differentiable.
LOMEM_API at::Tensor dropout_apply(const at::Tensor& input, const at::Tensor& mask, double p);

/// The result of dropout with a seed, and the seed, which it draws: 0-d int64, never read on the host but for the CPU.
/// Not differentiable.
LOMEM_API std::tuple<at::Tensor, at::Tensor> seeded_dropout_forward(const at::Tensor& input, double p);

/// Dropout of `input` with a seed. As dropout_apply.
LOMEM_API at::Tensor seeded_dropout_apply(const at::Tensor& input, const at::Tensor& seed, double p);

}  // namespace lomem
