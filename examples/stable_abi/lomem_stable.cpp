// ReGELU2 on the stable C interface of libtorch: two ops without autograd, which is Python's (measure.py).
#include <lomem/cpu/kernels.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <tuple>

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

Tensor step_codes(const Tensor& input) {
  const Tensor source = torch::stable::contiguous(input);
  const lomem::DType dtype = to_dtype(source.scalar_type());
  const std::int64_t n = source.numel();
  const std::array<std::int64_t, 1> size = {(n * bits + 7) / 8};
  Tensor codes = torch::stable::new_empty(source, {size.data(), size.size()}, ScalarType::Byte);
  const auto* x = static_cast<const char*>(source.const_data_ptr());
  auto* packed = static_cast<std::uint8_t*>(codes.mutable_data_ptr());
  const auto width = static_cast<std::int64_t>(source.element_size());
  parallel_over_elements(n, [&](std::int64_t begin, std::int64_t end) {
    lomem::cpu::step_encode<lomem::GELU>(dtype, x + begin * width, end - begin, packed + begin * bits / 8);
  });
  return codes;
}

/// torch's own GELU, and the codes.
std::tuple<Tensor, Tensor> regelu2_forward(const Tensor& input) {
  Tensor codes = step_codes(input);
  std::array<StableIValue, 2> stack = {
      torch::stable::detail::from(input), torch::stable::detail::from(std::string("none"))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::gelu", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), codes};
}

Tensor regelu2_backward(const Tensor& grad_output, const Tensor& codes) {
  const Tensor source = torch::stable::contiguous(grad_output);
  const lomem::DType dtype = to_dtype(source.scalar_type());
  const std::int64_t n = source.numel();
  STD_TORCH_CHECK(
      codes.numel() == (n * bits + 7) / 8, "lomem_stable::regelu2_backward: codes has ", codes.numel(),
      " bytes, expected ", (n * bits + 7) / 8, " for ", n, " elements");
  Tensor grad_input = torch::stable::empty_like(source);
  const auto* g = static_cast<const char*>(source.const_data_ptr());
  auto* target = static_cast<char*>(grad_input.mutable_data_ptr());
  const auto* packed = static_cast<const std::uint8_t*>(codes.const_data_ptr());
  const auto width = static_cast<std::int64_t>(source.element_size());
  const std::array<double, 4> levels = {
      lomem::ReGELU2::level(0), lomem::ReGELU2::level(1), lomem::ReGELU2::level(2), lomem::ReGELU2::level(3)};
  parallel_over_elements(n, [&](std::int64_t begin, std::int64_t end) {
    lomem::cpu::step_decode_multiply(
        dtype, g + begin * width, packed + begin * bits / 8, levels.data(), bits, end - begin, target + begin * width);
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY(lomem_stable, m) {
  m.def("regelu2_forward(Tensor input) -> (Tensor output, Tensor codes)");
  m.def("regelu2_backward(Tensor grad_output, Tensor codes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lomem_stable, CPU, m) {
  m.impl("regelu2_forward", TORCH_BOX(&regelu2_forward));
  m.impl("regelu2_backward", TORCH_BOX(&regelu2_backward));
}
