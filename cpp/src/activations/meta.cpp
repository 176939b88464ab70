// Shapes of the activations' results, with symbolic sizes.
#include <ATen/ops/empty.h>
#include <lomem/core/packing.h>
#include <torch/library.h>

#include "../checks.h"
#include "fused.h"
#include "ops.h"

namespace lomem::detail {
namespace {

at::Tensor empty_codes(const at::Tensor& input, int64_t bits) {
  return at::empty_symint({packed_bytes(input.sym_numel(), static_cast<int>(bits))}, input.options().dtype(at::kByte));
}

std::tuple<at::Tensor, at::Tensor> step_activation_forward_meta(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels, bool /*fast*/) {
  constexpr const char* op = ops::step_activation_forward.name;
  check_float_tensor(op, "input", input);
  const Activation& activation = find_activation(op, function, parameters);
  check_step_arguments(op, activation, {bits, criterion, boundaries, levels});
  return {activation_value(activation, input, parameters), empty_codes(input, bits)};
}

std::tuple<at::Tensor, at::Tensor> hard_activation_forward_meta(
    const at::Tensor& input, std::string_view function, Doubles parameters) {
  constexpr const char* op = ops::hard_activation_forward.name;
  check_float_tensor(op, "input", input);
  return {activation_value(find_exact(op, function, parameters), input, parameters), empty_codes(input, 1)};
}

std::tuple<at::Tensor, at::Tensor> fused_activation_forward_meta(
    const at::Tensor& input, std::string_view function, Doubles boundaries, int64_t bits, bool /*fast*/) {
  check_fused_forward(input, boundaries, bits);
  visit_fused(function, [](auto /*known*/) {});
  const Activation& activation = find_activation(ops::fused_activation_forward.name, function, {});
  return {activation_value(activation, input, {}), empty_codes(input, bits)};
}

at::Tensor step_codes_meta(const at::Tensor& input, Doubles boundaries, int64_t bits) {
  check_encoding(ops::step_codes.name, input, boundaries, bits);
  return empty_codes(input, bits);
}

at::Tensor band_codes_meta(const at::Tensor& input, double low, double high) {
  check_band(ops::band_codes.name, input, low, high);
  return empty_codes(input, 1);
}

at::Tensor step_activation_backward_meta(
    const at::Tensor& grad_output, const at::Tensor& codes, Doubles levels, int64_t bits) {
  check_step_backward(grad_output, codes, levels, bits);
  return at::empty_symint(grad_output.sym_sizes(), grad_output.options());
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("step_activation_forward", &step_activation_forward_meta);
  m.impl("hard_activation_forward", &hard_activation_forward_meta);
  m.impl("fused_activation_forward", &fused_activation_forward_meta);
  m.impl("step_codes", &step_codes_meta);
  m.impl("band_codes", &band_codes_meta);
  m.impl("step_activation_backward", &step_activation_backward_meta);
}

}  // namespace
}  // namespace lomem::detail
