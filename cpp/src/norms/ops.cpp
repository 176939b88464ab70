// Shapes of the norms' results, with symbolic sizes.
#include <ATen/ops/empty.h>

#include "../checks.h"
#include "ops.h"

namespace lomem::detail {
namespace {

at::Tensor empty_like_if(bool wanted, const OptionalTensor& parameter) {
  return wanted && has_tensor(parameter) ? at::empty_symint(parameter->sym_sizes(), parameter->options())
                                         : at::Tensor();
}

NormResults empty_results(const char* op, const NormArguments& args) {
  const auto& [input, normalized_shape, weight, bias, eps, dtype] = args;
  const NormSizes sizes = check_norm_forward(op, input, normalized_shape, weight, bias, eps, dtype);
  return {
      at::empty_symint(input.sym_sizes(), input.options().dtype(dtype.value_or(input.scalar_type()))),
      at::empty_symint(sizes.rstd, input.options().dtype(rstd_dtype(input.scalar_type())))};
}

struct MetaNorms {
  template <class Op>
  static at::Tensor value(const NormArguments& args) {
    return std::get<0>(empty_results(Op::op.name, args));
  }

  template <class Op>
  static NormResults forward(const NormArguments& args) {
    return empty_results(Op::forward_op.name, args);
  }

  template <class Op>
  static NormGradients backward(const NormBackwardArguments& args) {
    const auto& [grad_output, output, rstd, normalized_shape, weight, bias, input_dtype, output_mask] = args;
    check_norm_backward(Op::backward_op.name, grad_output, output, rstd, normalized_shape, weight, bias, input_dtype);
    at::Tensor grad_input;
    if (output_mask[0]) {
      grad_input = at::empty_symint(output.sym_sizes(), output.options().dtype(input_dtype));
    }
    return {grad_input, empty_like_if(output_mask[1], weight), empty_like_if(output_mask[2], bias)};
  }
};

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  implement_norms<MetaNorms>(m);
}

}  // namespace
}  // namespace lomem::detail
