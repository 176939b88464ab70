// Codes drawn at random on CUDA, and gradients from them.
#include "../src/activations/drawn.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../src/checks.h"
#include "../src/op.h"
#include "call.h"

namespace lomem::detail {
namespace {

at::Tensor drawn_codes_cuda(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> parameters, int64_t bits,
    const at::Tensor& seed, int64_t offset) {
  constexpr const char* op = ops::drawn_codes.name;
  check_drawing(op, input, bits, seed, offset);
  const DrawnTable table = drawn_table(op, function, parameters);
  const CudaScope scope(input);
  const at::Tensor source = input.contiguous();
  const int width = static_cast<int>(bits);
  at::Tensor codes = at::empty({packed_bytes(source.numel(), width)}, input.options().dtype(at::kByte));
  const cudaError_t error = cuda::drawn_encode(
      to_dtype(source.scalar_type()), table, source.const_data_ptr(), source.numel(), width,
      seed.const_data_ptr<int64_t>(), static_cast<uint64_t>(offset), codes.mutable_data_ptr<uint8_t>(),
      current_stream(source));
  check_launch(op, source, error);
  return codes;
}

at::Tensor drawn_activation_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& seed, double low, double step,
    int64_t bits, int64_t offset) {
  constexpr const char* op = ops::drawn_activation_backward.name;
  check_drawn_backward(op, grad_output, codes, seed, bits, offset);
  const CudaScope scope(grad_output);
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor packed = codes.contiguous();
  at::Tensor grad_input = at::empty_like(grad);
  const cudaError_t error = cuda::drawn_backward(
      to_dtype(grad.scalar_type()), grad.const_data_ptr(), packed.const_data_ptr<uint8_t>(), {low, step},
      static_cast<int>(bits), grad.numel(), seed.const_data_ptr<int64_t>(), static_cast<uint64_t>(offset),
      grad_input.mutable_data_ptr(), current_stream(grad));
  check_launch(op, grad, error);
  return grad_input;
}

TORCH_LIBRARY_IMPL(lomem, CUDA, m) {
  m.impl("drawn_codes", &drawn_codes_cuda);
  m.impl("drawn_activation_backward", &drawn_activation_backward_cuda);
}

}  // namespace
}  // namespace lomem::detail
