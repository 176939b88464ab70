// Step activations on CUDA: tensors in, kernels on pointers out.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../src/checks.h"
#include "../src/step_ops.h"
#include "call.h"

namespace lomem::detail {
namespace {

/// The strides that torch's pointwise ops give their output: those of a dense input, but for
/// dimensions of size 1, whose stride says nothing.
at::MemoryFormat output_format(const at::Tensor& input) {
  return input.is_contiguous()                                 ? at::MemoryFormat::Contiguous
         : input.is_contiguous(at::MemoryFormat::ChannelsLast) ? at::MemoryFormat::ChannelsLast
                                                               : at::MemoryFormat::Preserve;
}

template <class Function, class Op>
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& input) {
  using Step = typename Op::Step;
  const CudaScope scope(input);
  at::Tensor output = at::empty_like(input, output_format(input));
  // Else (sliced, expanded) the input is copied to the output's strides, so that one order serves
  // both.
  const at::Tensor dense = input.is_non_overlapping_and_dense() ? input : at::empty_like(output).copy_(input);
  const int64_t n = input.numel();
  at::Tensor codes = at::empty({packed_bytes(n, Step::bits)}, input.options().dtype(at::kByte));
  const cudaError_t error = cuda::step_forward<Function, Step>(
      to_dtype(input.scalar_type()), dense.const_data_ptr(), n, output.mutable_data_ptr(),
      codes.mutable_data_ptr<uint8_t>(), current_stream(input));
  check_launch(Op::forward_name, input, error);
  return {output, codes};
}

std::tuple<at::Tensor, at::Tensor> regelu2_forward_cuda(
    const at::Tensor& input, std::string_view approximate, bool fast) {
  check_float_tensor(ReGELU2Op::forward_name, "input", input);
  ReGELU2Op::check(ReGELU2Op::forward_name, approximate, fast);
  return approximate == "tanh" ? forward<GELUTanh, ReGELU2Op>(input) : forward<GELU, ReGELU2Op>(input);
}

std::tuple<at::Tensor, at::Tensor> resilu2_forward_cuda(const at::Tensor& input, bool /*fast*/) {
  check_float_tensor(ReSiLU2Op::forward_name, "input", input);
  return forward<SiLU, ReSiLU2Op>(input);
}

at::Tensor step_codes_cuda(const at::Tensor& input, at::ArrayRef<double> boundaries, int64_t bits) {
  check_step_codes(input, boundaries, bits);
  const CudaScope scope(input);
  const std::vector<double> filled = filled_boundaries(boundaries, bits);
  const int width = static_cast<int>(bits);
  const at::Tensor source = input.contiguous();
  at::Tensor codes = at::empty({packed_bytes(source.numel(), width)}, input.options().dtype(at::kByte));
  const cudaError_t error = cuda::step_encode(
      to_dtype(source.scalar_type()), source.const_data_ptr(), source.numel(), filled.data(), width,
      codes.mutable_data_ptr<uint8_t>(), current_stream(source));
  check_launch("lomem::step_codes", source, error);
  return codes;
}

at::Tensor band_codes_cuda(const at::Tensor& input, double low, double high) {
  check_band_codes(input, low, high);
  const CudaScope scope(input);
  const at::Tensor source = input.contiguous();
  at::Tensor codes = at::empty({packed_bytes(source.numel(), 1)}, input.options().dtype(at::kByte));
  const cudaError_t error = cuda::band_encode(
      to_dtype(source.scalar_type()), source.const_data_ptr(), source.numel(), low, high,
      codes.mutable_data_ptr<uint8_t>(), current_stream(source));
  check_launch("lomem::band_codes", source, error);
  return codes;
}

at::Tensor step_activation_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits) {
  check_step_backward(grad_output, codes, levels, bits);
  const CudaScope scope(grad_output);
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor packed = codes.contiguous();
  at::Tensor grad_input = at::empty_like(grad);
  const cudaError_t error = cuda::step_backward(
      to_dtype(grad.scalar_type()), grad.const_data_ptr(), packed.const_data_ptr<uint8_t>(), levels.data(),
      static_cast<int>(bits), grad.numel(), grad_input.mutable_data_ptr(), current_stream(grad));
  check_launch("lomem::step_activation_backward", grad, error);
  return grad_input;
}

TORCH_LIBRARY_IMPL(lomem, CUDA, m) {
  m.impl("regelu2_forward", &regelu2_forward_cuda);
  m.impl("resilu2_forward", &resilu2_forward_cuda);
  m.impl("step_codes", &step_codes_cuda);
  m.impl("band_codes", &band_codes_cuda);
  m.impl("step_activation_backward", &step_activation_backward_cuda);
}

}  // namespace
}  // namespace lomem::detail
