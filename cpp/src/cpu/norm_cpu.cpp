// Norms on the CPU.
#include <ATen/TensorIndexing.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <lomem/kernels.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../dispatch.h"
#include "parallel.h"

namespace lomem::detail {
namespace {

cpu::Array array(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), to_dtype(tensor.scalar_type())};
}

cpu::Array array(const OptionalTensor& tensor) {
  return has_tensor(tensor) ? array(*tensor) : cpu::Array{};
}

cpu::MutableArray mutable_array(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), to_dtype(tensor.scalar_type())};
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return has_tensor(tensor) ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

int64_t rows_per_thread(int64_t cols) {
  return std::max<int64_t>(1, elements_per_thread / std::max<int64_t>(1, cols));
}

template <Norm norm>
std::tuple<at::Tensor, at::Tensor> norm_forward_cpu(
    const char* op, const at::Tensor& input, at::IntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, std::optional<double> eps, OptionalDtype dtype) {
  const auto shape = c10::fromIntArrayRefSlow(normalized_shape);
  const NormSizes sizes = check_norm_forward(op, input, shape, weight, bias, eps, dtype);
  const int64_t rows = sizes.rows.expect_int();
  const int64_t cols = sizes.cols.expect_int();

  const at::Tensor x = input.contiguous();
  const OptionalTensor gamma = contiguous(weight);
  const OptionalTensor beta = contiguous(bias);
  at::Tensor output = at::empty(x.sizes(), x.options().dtype(dtype.value_or(x.scalar_type())));
  at::Tensor rstd = at::empty(C10_AS_INTARRAYREF_SLOW(sizes.rstd), x.options().dtype(rstd_dtype(x.scalar_type())));

  const cpu::NormForward args{
      array(x),
      array(gamma),
      array(beta),
      mutable_array(output),
      mutable_array(rstd),
      cols,
      eps.value_or(default_rms_norm_eps(x.scalar_type()))};
  at::parallel_for(
      0, rows, rows_per_thread(cols), [&](int64_t begin, int64_t end) { cpu::norm_forward<norm>(args, begin, end); });
  return {output, rstd};
}

/// The backward pass recovers the normalised input by dividing the saved output by weight. Where
/// weight is 0, or so small that the output is mostly subnormal, that is refused: a clamped weight
/// would give wrong gradients.
void check_recoverable(const char* op, const OptionalTensor& weight, const at::Tensor& output) {
  if (!has_tensor(weight)) {
    return;
  }
  const at::Tensor gamma = weight->contiguous();
  const double smallest = smallest_normal(to_dtype(output.scalar_type()));
  const int64_t index = cpu::find_below(array(gamma), gamma.numel(), smallest);
  if (index >= 0) {
    TORCH_CHECK_VALUE(
        false, op, ": weight is ", gamma.flatten()[index].item<double>(), " at element ", index,
        ", expected magnitudes of at least ", smallest,
        ", the smallest normal number of the output's dtype: the "
        "backward pass divides by weight (use torch's norm for this layer)");
  }
}

template <Norm norm>
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward_cpu(
    const char* op, const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
    at::IntArrayRef normalized_shape, const OptionalTensor& weight, const OptionalTensor& bias,
    at::ScalarType input_dtype, std::array<bool, 3> output_mask) {
  const auto shape = c10::fromIntArrayRefSlow(normalized_shape);
  const NormSizes sizes = check_norm_backward(op, grad_output, output, rstd, shape, weight, bias, input_dtype);
  const int64_t rows = sizes.rows.expect_int();
  const int64_t cols = sizes.cols.expect_int();

  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor z = output.contiguous();
  const at::Tensor row_rstd = rstd.contiguous();
  const OptionalTensor gamma = contiguous(weight);
  const OptionalTensor beta = contiguous(bias);
  cpu::NormBackward args{array(grad), array(z), array(row_rstd), array(gamma), array(beta), {}, cols};
  at::Tensor grad_input;
  if (output_mask[0]) {
    grad_input = at::empty(z.sizes(), z.options().dtype(input_dtype));
    args.grad_input = mutable_array(grad_input);
  }

  const bool needs_weight = output_mask[1] && has_tensor(gamma);
  const bool needs_bias = output_mask[2] && has_tensor(beta);
  if (!needs_weight && !needs_bias) {
    at::parallel_for(0, rows, rows_per_thread(cols), [&](int64_t begin, int64_t end) {
      cpu::norm_backward<norm>(args, begin, end, nullptr, nullptr);
    });
    return {grad_input, at::Tensor(), at::Tensor()};
  }

  // Blocks of rows, whose number does not depend on the number of threads, sum into buffers of
  // their own; a second pass adds the blocks in order.
  constexpr int64_t max_blocks = 64;
  constexpr int64_t max_buffer_elements = int64_t{1} << 22;
  const int64_t blocks =
      std::max<int64_t>(1, std::min({max_blocks, rows, max_buffer_elements / std::max<int64_t>(1, cols)}));
  const auto buffer_options = z.options().dtype(at::kDouble);
  const at::Tensor weight_sums = needs_weight ? at::zeros({blocks, cols}, buffer_options) : at::Tensor();
  const at::Tensor bias_sums = needs_bias ? at::zeros({blocks, cols}, buffer_options) : at::Tensor();
  double* weight_sum = needs_weight ? weight_sums.mutable_data_ptr<double>() : nullptr;
  double* bias_sum = needs_bias ? bias_sums.mutable_data_ptr<double>() : nullptr;
  const int64_t blocks_per_thread = std::max<int64_t>(1, blocks * rows_per_thread(cols) / std::max<int64_t>(1, rows));
  at::parallel_for(0, blocks, blocks_per_thread, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      cpu::norm_backward<norm>(
          args, block * rows / blocks, (block + 1) * rows / blocks, needs_weight ? weight_sum + block * cols : nullptr,
          needs_bias ? bias_sum + block * cols : nullptr);
    }
  });

  const auto reduce = [&](double* sums, const at::Tensor& like) {
    at::Tensor result = at::empty_like(like);
    const cpu::MutableArray target = mutable_array(result);
    parallel_over_elements(cols, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = 1; block < blocks; ++block) {
        for (int64_t col = begin; col < end; ++col) {
          sums[col] += sums[block * cols + col];
        }
      }
      cpu::store(sums + begin, end - begin, target, begin);
    });
    return result;
  };
  return {
      grad_input, needs_weight ? reduce(weight_sum, *gamma) : at::Tensor(),
      needs_bias ? reduce(bias_sum, *beta) : at::Tensor()};
}

