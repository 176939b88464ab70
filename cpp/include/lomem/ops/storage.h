// Storage in groups: codes of 8 or 4 bits and a bfloat16 scale for every 128 elements, in place of a tensor. These are
// the same ops as torch.ops.lomem in Python. The format and the arithmetic: core/storage.h.
//
// Every function throws a c10::Error that names the op, the argument, its value and the expected value.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>
#include <lomem/ops/registration.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace lomem {

/// Codes and scales of `input`: float64, float32, bfloat16 or float16, of any shape. The elements are taken in memory
/// order if `input` is dense and does not overlap itself, otherwise in row-major order. `bits` is 8 or 4; `group_size`,
/// a power of two from 16 to 1024. Codes are 1-D uint8, ceil(n * bits / 8) bytes; scales, 1-D bfloat16, ceil(n /
/// group_size) elements.
///
/// Without `seed`, elements are rounded to nearest, ties to even. With one, 0-d int64 on the device of `input` and
/// never read on the host but for the CPU, they are rounded up or down at random, so that the mean over seeds is the
/// element itself. `offset` >= 0 is the number of a stream of random bits: one seed serves many tensors.
///
/// If an element of a group is infinite or NaN, or a float64 beyond float32's range, the whole group becomes NaN. Not
/// differentiable.
LOMEM_API std::tuple<at::Tensor, at::Tensor> quantize_groups(
    const at::Tensor& input, int64_t bits = 8, const std::optional<at::Tensor>& seed = std::nullopt, int64_t offset = 0,
    int64_t group_size = 128);

/// The tensor of codes and scales, with the given sizes, dtype and strides, which must be those of a dense tensor;
/// without strides it is contiguous. With the `seed` and `offset` of the codes, their dither is subtracted, which
/// halves the variance of the error and makes it independent of the element. Not differentiable.
LOMEM_API at::Tensor dequantize_groups(
    const at::Tensor& codes, const at::Tensor& scales, at::IntArrayRef size, at::OptionalIntArrayRef stride,
    at::ScalarType dtype, int64_t bits = 8, const std::optional<at::Tensor>& seed = std::nullopt, int64_t offset = 0,
    int64_t group_size = 128);

}  // namespace lomem
