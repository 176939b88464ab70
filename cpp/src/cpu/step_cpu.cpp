// Step activations on the CPU: tensors in, kernels on pointers out.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <lomem/kernels.h>
#include <torch/library.h>

#include "../checks.h"
#include "../step_ops.h"
#include "parallel.h"

namespace lomem::detail {
namespace {

template <class Op, class... Args>
std::tuple<at::Tensor, at::Tensor> step_forward_cpu(const at::Tensor& input, Args... args) {
  using Step = typename Op::Step;
  check_float_tensor(Op::forward_name, "input", input);
  Op::check(Op::forward_name, args...);

  // The torch op on the very tensor that came in: torch picks its kernel by strides, and kernels
  // differ in last bits.
  const at::Tensor output = Op::activation(input, args...);
  // The output is dense, and has the input's strides if that is dense too; else (sliced,
  // expanded) the input is copied to the output's strides, so that one order serves both.
  const at::Tensor dense = input.strides() == output.strides() ? input : at::empty_like(output).copy_(input);
  const int64_t n = input.numel();
  at::Tensor codes = at::empty({packed_bytes(n, Step::bits)}, input.options().dtype(at::kByte));

  const DType dtype = to_dtype(input.scalar_type());
  const auto* x = static_cast<const char*>(dense.const_data_ptr());
  auto* packed = codes.mutable_data_ptr<uint8_t>();
  parallel_over_elements(n, group_size, [&](int64_t begin, int64_t end) {
    cpu::step_encode<Step>(
        dtype, x + begin * static_cast<int64_t>(element_size(dtype)), end - begin,
        packed + begin / group_size * Step::bits);
  });
  return {output, codes};
}

at::Tensor step_activation_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits) {
  check_step_backward(grad_output, codes, levels, bits);
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor packed_codes = codes.contiguous();
  at::Tensor grad_input = at::empty_like(grad);

  const DType dtype = to_dtype(grad.scalar_type());
  const int64_t size = static_cast<int64_t>(element_size(dtype));
  const auto* source = static_cast<const char*>(grad.const_data_ptr());
  const auto* packed = packed_codes.const_data_ptr<uint8_t>();
  auto* target = static_cast<char*>(grad_input.mutable_data_ptr());
  parallel_over_elements(grad.numel(), group_size, [&](int64_t begin, int64_t end) {
    cpu::step_decode_multiply(
        dtype, source + begin * size, packed + begin / group_size * bits, levels.data(), static_cast<int>(bits),
        end - begin, target + begin * size);
  });
  return grad_input;
}

TORCH_LIBRARY_IMPL(lomem, CPU, m) {
  m.impl("regelu2_forward", &step_forward_cpu<ReGELU2Op, std::string_view>);
  m.impl("resilu2_forward", &step_forward_cpu<ReSiLU2Op>);
  m.impl("step_activation_backward", &step_activation_backward_cpu);
}

}  // namespace
}  // namespace lomem::detail
