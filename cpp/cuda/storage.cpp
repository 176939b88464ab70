// Storage in groups on CUDA.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <lomem/core/storage.h>
#include <torch/library.h>

#include "../src/checks.h"
#include "../src/op.h"
#include "call.h"

namespace lomem::detail {
namespace {

std::tuple<at::Tensor, at::Tensor> quantize_groups_cuda(
    const at::Tensor& input, int64_t bits, const std::optional<at::Tensor>& seed, int64_t offset, int64_t group_size) {
  constexpr const char* op = ops::quantize_groups.name;
  const GroupFormat format = check_group_encoding(op, input, bits, seed, offset, group_size);
  const CudaScope scope(input);
  const at::Tensor dense = input.is_non_overlapping_and_dense() ? input : input.contiguous();
  const int64_t n = dense.numel();
  at::Tensor codes = at::empty({packed_bytes(n, format.bits)}, dense.options().dtype(at::kByte));
  at::Tensor scales = at::empty({scale_count(n, format.group)}, dense.options().dtype(at::kBFloat16));
  const cudaError_t error = cuda::group_encode(
      to_dtype(dense.scalar_type()), dense.const_data_ptr(), n, format,
      has_tensor(seed) ? seed->const_data_ptr<int64_t>() : nullptr, static_cast<uint64_t>(offset),
      codes.mutable_data_ptr<uint8_t>(), static_cast<bfloat16*>(scales.mutable_data_ptr()), current_stream(dense));
  check_launch(op, dense, error);
  return {codes, scales};
}

at::Tensor dequantize_groups_cuda(
    const at::Tensor& codes, const at::Tensor& scales, c10::SymIntArrayRef size, at::OptionalSymIntArrayRef stride,
    at::ScalarType dtype, int64_t bits, const std::optional<at::Tensor>& seed, int64_t offset, int64_t group_size) {
  constexpr const char* op = ops::dequantize_groups.name;
  const GroupFormat format =
      check_group_decoding(op, codes, scales, size, stride, dtype, bits, seed, offset, group_size);
  const CudaScope scope(codes);
  const at::Tensor packed = codes.contiguous();
  const at::Tensor factors = scales.contiguous();
  const auto options = packed.options().dtype(dtype);
  at::Tensor output =
      stride.has_value() ? at::empty_strided_symint(size, *stride, options) : at::empty_symint(size, options);
  const cudaError_t error = cuda::group_decode(
      to_dtype(dtype), packed.const_data_ptr<uint8_t>(), static_cast<const bfloat16*>(factors.const_data_ptr()),
      output.numel(), format, has_tensor(seed) ? seed->const_data_ptr<int64_t>() : nullptr,
      static_cast<uint64_t>(offset), output.mutable_data_ptr(), current_stream(packed));
  check_launch(op, packed, error);
  return output;
}

TORCH_LIBRARY_IMPL(lomem, CUDA, m) {
  m.impl("quantize_groups", &quantize_groups_cuda);
  m.impl("dequantize_groups", &dequantize_groups_cuda);
}

}  // namespace
}  // namespace lomem::detail
