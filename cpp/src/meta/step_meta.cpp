// Shapes of the step activations, with symbolic sizes.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <lomem/core/packing.h>
#include <torch/library.h>

#include "../checks.h"
#include "../step_ops.h"

namespace lomem::detail {
namespace {

template <class Op, class... Args>
std::tuple<at::Tensor, at::Tensor> step_forward_meta(const at::Tensor& input, Args... args) {
  check_float_tensor(Op::forward_name, "input", input);
  Op::check(Op::forward_name, args...);
  return {
      Op::activation(input, args...),
      at::empty_symint({packed_bytes(input.sym_numel(), Op::Step::bits)}, input.options().dtype(at::kByte))};
}

at::Tensor step_activation_backward_meta(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits) {
  check_step_backward(grad_output, codes, levels, bits);
  return at::empty_symint(grad_output.sym_sizes(), grad_output.options());
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("regelu2_forward", &step_forward_meta<ReGELU2Op, std::string_view, bool>);
  m.impl("resilu2_forward", &step_forward_meta<ReSiLU2Op, bool>);
  m.impl("step_activation_backward", &step_activation_backward_meta);
}

}  // namespace
}  // namespace lomem::detail
