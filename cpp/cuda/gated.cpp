// Gated units on CUDA: unpack tensors and launch the kernels on raw pointers.
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include "../src/checks.h"
#include "../src/gated/halves.h"
#include "../src/gated/rows.h"
#include "../src/op.h"
#include "call.h"

namespace lomem::detail {
namespace {

/// The operands as a kernel reads them. Both tensors consist of rows; one tensor holds both if `up` is undefined.
GatedOperands gated_operands(const at::Tensor& gate, const at::Tensor& up, GatedKind kind) {
  const bool fused = !up.defined();
  const auto size = static_cast<int64_t>(gate.element_size());
  GatedOperands operands;
  operands.activation = kind.activation;
  operands.dtype = to_dtype(gate.scalar_type());
  operands.interleaved = fused && kind.layout == GatedLayout::interleaved;
  operands.gate = gate.const_data_ptr();
  operands.gate_stride = *row_stride(gate);
  if (fused) {
    const auto* data = static_cast<const char*>(operands.gate);
    operands.up = data + gate.size(-1) / 2 * size;
    operands.up_stride = operands.gate_stride;
    if (kind.layout == GatedLayout::up_gate) {
      std::swap(operands.gate, operands.up);
    }
  } else {
    operands.up = up.const_data_ptr();
    operands.up_stride = *row_stride(up);
  }
  // Contiguous tensors are one row; so are pairs.
  const bool one_row = gate.is_contiguous() && (fused ? operands.interleaved : up.is_contiguous());
  const int64_t n = fused ? gate.numel() / 2 : gate.numel();
  operands.cols = one_row || n == 0 ? n : fused ? gate.size(-1) / 2 : gate.size(-1);
  operands.rows = n == 0 ? 0 : n / operands.cols;
  return operands;
}

at::Tensor undefined_or(const OptionalTensor& tensor) {
  return has_tensor(tensor) ? *tensor : at::Tensor();
}

at::Tensor gate_value_cuda(GatedActivation activation, const at::Tensor& gate) {
  switch (activation) {
    case GatedActivation::silu: return at::silu(gate);
    case GatedActivation::gelu: return at::gelu(gate);
    case GatedActivation::gelu_tanh: return at::gelu(gate, "tanh");
    case GatedActivation::relu: return at::relu(gate);
    default: return at::sigmoid(gate);
  }
}

at::Tensor gated_cuda(
    const at::Tensor& gate, const OptionalTensor& up, std::string_view activation, std::string_view layout) {
  const GatedKind kind = check_gated(ops::gated.name, gate, up, activation, layout);
  if (!row_stride(gate) || (has_tensor(up) && !row_stride(*up))) {
    // Of which the product has strides that torch chooses.
    const GatedHalves operands = operands_of(gate, up, kind.layout);
    return at::mul(gate_value_cuda(kind.activation, operands.gate), operands.up);
  }
  const CudaScope scope(gate);
  at::Tensor output = at::empty_symint(gated_sizes(gate, up), gate.options());
  const cudaError_t error = cuda::gated_forward(
      gated_operands(gate, undefined_or(up), kind), output.mutable_data_ptr(), current_stream(gate));
  check_launch(ops::gated.name, gate, error);
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gated_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& gate, const OptionalTensor& up, std::string_view activation,
    std::string_view layout, std::array<bool, 3> output_mask) {
  constexpr const char* op = ops::gated_backward.name;
  const GatedKind kind = check_gated_backward(op, grad_output, gate, up, activation, layout);
  const CudaScope scope(gate);
  const bool fused = !has_tensor(up);
  const auto result = [&](bool wanted, const at::Tensor& like) {
    return wanted ? at::empty(like.sizes(), gate.options()) : at::Tensor();
  };
  at::Tensor grad_gate = result(output_mask[0], gate);
  at::Tensor grad_up = result(output_mask[1] && !fused, gate);
  at::Tensor output = result(output_mask[2], grad_output);

  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor gate_rows = with_rows(gate);
  const at::Tensor up_rows = fused ? at::Tensor() : with_rows(*up);
  const GatedOperands operands = gated_operands(gate_rows, up_rows, kind);
  const auto data = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; };
  GatedGradients gradients{data(grad_gate), data(grad_up), operands.cols, data(output)};
  if (fused) {
    gradients.stride = 2 * operands.cols;
    if (!operands.interleaved && gradients.gate != nullptr) {
      gradients.up = static_cast<char*>(gradients.gate) + operands.cols * gate.element_size();
      if (kind.layout == GatedLayout::up_gate) {
        std::swap(gradients.gate, gradients.up);
      }
    }
  }
  if (grad_gate.defined() || grad_up.defined() || output.defined()) {
    const cudaError_t error = cuda::gated_backward(operands, grad.const_data_ptr(), gradients, current_stream(gate));
    check_launch(op, gate, error);
  }
  return {grad_gate, grad_up, output};
}

TORCH_LIBRARY_IMPL(lomem, CUDA, m) {
  m.impl("gated", &gated_cuda);
  m.impl("gated_backward", &gated_backward_cuda);
}

}  // namespace
}  // namespace lomem::detail
