// Shapes of the randomized linear layer's results, with symbolic sizes. (randomized_linear itself uses at::linear's.)
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"
#include "../op.h"
#include "random_projection.h"

namespace lomem::detail {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_meta(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seed,
    c10::SymInt proj_dim, std::string_view matmul) {
  constexpr const char* op = "lomem::randomized_linear_forward";
  const RandomMatmul kind = parse_matmul(op, matmul);
  check_linear(op, input, weight, bias);
  check_compression(op, input, seed, proj_dim);
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.back() = weight.sym_size(0);
  const c10::SymInt count = leading_rows(input).min(proj_dim);
  const c10::SymInt picked = picks_rows(kind) ? count : c10::SymInt(0);
  return {
      at::empty_symint(sizes, input.options()), at::empty_symint({count, input.sym_size(-1)}, input.options()),
      at::empty_symint({picked}, input.options().dtype(at::kLong)), at::empty({}, input.options().dtype(at::kLong))};
}

at::Tensor weight_grad_meta(
    const at::Tensor& grad_output, const at::Tensor& compressed, const OptionalTensor& indices, const at::Tensor& seed,
    std::string_view matmul) {
  constexpr const char* op = "lomem::randomized_linear_weight_grad";
  const RandomMatmul kind = parse_matmul(op, matmul);
  check_weight_grad(op, grad_output, compressed, indices, seed, picks_rows(kind));
  return at::empty_symint({grad_output.sym_size(-1), compressed.sym_size(1)}, compressed.options());
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("randomized_linear_forward", &forward_meta);
  m.impl("randomized_linear_weight_grad", &weight_grad_meta);
}

}  // namespace
}  // namespace lomem::detail