at::Tensor ms_layer_norm_cpu(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const OptionalTensor& weight, const OptionalTensor& bias,
    double eps, OptionalDtype dtype) {
  return std::get<0>(
      norm_forward_cpu<Norm::layer>("lomem::ms_layer_norm", input, normalized_shape, weight, bias, eps, dtype));
}

std::tuple<at::Tensor, at::Tensor> ms_layer_norm_forward_cpu(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const OptionalTensor& weight, const OptionalTensor& bias,
    double eps, OptionalDtype dtype) {
  auto result =
      norm_forward_cpu<Norm::layer>("lomem::ms_layer_norm_forward", input, normalized_shape, weight, bias, eps, dtype);
  check_recoverable("lomem::ms_layer_norm", weight, std::get<0>(result));
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_layer_norm_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd, at::IntArrayRef normalized_shape,
    const OptionalTensor& weight, const OptionalTensor& bias, at::ScalarType input_dtype,
    std::array<bool, 3> output_mask) {
  return norm_backward_cpu<Norm::layer>(
      "lomem::ms_layer_norm_backward", grad_output, output, rstd, normalized_shape, weight, bias, input_dtype,
      output_mask);
}

at::Tensor ms_rms_norm_cpu(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const OptionalTensor& weight, std::optional<double> eps,
    OptionalDtype dtype) {
  return std::get<0>(
      norm_forward_cpu<Norm::rms>("lomem::ms_rms_norm", input, normalized_shape, weight, std::nullopt, eps, dtype));
}

std::tuple<at::Tensor, at::Tensor> ms_rms_norm_forward_cpu(
    const at::Tensor& input, at::IntArrayRef normalized_shape, const OptionalTensor& weight, std::optional<double> eps,
    OptionalDtype dtype) {
  auto result = norm_forward_cpu<Norm::rms>(
      "lomem::ms_rms_norm_forward", input, normalized_shape, weight, std::nullopt, eps, dtype);
  check_recoverable("lomem::ms_rms_norm", weight, std::get<0>(result));
  return result;
}

std::tuple<at::Tensor, at::Tensor> ms_rms_norm_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd, at::IntArrayRef normalized_shape,
    const OptionalTensor& weight, at::ScalarType input_dtype, std::array<bool, 2> output_mask) {
  auto [grad_input, grad_weight, grad_bias] = norm_backward_cpu<Norm::rms>(
      "lomem::ms_rms_norm_backward", grad_output, output, rstd, normalized_shape, weight, std::nullopt, input_dtype,
      {output_mask[0], output_mask[1], false});
  return {grad_input, grad_weight};
}

TORCH_LIBRARY_IMPL(lomem, CPU, m) {
  m.impl("ms_layer_norm", &ms_layer_norm_cpu);
  m.impl("ms_layer_norm_forward", &ms_layer_norm_forward_cpu);
  m.impl("ms_layer_norm_backward", &ms_layer_norm_backward_cpu);
  m.impl("ms_rms_norm", &ms_rms_norm_cpu);
  m.impl("ms_rms_norm_forward", &ms_rms_norm_forward_cpu);
  m.impl("ms_rms_norm_backward", &ms_rms_norm_backward_cpu);
}

}  // namespace
}  // namespace lomem::detail
