// What storage in groups is apart from its backends: the C++ functions, and the shapes of results with symbolic sizes.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <lomem/core/storage.h>
#include <lomem/ops/storage.h>
#include <torch/library.h>

#include "../checks.h"
#include "../op.h"

namespace lomem {

std::tuple<at::Tensor, at::Tensor> quantize_groups(
    const at::Tensor& input, int64_t bits, const std::optional<at::Tensor>& seed, int64_t offset, int64_t group_size) {
  return detail::ops::quantize_groups(input, bits, seed, offset, group_size);
}

at::Tensor dequantize_groups(
    const at::Tensor& codes, const at::Tensor& scales, at::IntArrayRef size, at::OptionalIntArrayRef stride,
    at::ScalarType dtype, int64_t bits, const std::optional<at::Tensor>& seed, int64_t offset, int64_t group_size) {
  const c10::SymDimVector sizes(size.begin(), size.end());
  c10::SymDimVector strides;
  at::OptionalSymIntArrayRef given;
  if (stride.has_value()) {
    strides.assign(stride->begin(), stride->end());
    given = c10::SymIntArrayRef(strides);
  }
  return detail::ops::dequantize_groups(codes, scales, sizes, given, dtype, bits, seed, offset, group_size);
}

namespace detail {
namespace {

std::tuple<at::Tensor, at::Tensor> quantize_groups_meta(
    const at::Tensor& input, int64_t bits, const std::optional<at::Tensor>& seed, int64_t offset, int64_t group_size) {
  const GroupFormat format = check_group_encoding(ops::quantize_groups.name, input, bits, seed, offset, group_size);
  const c10::SymInt n = input.sym_numel();
  return {
      at::empty_symint({packed_bytes(n, format.bits)}, input.options().dtype(at::kByte)),
      at::empty_symint({scale_count(n, format.group)}, input.options().dtype(at::kBFloat16))};
}

at::Tensor dequantize_groups_meta(
    const at::Tensor& codes, const at::Tensor& scales, c10::SymIntArrayRef size, at::OptionalSymIntArrayRef stride,
    at::ScalarType dtype, int64_t bits, const std::optional<at::Tensor>& seed, int64_t offset, int64_t group_size) {
  check_group_decoding(ops::dequantize_groups.name, codes, scales, size, stride, dtype, bits, seed, offset, group_size);
  const auto options = codes.options().dtype(dtype);
  return stride.has_value() ? at::empty_strided_symint(size, *stride, options) : at::empty_symint(size, options);
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("quantize_groups", &quantize_groups_meta);
  m.impl("dequantize_groups", &dequantize_groups_meta);
}

}  // namespace
}  // namespace detail
}  // namespace lomem
