// Activation ops on CUDA: unpack tensors and launch the kernels on raw pointers.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include "../src/activations/fused.h"
#include "../src/checks.h"
#include "call.h"

namespace lomem::detail {
namespace {

/// The memory format that gives an output the strides torch's pointwise ops would: those of a dense input, except for
/// dimensions of size 1, whose stride is meaningless.
at::MemoryFormat output_format(const at::Tensor& input) {
  return input.is_contiguous()                                 ? at::MemoryFormat::Contiguous
         : input.is_contiguous(at::MemoryFormat::ChannelsLast) ? at::MemoryFormat::ChannelsLast
                                                               : at::MemoryFormat::Preserve;
}

template <class Function>
std::tuple<at::Tensor, at::Tensor> published_forward(const at::Tensor& input) {
  using Steps = typename Function::PublishedSteps;
  const CudaScope scope(input);
  at::Tensor output = at::empty_like(input, output_format(input));
  // Otherwise (sliced, expanded) the input is copied to the output's strides, so that both are in the same order.
  const at::Tensor dense = input.is_non_overlapping_and_dense() ? input : at::empty_like(output).copy_(input);
  const int64_t n = input.numel();
  at::Tensor codes = at::empty({packed_bytes(n, Steps::bits)}, input.options().dtype(at::kByte));
  const cudaError_t error = cuda::step_forward<Function>(
      to_dtype(input.scalar_type()), dense.const_data_ptr(), n, output.mutable_data_ptr(),
      codes.mutable_data_ptr<uint8_t>(), current_stream(input));
  check_launch(ops::fused_activation_forward.name, input, error);
  return {output, codes};
}

at::Tensor value(Type<GELU> /*function*/, const at::Tensor& input) {
  return at::gelu(input, "none");
}
at::Tensor value(Type<GELUTanh> /*function*/, const at::Tensor& input) {
  return at::gelu(input, "tanh");
}
at::Tensor value(Type<SiLU> /*function*/, const at::Tensor& input) {
  return at::silu(input);
}

std::tuple<at::Tensor, at::Tensor> fused_activation_forward_cuda(
    const at::Tensor& input, std::string_view function, at::ArrayRef<double> boundaries, int64_t bits, bool /*fast*/) {
  check_fused_forward(input, boundaries, bits);
  return visit_fused(function, [&](auto type) -> std::tuple<at::Tensor, at::Tensor> {
    using Function = typename decltype(type)::type;
    if (are_published_boundaries<Function>(boundaries, bits)) {
      return published_forward<Function>(input);
    }
    const at::Tensor output = value(type, input);
    const at::Tensor dense = input.strides() == output.strides() ? input : at::empty_like(output).copy_(input);
    return {output, ops::step_codes(dense.as_strided({dense.numel()}, {1}), boundaries, bits)};
  });
}

at::Tensor step_codes_cuda(const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits) {
  check_encoding(ops::step_codes.name, input, boundaries, bits);
  const CudaScope scope(input);
  const std::vector<double> filled = filled_boundaries(boundaries, bits);
  const int width = static_cast<int>(bits);
  const at::Tensor source = input.contiguous();
  at::Tensor codes = at::empty({packed_bytes(source.numel(), width)}, input.options().dtype(at::kByte));
  const cudaError_t error = cuda::step_encode(
      to_dtype(source.scalar_type()), source.const_data_ptr(), source.numel(), filled.data(), width,
      codes.mutable_data_ptr<uint8_t>(), current_stream(source));
  check_launch(ops::step_codes.name, source, error);
  return codes;
}

at::Tensor band_codes_cuda(const at::Tensor& input, double low, double high) {
  check_band(ops::band_codes.name, input, low, high);
  const CudaScope scope(input);
  const at::Tensor source = input.contiguous();
  at::Tensor codes = at::empty({packed_bytes(source.numel(), 1)}, input.options().dtype(at::kByte));
  const cudaError_t error = cuda::band_encode(
      to_dtype(source.scalar_type()), source.const_data_ptr(), source.numel(), low, high,
      codes.mutable_data_ptr<uint8_t>(), current_stream(source));
  check_launch(ops::band_codes.name, source, error);
  return codes;
}

at::Tensor step_activation_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits) {
  check_step_backward(ops::step_activation_backward.name, grad_output, codes, levels, bits);
  const CudaScope scope(grad_output);
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor packed = codes.contiguous();
  at::Tensor grad_input = at::empty_like(grad);
  const cudaError_t error = cuda::step_backward(
      to_dtype(grad.scalar_type()), grad.const_data_ptr(), packed.const_data_ptr<uint8_t>(), levels.data(),
      static_cast<int>(bits), grad.numel(), grad_input.mutable_data_ptr(), current_stream(grad));
  check_launch(ops::step_activation_backward.name, grad, error);
  return grad_input;
}

TORCH_LIBRARY_IMPL(lomem, CUDA, m) {
  m.impl("fused_activation_forward", &fused_activation_forward_cuda);
  m.impl("step_codes", &step_codes_cuda);
  m.impl("band_codes", &band_codes_cuda);
  m.impl("step_activation_backward", &step_activation_backward_cuda);
}

}  // namespace
}  // namespace lomem::detail
