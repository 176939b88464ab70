// Storage in groups on the CPU.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <lomem/core/storage.h>
#include <lomem/cpu/kernels.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../cpu/parallel.h"
#include "../op.h"

namespace lomem::detail {
namespace {

/// Ranges of elements start at multiples of this: at whole groups and whole cache lines of codes.
int64_t range_unit(const GroupFormat& format) {
  return std::max<int64_t>(format.group, 2 * cache_line_elements);
}

/// Nothing without a seed.
std::optional<RoundingBits> random_of_seed(const std::optional<at::Tensor>& seed, int64_t offset) {
  if (!has_tensor(seed)) {
    return std::nullopt;
  }
  return RoundingBits{static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), static_cast<uint64_t>(offset)};
}

std::tuple<at::Tensor, at::Tensor> quantize_groups_cpu(
    const at::Tensor& input, int64_t bits, const std::optional<at::Tensor>& seed, int64_t offset, int64_t group_size) {
  const GroupFormat format = check_group_encoding(ops::quantize_groups.name, input, bits, seed, offset, group_size);
  const at::Tensor dense = input.is_non_overlapping_and_dense() ? input : input.contiguous();
  const int64_t n = dense.numel();
  at::Tensor codes = at::empty({packed_bytes(n, format.bits)}, dense.options().dtype(at::kByte));
  at::Tensor scales = at::empty({scale_count(n, format.group)}, dense.options().dtype(at::kBFloat16));

  const std::optional<RoundingBits> random = random_of_seed(seed, offset);
  const DType dtype = to_dtype(dense.scalar_type());
  const auto size = static_cast<int64_t>(dense.element_size());
  const auto* source = static_cast<const char*>(dense.const_data_ptr());
  auto* bytes = codes.mutable_data_ptr<uint8_t>();
  auto* factors = static_cast<bfloat16*>(scales.mutable_data_ptr());
  const bool stream = cpu::should_stream(codes.nbytes());
  parallel_over_elements(n, range_unit(format), [&](int64_t begin, int64_t end) {
    cpu::group_encode(
        dtype, source + begin * size, begin, end - begin, format, random ? &*random : nullptr,
        bytes + begin * format.bits / 8, factors + begin / format.group, stream);
  });
  return {codes, scales};
}

at::Tensor dequantize_groups_cpu(
    const at::Tensor& codes, const at::Tensor& scales, c10::SymIntArrayRef size, at::OptionalSymIntArrayRef stride,
    at::ScalarType dtype, int64_t bits, const std::optional<at::Tensor>& seed, int64_t offset, int64_t group_size) {
  const GroupFormat format = check_group_decoding(
      ops::dequantize_groups.name, codes, scales, size, stride, dtype, bits, seed, offset, group_size);
  const at::Tensor packed = codes.contiguous();
  const at::Tensor factors = scales.contiguous();
  const auto options = packed.options().dtype(dtype);
  at::Tensor output =
      stride.has_value() ? at::empty_strided_symint(size, *stride, options) : at::empty_symint(size, options);
  const auto* bytes = packed.const_data_ptr<uint8_t>();
  const auto* values = static_cast<const bfloat16*>(factors.const_data_ptr());
  const auto element = static_cast<int64_t>(output.element_size());
  auto* target = static_cast<char*>(output.mutable_data_ptr());
  const std::optional<RoundingBits> random = random_of_seed(seed, offset);
  const bool stream = cpu::should_stream(output.nbytes());
  parallel_over_elements(output.numel(), range_unit(format), [&](int64_t begin, int64_t end) {
    cpu::group_decode(
        to_dtype(dtype), bytes + begin * format.bits / 8, values + begin / format.group, begin, end - begin, format,
        random ? &*random : nullptr, target + begin * element, stream);
  });
  return output;
}

TORCH_LIBRARY_IMPL(lomem, CPU, m) {
  m.impl("quantize_groups", &quantize_groups_cpu);
  m.impl("dequantize_groups", &dequantize_groups_cpu);
}

}  // namespace
}  // namespace lomem::detail
