// The norm ops of a backend. Arguments are checked and tensors allocated here; the backend only computes.
//
//     struct Backend {
//       /// Alive while tensors on the device of `like` are allocated and kernels launched.
//       struct Scope { explicit Scope(const at::Tensor& like); };
//       /// Raises if the backward pass could not recover its input from `output`.
//       static void check_recoverable(const char* op, const OptionalTensor& weight, const at::Tensor& output);
//       template <Norm> static void forward(const char* op, const NormForward&, int64_t rows, const at::Tensor& like);
//       /// grad_weight and grad_bias have no data if they are not needed.
//       template <Norm> static void backward(
//           const char* op, const NormBackward&, int64_t rows, const MutableArray& grad_weight,
//           const MutableArray& grad_bias, const at::Tensor& like);
//     };
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <lomem/core/norm.h>
#include <torch/library.h>

#include "../checks.h"
#include "../op.h"

namespace lomem::detail {

inline Array array(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), to_dtype(tensor.scalar_type())};
}

inline Array array(const OptionalTensor& tensor) {
  return has_tensor(tensor) ? array(*tensor) : Array{};
}

inline MutableArray mutable_array(const at::Tensor& tensor) {
  return tensor.defined() ? MutableArray{tensor.mutable_data_ptr(), to_dtype(tensor.scalar_type())} : MutableArray{};
}

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return has_tensor(tensor) ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

template <class Backend>
struct NormOps {
  template <Norm norm>
  static std::tuple<at::Tensor, at::Tensor> forward(
      const char* op, const at::Tensor& input, at::IntArrayRef normalized_shape, const OptionalTensor& weight,
      const OptionalTensor& bias, std::optional<double> eps, OptionalDtype dtype) {
    const auto shape = c10::fromIntArrayRefSlow(normalized_shape);
    const NormSizes sizes = check_norm_forward(op, input, shape, weight, bias, eps, dtype);

    const typename Backend::Scope scope(input);
    const at::Tensor x = input.contiguous();
    const OptionalTensor gamma = contiguous(weight);
    const OptionalTensor beta = contiguous(bias);
    at::Tensor output = at::empty(x.sizes(), x.options().dtype(dtype.value_or(x.scalar_type())));
    at::Tensor rstd = at::empty(C10_AS_INTARRAYREF_SLOW(sizes.rstd), x.options().dtype(rstd_dtype(x.scalar_type())));
    const NormForward args{
        array(x),
        array(gamma),
        array(beta),
        mutable_array(output),
        mutable_array(rstd),
        sizes.cols.expect_int(),
        eps.value_or(default_rms_norm_eps(x.scalar_type()))};
    Backend::template forward<norm>(op, args, sizes.rows.expect_int(), x);
    return {output, rstd};
  }

