// GELU that saves 2 bits, on the stable C interface of libtorch: two ops without autograd, which is Python's
// (measure.py).
#include <lomem/cpu/kernels.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int bits = 2;
constexpr std::int64_t unit = 64;  // Elements: a multiple of those in a byte of codes.
constexpr std::int64_t units_per_thread = 512;

lomem::DType to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return lomem::DType::float32;
    case ScalarType::Double: return lomem::DType::float64;
    case ScalarType::Half: return lomem::DType::float16;
    case ScalarType::BFloat16: return lomem::DType::bfloat16;
    default: STD_TORCH_CHECK(false, "lomem_stable: the dtype is not float32, float64, float16 or bfloat16");
  }
}

template <class Body>
void parallel_over_elements(std::int64_t n, const Body& body) {
  torch::stable::parallel_for(0, (n + unit - 1) / unit, units_per_thread, [&](std::int64_t begin, std::int64_t end) {
    body(begin * unit, std::min(end * unit, n));
  });
}

Tensor step_codes(const Tensor& input, const std::vector<double>& boundaries) {
  const Tensor source = torch::stable::contiguous(input);
  const lomem::DType dtype = to_dtype(source.scalar_type());
  const std::int64_t n = source.numel();
  const std::array<std::int64_t, 1> size = {(n * bits + 7) / 8};
  Tensor codes = torch::stable::new_empty(source, {size.data(), size.size()}, ScalarType::Byte);
  const auto* x = static_cast<const char*>(source.const_data_ptr());
  auto* packed = static_cast<std::uint8_t*>(codes.mutable_data_ptr());
  const auto width = static_cast<std::int64_t>(source.element_size());
  parallel_over_elements(n, [&](std::int64_t begin, std::int64_t end) {
    lomem::cpu::step_search_encode(
        dtype, x + begin * width, end - begin, boundaries.data(), bits, packed + begin * bits / 8);
  });
  return codes;
}

/// torch's own GELU, and the codes.
std::tuple<Tensor, Tensor> gelu_forward(const Tensor& input, std::vector<double> boundaries) {
  STD_TORCH_CHECK(
      boundaries.size() == 3, "lomem_stable::gelu_forward: boundaries has ", boundaries.size(),
      " elements, expected 3");
  Tensor codes = step_codes(input, boundaries);
  std::array<StableIValue, 2> stack = {
      torch::stable::detail::from(input), torch::stable::detail::from(std::string("none"))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::gelu", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), codes};
}

Tensor step_multiply(const Tensor& grad_output, const Tensor& codes, std::vector<double> levels) {
  const Tensor source = torch::stable::contiguous(grad_output);
  const lomem::DType dtype = to_dtype(source.scalar_type());
  const std::int64_t n = source.numel();
  STD_TORCH_CHECK(
      levels.size() == 4, "lomem_stable::step_multiply: levels has ", levels.size(), " elements, expected 4");
  STD_TORCH_CHECK(
      codes.numel() == (n * bits + 7) / 8, "lomem_stable::step_multiply: codes has ", codes.numel(),
      " bytes, expected ", (n * bits + 7) / 8, " for ", n, " elements");
  Tensor grad_input = torch::stable::empty_like(source);
  const auto* g = static_cast<const char*>(source.const_data_ptr());
  auto* target = static_cast<char*>(grad_input.mutable_data_ptr());
  const auto* packed = static_cast<const std::uint8_t*>(codes.const_data_ptr());
  const auto width = static_cast<std::int64_t>(source.element_size());
  parallel_over_elements(n, [&](std::int64_t begin, std::int64_t end) {
    lomem::cpu::step_decode_multiply(
        dtype, g + begin * width, packed + begin * bits / 8, levels.data(), bits, end - begin, target + begin * width);
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY(lomem_stable, m) {
  m.def("gelu_forward(Tensor input, float[] boundaries) -> (Tensor output, Tensor codes)");
  m.def("step_multiply(Tensor grad_output, Tensor codes, float[] levels) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lomem_stable, CPU, m) {
  m.impl("gelu_forward", TORCH_BOX(&gelu_forward));
  m.impl("step_multiply", TORCH_BOX(&step_multiply));
}
