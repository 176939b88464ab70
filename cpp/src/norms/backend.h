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

#include "../checks.h"
#include "ops.h"

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

/// The kernels of the norms on a backend, for implement_norms.
template <class Backend>
struct NormKernels {
  template <class Op>
  static at::Tensor value(const NormArguments& args) {
    return std::get<0>(compute<Op::norm>(Op::op.name, args));
  }

  template <class Op>
  static NormResults forward(const NormArguments& args) {
    NormResults results = compute<Op::norm>(Op::forward_op.name, args);
    Backend::check_recoverable(Op::op.name, args.weight, std::get<0>(results));
    return results;
  }

  template <class Op>
  static NormGradients backward(const NormBackwardArguments& args) {
    constexpr const char* op = Op::backward_op.name;
    const NormSizes sizes = check_norm_backward(
        op, args.grad_output, args.output, args.rstd, args.normalized_shape, args.weight, args.bias, args.input_dtype);

    const typename Backend::Scope scope(args.output);
    const at::Tensor grad = args.grad_output.contiguous();
    const at::Tensor z = args.output.contiguous();
    const at::Tensor rstd = args.rstd.contiguous();
    const OptionalTensor gamma = contiguous(args.weight);
    const OptionalTensor beta = contiguous(args.bias);
    at::Tensor grad_input;
    at::Tensor grad_weight;
    at::Tensor grad_bias;
    if (args.output_mask[0]) {
      grad_input = at::empty(z.sizes(), z.options().dtype(args.input_dtype));
    }
    if (args.output_mask[1] && has_tensor(gamma)) {
      grad_weight = at::empty_like(*gamma);
    }
    if (args.output_mask[2] && has_tensor(beta)) {
      grad_bias = at::empty_like(*beta);
    }
    const NormBackward arrays{array(grad),
                              array(z),
                              array(rstd),
                              array(gamma),
                              array(beta),
                              mutable_array(grad_input),
                              sizes.cols.expect_int()};
    Backend::template backward<Op::norm>(
        op, arrays, sizes.rows.expect_int(), mutable_array(grad_weight), mutable_array(grad_bias), z);
    return {grad_input, grad_weight, grad_bias};
  }

 private:
  template <Norm norm>
  static NormResults compute(const char* op, const NormArguments& args) {
    const NormSizes sizes =
        check_norm_forward(op, args.input, args.normalized_shape, args.weight, args.bias, args.eps, args.dtype);

    const typename Backend::Scope scope(args.input);
    const at::Tensor x = args.input.contiguous();
    const OptionalTensor gamma = contiguous(args.weight);
    const OptionalTensor beta = contiguous(args.bias);
    at::Tensor output = at::empty(x.sizes(), x.options().dtype(args.dtype.value_or(x.scalar_type())));
    at::Tensor rstd = at::empty(C10_AS_INTARRAYREF_SLOW(sizes.rstd), x.options().dtype(rstd_dtype(x.scalar_type())));
    const NormForward arrays{
        array(x),
        array(gamma),
        array(beta),
        mutable_array(output),
        mutable_array(rstd),
        sizes.cols.expect_int(),
        args.eps.value_or(default_rms_norm_eps(x.scalar_type()))};
    Backend::template forward<norm>(op, arrays, sizes.rows.expect_int(), x);
    return {output, rstd};
  }
};

}  // namespace lomem::detail
