// Codes of arbitrary step functions, and of bands, on the CPU.
#include <ATen/EmptyTensor.h>
#include <lomem/kernels.h>
#include <torch/library.h>

#include "../checks.h"
#include "parallel.h"

namespace lomem::detail {
namespace {

/// Calls encode(dtype, x, count, packed) for ranges of the elements of `input`, in row-major order.
template <class Encode>
at::Tensor codes_of(const at::Tensor& input, int bits, const Encode& encode) {
  const at::Tensor source = input.contiguous();
  const int64_t n = source.numel();
  at::Tensor codes(at::detail::empty_cpu({packed_bytes(n, bits)}, at::kByte));
  const DType dtype = to_dtype(source.scalar_type());
  const auto* x = static_cast<const char*>(source.const_data_ptr());
  auto* packed = codes.mutable_data_ptr<uint8_t>();
  parallel_over_elements(n, cache_line_elements, [&](int64_t begin, int64_t end) {
    const SubnormalsScope codes_are_the_same_in_every_mode(Subnormals::kept());
    encode(
        dtype, x + begin * static_cast<int64_t>(element_size(dtype)), end - begin, packed + begin / group_size * bits);
  });
  return codes;
}

at::Tensor step_codes_cpu(const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits) {
  check_step_codes(input, boundaries, bits);
  const std::vector<double> filled = filled_boundaries(boundaries, bits);
  const int width = static_cast<int>(bits);
  return codes_of(input, width, [&](DType dtype, const void* x, int64_t n, uint8_t* packed) {
    cpu::step_search_encode(dtype, x, n, filled.data(), width, packed);
  });
}

at::Tensor band_codes_cpu(const at::Tensor& input, double low, double high) {
  check_band_codes(input, low, high);
  return codes_of(input, 1, [&](DType dtype, const void* x, int64_t n, uint8_t* packed) {
    cpu::band_encode(dtype, x, n, low, high, packed);
  });
}

TORCH_LIBRARY_IMPL(lomem, CPU, m) {
  m.impl("step_codes", &step_codes_cpu);
  m.impl("band_codes", &band_codes_cpu);
}

}  // namespace
}  // namespace lomem::detail