  template <Norm norm>
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
      const char* op, const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd,
      at::IntArrayRef normalized_shape, const OptionalTensor& weight, const OptionalTensor& bias,
      at::ScalarType input_dtype, std::array<bool, 3> output_mask) {
    const auto shape = c10::fromIntArrayRefSlow(normalized_shape);
    const NormSizes sizes = check_norm_backward(op, grad_output, output, rstd, shape, weight, bias, input_dtype);

    const typename Backend::Scope scope(output);
    const at::Tensor grad = grad_output.contiguous();
    const at::Tensor z = output.contiguous();
    const at::Tensor row_rstd = rstd.contiguous();
    const OptionalTensor gamma = contiguous(weight);
    const OptionalTensor beta = contiguous(bias);
    at::Tensor grad_input;
    at::Tensor grad_weight;
    at::Tensor grad_bias;
    if (output_mask[0]) {
      grad_input = at::empty(z.sizes(), z.options().dtype(input_dtype));
    }
    if (output_mask[1] && has_tensor(gamma)) {
      grad_weight = at::empty_like(*gamma);
    }
    if (output_mask[2] && has_tensor(beta)) {
      grad_bias = at::empty_like(*beta);
    }
    const NormBackward args{array(grad),
                            array(z),
                            array(row_rstd),
                            array(gamma),
                            array(beta),
                            mutable_array(grad_input),
                            sizes.cols.expect_int()};
    Backend::template backward<norm>(
        op, args, sizes.rows.expect_int(), mutable_array(grad_weight), mutable_array(grad_bias), z);
    return {grad_input, grad_weight, grad_bias};
  }

  static at::Tensor ms_layer_norm(
      const at::Tensor& input, at::IntArrayRef normalized_shape, const OptionalTensor& weight,
      const OptionalTensor& bias, double eps, OptionalDtype dtype) {
    return std::get<0>(forward<Norm::layer>("lomem::ms_layer_norm", input, normalized_shape, weight, bias, eps, dtype));
  }

  static std::tuple<at::Tensor, at::Tensor> ms_layer_norm_forward(
      const at::Tensor& input, at::IntArrayRef normalized_shape, const OptionalTensor& weight,
      const OptionalTensor& bias, double eps, OptionalDtype dtype) {
    auto result =
        forward<Norm::layer>("lomem::ms_layer_norm_forward", input, normalized_shape, weight, bias, eps, dtype);
    Backend::check_recoverable("lomem::ms_layer_norm", weight, std::get<0>(result));
    return result;
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_layer_norm_backward(
      const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd, at::IntArrayRef normalized_shape,
      const OptionalTensor& weight, const OptionalTensor& bias, at::ScalarType input_dtype,
      std::array<bool, 3> output_mask) {
    return backward<Norm::layer>(
        "lomem::ms_layer_norm_backward", grad_output, output, rstd, normalized_shape, weight, bias, input_dtype,
        output_mask);
  }

  static at::Tensor ms_rms_norm(
      const at::Tensor& input, at::IntArrayRef normalized_shape, const OptionalTensor& weight,
      std::optional<double> eps, OptionalDtype dtype) {
    return std::get<0>(
        forward<Norm::rms>("lomem::ms_rms_norm", input, normalized_shape, weight, std::nullopt, eps, dtype));
  }

  static std::tuple<at::Tensor, at::Tensor> ms_rms_norm_forward(
      const at::Tensor& input, at::IntArrayRef normalized_shape, const OptionalTensor& weight,
      std::optional<double> eps, OptionalDtype dtype) {
    auto result =
        forward<Norm::rms>("lomem::ms_rms_norm_forward", input, normalized_shape, weight, std::nullopt, eps, dtype);
    Backend::check_recoverable("lomem::ms_rms_norm", weight, std::get<0>(result));
    return result;
  }

  static std::tuple<at::Tensor, at::Tensor> ms_rms_norm_backward(
      const at::Tensor& grad_output, const at::Tensor& output, const at::Tensor& rstd, at::IntArrayRef normalized_shape,
      const OptionalTensor& weight, at::ScalarType input_dtype, std::array<bool, 2> output_mask) {
    auto [grad_input, grad_weight, grad_bias] = backward<Norm::rms>(
        "lomem::ms_rms_norm_backward", grad_output, output, rstd, normalized_shape, weight, std::nullopt, input_dtype,
        {output_mask[0], output_mask[1], false});
    return {grad_input, grad_weight};
  }

  static void implement(torch::Library& m) {
    m.impl("ms_layer_norm", &NormOps::ms_layer_norm);
    m.impl("ms_layer_norm_forward", &NormOps::ms_layer_norm_forward);
    m.impl("ms_layer_norm_backward", &NormOps::ms_layer_norm_backward);
    m.impl("ms_rms_norm", &NormOps::ms_rms_norm);
    m.impl("ms_rms_norm_forward", &NormOps::ms_rms_norm_forward);
    m.impl("ms_rms_norm_backward", &NormOps::ms_rms_norm_backward);
  }
};

}  // namespace lomem::detail
