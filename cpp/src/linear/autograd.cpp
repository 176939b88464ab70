// Gradients of the randomized linear layer.
#include <ATen/Functions.h>

#include <cmath>
#include <utility>

#include "../autograd.h"
#include "random_projection.h"
#include "random_seed.h"

namespace lomem::detail {
namespace {

constexpr const char* op_name = ops::randomized_linear.name;

/// The fraction nearest to `ratio`, in (0, 1], with a denominator of at most 2^20: best approximation by continued
/// fractions, like Python's Fraction.limit_denominator. (0.2 becomes 1/5: integer arithmetic allows symbolic sizes.)
std::pair<int64_t, int64_t> nearest_fraction(double ratio) {
  constexpr int64_t limit = int64_t{1} << 20;
  int64_t p0 = 0, q0 = 1, p1 = 1, q1 = 0;
  double rest = ratio;
  for (;;) {
    const double whole = std::floor(rest);
    // The nearer one of the last convergent and the last semiconvergent within the limit.
    if (whole * static_cast<double>(q1) + static_cast<double>(q0) > limit) {
      const int64_t k = (limit - q0) / q1;
      const int64_t p = p0 + k * p1;
      const int64_t q = q0 + k * q1;
      const auto distance = [&](int64_t a, int64_t b) {
        return std::abs(static_cast<double>(a) / static_cast<double>(b) - ratio);
      };
      return distance(p1, q1) <= distance(p, q) ? std::pair(p1, q1) : std::pair(p, q);
    }
    const auto a = static_cast<int64_t>(whole);
    p0 = std::exchange(p1, a * p1 + p0);
    q0 = std::exchange(q1, a * q1 + q0);
    const double fraction = rest - whole;
    if (fraction == 0) {
      return {p1, q1};
    }
    rest = 1 / fraction;
  }
}

/// How many of `rows` rows are saved.
c10::SymInt projection_dim(const ProjectionSize& size, const c10::SymInt& rows) {
  c10::SymInt result = size.dim.value_or(0);
  if (size.ratio) {
    const auto [p, q] = nearest_fraction(*size.ratio);
    result = (rows * (2 * p) + q) / (2 * q);  // rounded half up
  }
  result = result.max(size.min.value_or(1));
  if (size.max) {
    result = result.min(*size.max);
  }
  return result.min(rows);
}

/// Whether a matrix is in column-major order.
bool is_column_major(const at::Tensor& matrix) {
  return matrix.sym_stride(0).sym_eq(1).maybe_as_bool().value_or(false) &&
         matrix.sym_stride(1).sym_eq(matrix.sym_size(0)).maybe_as_bool().value_or(false);
}

/// at::linear and its gradients except for the weight's, bit for bit, using the ops that at::linear calls if the weight
/// requires a gradient. (Below autograd, at::linear itself calls different ops for some layouts, because it checks
/// which tensors require a gradient.)
struct RandomizedLinear : torch::autograd::Function<RandomizedLinear> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
      const OptionalTensor& seed, const c10::SymInt& proj_dim, std::string_view matmul) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const at::Tensor rows = input.reshape_symint({leading_rows(input), input.sym_size(-1)});
    const bool adds_to_matrix = !has_tensor(bias) || input.dim() == 2 || input.is_contiguous_or_false();
    auto [output, compressed, indices, used_seed] =
        ops::randomized_linear_forward(rows, weight, adds_to_matrix ? bias : std::nullopt, seed, proj_dim, matmul);
    const bool has_indices = picks_rows(parse_matmul(op_name, matmul));
    // The seed also comes from the op, so that it always matches `compressed`, whatever a checkpoint or a compiler
    // recomputes or saves.
    ctx->save_for_backward(
        {compressed, has_indices ? indices : at::Tensor(), used_seed, input.requires_grad() ? weight : at::Tensor()});
    ctx->saved_data["matmul"] = std::string(matmul);
    ctx->saved_data["has_bias"] = has_tensor(bias);
    ctx->saved_data["adds_to_matrix"] = adds_to_matrix;
    ctx->saved_data["is_column_major"] = is_column_major(rows);
    const at::Tensor result = at::_unsafe_view_symint(output, with_last(input.sym_sizes(), weight.sym_size(0)));
    // Not in place: a selective checkpoint may save the op's output.
    return adds_to_matrix ? result : result.add(*bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& grad = grad_outputs[0];
    const at::Tensor grad_rows = grad.reshape_symint({leading_rows(grad), grad.sym_size(-1)});
    variable_list gradients(6);
    // Uses torch's ops, so that these two gradients are differentiable. The weight gradient is not, and raises.
    if (ctx->needs_input_grad(0)) {
      const at::Tensor& weight = saved[3];
      const at::Tensor grad_input =
          ctx->saved_data["is_column_major"].toBool() ? weight.t().mm(grad_rows.t()).t() : grad_rows.mm(weight);
      gradients[0] = grad_input.view_symint(with_last(grad.sym_sizes(), weight.sym_size(1)));
    }
    if (ctx->needs_input_grad(1)) {
      const OptionalTensor indices = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
      gradients[1] = ops::randomized_linear_weight_grad(
          grad_rows, saved[0], indices, saved[2], ctx->saved_data["matmul"].toStringRef());
    }
    // (needs_input_grad counts only the tensors that are present.)
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)) {
      const at::Tensor& summed = ctx->saved_data["adds_to_matrix"].toBool() ? grad_rows : grad;
      gradients[2] = at::sum_to(summed, c10::SymIntArrayRef{grad.sym_size(-1)});
    }
    return gradients;
  }
};

at::Tensor randomized_linear_autograd(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, std::string_view matmul,
    std::optional<int64_t> proj_dim, std::optional<double> proj_dim_ratio, std::optional<int64_t> proj_dim_min,
    std::optional<int64_t> proj_dim_max, const OptionalTensor& seed) {
  const ProjectionSize size{proj_dim, proj_dim_ratio, proj_dim_min, proj_dim_max};
  parse_matmul(op_name, matmul);
  check_projection_size(op_name, size);
  check_linear(op_name, input, weight, bias);
  check_seed(op_name, seed, "input", input);
  if (needs_grad(weight)) {
    const c10::SymInt rows = leading_rows(input);
    const c10::SymInt kept = projection_dim(size, rows);
    // Symbolic sizes are not tested, because that would specialize the graph to them: the op decides when it runs.
    const bool keeps_all = size.ratio == 1.0 || kept.sym_ge(rows).maybe_as_bool().value_or(false);
    if (!keeps_all) {
      check_no_tangent(op_name, "input", input);
      check_no_tangent(op_name, "weight", weight);
      check_no_tangent(op_name, "bias", bias);
      prepare_seeds(input.device());
      return RandomizedLinear::apply(input, weight, bias, seed, kept, matmul);
    }
  }
  // Nothing to compress: use torch's own op and gradients.
  return at::linear(input, weight, bias);
}

TORCH_LIBRARY_IMPL(lomem, Autograd, m) {
  m.impl("randomized_linear", &randomized_linear_autograd);
}

}  // namespace
}  // namespace lomem::detail
