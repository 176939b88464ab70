// The randomized linear layer on every backend: ATen ops, no kernels of its own.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "checks.h"
#include "dispatch.h"
#include "random_projection.h"

namespace lomem::detail {
namespace {

at::Tensor as_rows(const at::Tensor& tensor) {
  return tensor.reshape({leading_rows(tensor).expect_int(), tensor.size(-1)});
}

int64_t seed_value(const char* op, const at::Tensor& seed) {
  // On the CPU, so that no device is waited for.
  TORCH_CHECK(seed.device().is_cpu(), op, ": seed is on ", seed.device(), ", expected cpu");
  return seed.item<int64_t>();
}

/// Where no gradient is needed: the torch op itself.
at::Tensor randomized_linear_exact(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, std::string_view matmul,
    std::optional<int64_t> proj_dim, std::optional<double> proj_dim_ratio, std::optional<int64_t> proj_dim_min,
    std::optional<int64_t> proj_dim_max) {
  parse_matmul("lomem::randomized_linear", matmul);
  check_randomized_linear(input, weight, bias, {proj_dim, proj_dim_ratio, proj_dim_min, proj_dim_max});
  return at::linear(input, weight, bias);
}

std::tuple<at::Tensor, at::Tensor> compress(
    const at::Tensor& input, const at::Tensor& seed, int64_t proj_dim, std::string_view matmul) {
  constexpr const char* op = "lomem::randomized_linear_compress";
  const RandomMatmul kind = parse_matmul(op, matmul);
  const int64_t rows = check_compress(input, seed, proj_dim).expect_int();
  const int64_t seed_number = seed_value(op, seed);
  const at::TensorOptions index = input.options().dtype(at::kLong);
  if (proj_dim >= rows) {
    // All of them. (Functional: a copy.)
    return {as_rows(input).clone(at::MemoryFormat::Contiguous), at::arange(picks_rows(kind) ? rows : 0, index)};
  }
  return picks_rows(kind) ? pick_rows(kind, as_rows(input), proj_dim, seed_number)
                          : std::tuple(project_rows(kind, as_rows(input), proj_dim, seed_number), at::empty({0}, index));
}

at::Tensor weight_grad(
    const at::Tensor& grad_output, const at::Tensor& compressed, const OptionalTensor& indices, const at::Tensor& seed,
    std::string_view matmul) {
  constexpr const char* op = "lomem::randomized_linear_weight_grad";
  const RandomMatmul kind = parse_matmul(op, matmul);
  const int64_t rows = check_weight_grad(grad_output, compressed, indices, seed, picks_rows(kind)).expect_int();
  const int64_t seed_number = seed_value(op, seed);
  const at::Tensor grad = as_rows(grad_output);
  const int64_t proj_dim = compressed.size(0);
  if (proj_dim == rows) {
    return grad.t().mm(compressed);
  }
  const at::Tensor picked =
      picks_rows(kind) ? grad.index_select(0, *indices) : project_rows(kind, grad, proj_dim, seed_number);
  return picked.t().mm(compressed);
}

TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  m.impl("randomized_linear", &randomized_linear_exact);
  m.impl("randomized_linear_compress", &compress);
  m.impl("randomized_linear_weight_grad", &weight_grad);
}

}  // namespace
}  // namespace lomem::detail
