// The randomized linear layer on every backend, in ATen ops without custom kernels, and the shapes of its results.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "../checks.h"
#include "../op.h"
#include "random_projection.h"
#include "random_seed.h"

namespace lomem::detail {
namespace {

at::Tensor as_rows(const at::Tensor& tensor) {
  return tensor.reshape({leading_rows(tensor).expect_int(), tensor.size(-1)});
}

/// Used if no gradient is needed: the torch op itself.
at::Tensor randomized_linear_exact(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, std::string_view matmul,
    std::optional<int64_t> proj_dim, std::optional<double> proj_dim_ratio, std::optional<int64_t> proj_dim_min,
    std::optional<int64_t> proj_dim_max, const OptionalTensor& seed) {
  constexpr const char* op = ops::randomized_linear.name;
  parse_matmul(op, matmul);
  check_projection_size(op, {proj_dim, proj_dim_ratio, proj_dim_min, proj_dim_max});
  check_linear(op, input, weight, bias);
  check_seed(op, seed, "input", input);
  return at::linear(input, weight, bias);
}

std::tuple<at::Tensor, at::Tensor> compress(
    RandomMatmul matmul, const at::Tensor& rows, int64_t proj_dim, const at::Tensor& seed) {
  const at::TensorOptions index = rows.options().dtype(at::kLong);
  if (proj_dim >= rows.size(0)) {
    // All rows. (Ops are functional, so this is a copy.)
    return {rows.clone(at::MemoryFormat::Contiguous), at::arange(picks_rows(matmul) ? rows.size(0) : 0, index)};
  }
  if (picks_rows(matmul)) {
    return pick_rows(matmul, rows, proj_dim, seed);
  }
  return {project_rows(matmul, rows, proj_dim, seed), at::empty({0}, index)};
}

/// The given seed (copied, because ops are functional), or a new one if there is something to compress.
at::Tensor used_seed(const char* op, const at::Tensor& input, const OptionalTensor& seed, int64_t proj_dim) {
  if (has_tensor(seed)) {
    return seed->clone();
  }
  if (proj_dim >= leading_rows(input).expect_int()) {
    return at::zeros({}, input.options().dtype(at::kLong));
  }
  return draw_seed(op, input.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seed,
    int64_t proj_dim, std::string_view matmul) {
  constexpr const char* op = ops::randomized_linear_forward.name;
  const RandomMatmul kind = parse_matmul(op, matmul);
  check_linear(op, input, weight, bias);
  check_compression(op, input, seed, proj_dim);
  at::Tensor used = used_seed(op, input, seed, proj_dim);
  auto [compressed, indices] = compress(kind, as_rows(input), proj_dim, used);
  return {at::linear(input, weight, bias), compressed, indices, used};
}

/// Shapes with symbolic sizes. (randomized_linear itself has at::linear's.)
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_meta(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& seed,
    c10::SymInt proj_dim, std::string_view matmul) {
  constexpr const char* op = ops::randomized_linear_forward.name;
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

at::Tensor weight_grad(
    const at::Tensor& grad_output, const at::Tensor& compressed, const OptionalTensor& indices, const at::Tensor& seed,
    std::string_view matmul) {
  constexpr const char* op = ops::randomized_linear_weight_grad.name;
  const RandomMatmul kind = parse_matmul(op, matmul);
  const int64_t rows = check_weight_grad(op, grad_output, compressed, indices, seed, picks_rows(kind)).expect_int();
  const at::Tensor grad = as_rows(grad_output);
  const int64_t proj_dim = compressed.size(0);
  if (proj_dim == rows) {
    return grad.t().mm(compressed);
  }
  const at::Tensor picked =
      picks_rows(kind) ? grad.index_select(0, *indices) : project_rows(kind, grad, proj_dim, seed);
  return picked.t().mm(compressed);
}

at::Tensor weight_grad_meta(
    const at::Tensor& grad_output, const at::Tensor& compressed, const OptionalTensor& indices, const at::Tensor& seed,
    std::string_view matmul) {
  constexpr const char* op = ops::randomized_linear_weight_grad.name;
  const RandomMatmul kind = parse_matmul(op, matmul);
  check_weight_grad(op, grad_output, compressed, indices, seed, picks_rows(kind));
  return at::empty_symint({grad_output.sym_size(-1), compressed.sym_size(1)}, compressed.options());
}

TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  m.impl("randomized_linear", &randomized_linear_exact);
  m.impl("randomized_linear_forward", &forward);
  m.impl("randomized_linear_weight_grad", &weight_grad);
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("randomized_linear_forward", &forward_meta);
  m.impl("randomized_linear_weight_grad", &weight_grad_meta);
}

}  // namespace
}  // namespace lomem::detail
