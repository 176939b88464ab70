// What the activations are apart from their backends: ops composed of other ops, and the shapes of results with
// symbolic sizes.
#include "ops.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <lomem/core/packing.h>
#include <lomem/ops/activations.h>
#include <torch/library.h>

#include <memory>

#include "../checks.h"
#include "fused.h"

namespace lomem::detail {

at::Tensor activation_value(const Activation& activation, const at::Tensor& input, Doubles parameters) {
  // (Autocast would run some of them in float32.)
  const c10::impl::ExcludeDispatchKeyGuard keep_dtype(c10::autocast_dispatch_keyset);
  return activation.value(input, parameters);
}

at::Tensor in_memory_order(const at::Tensor& input, const at::Tensor& output) {
  const at::Tensor dense = input.strides() == output.strides() ? input : at::empty_like(output).copy_(input);
  return dense.as_strided({dense.numel()}, {1});
}

at::Tensor empty_codes_like(const at::Tensor& input, int64_t bits) {
  return at::empty_symint({packed_bytes(input.sym_numel(), static_cast<int>(bits))}, input.options().dtype(at::kByte));
}

namespace {

/// Without a gradient: the torch op itself, whether `fast` is set or not.
at::Tensor step_activation_value(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels, bool /*fast*/) {
  constexpr const char* op = ops::step_activation.name;
  check_float_tensor(op, "input", input);
  const Activation& activation = find_activation(op, function, parameters);
  check_step_arguments(op, activation, {bits, criterion, boundaries, levels});
  return activation_value(activation, input, parameters);
}

std::tuple<at::Tensor, at::Tensor> step_activation_forward_value(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels, bool fast) {
  constexpr const char* op = ops::step_activation_forward.name;
  check_float_tensor(op, "input", input);
  const Activation& activation = find_activation(op, function, parameters);
  const StepArguments arguments{bits, criterion, boundaries, levels};
  std::shared_ptr<const ResolvedSteps> resolved;
  if (boundaries) {
    check_step_arguments(op, activation, arguments);
  } else {
    resolved = resolve_steps(op, activation, parameters, arguments);
    boundaries = resolved->steps.boundaries;
  }
  if (activation.fused) {
    return ops::fused_activation_forward(input, function, *boundaries, bits, fast);
  }
  const at::Tensor output = activation_value(activation, input, parameters);
  return {output, ops::step_codes(in_memory_order(input, output), *boundaries, bits)};
}

at::Tensor hard_activation_value(const at::Tensor& input, std::string_view function, Doubles parameters) {
  constexpr const char* op = ops::hard_activation.name;
  check_float_tensor(op, "input", input);
  return activation_value(find_exact(op, function, parameters), input, parameters);
}

std::tuple<at::Tensor, at::Tensor> hard_activation_forward_value(
    const at::Tensor& input, std::string_view function, Doubles parameters) {
  constexpr const char* op = ops::hard_activation_forward.name;
  check_float_tensor(op, "input", input);
  const Activation& activation = find_exact(op, function, parameters);
  const at::Tensor output = activation_value(activation, input, parameters);
  const Band band = band_of(activation, parameters, input.scalar_type(), input.is_cuda());
  return {output, ops::band_codes(in_memory_order(input, output), band.low, band.high)};
}

// Shapes --------------------------------------------------------------------------------------------------------------

std::tuple<at::Tensor, at::Tensor> step_activation_forward_meta(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels, bool /*fast*/) {
  constexpr const char* op = ops::step_activation_forward.name;
  check_float_tensor(op, "input", input);
  const Activation& activation = find_activation(op, function, parameters);
  check_step_arguments(op, activation, {bits, criterion, boundaries, levels});
  return {activation_value(activation, input, parameters), empty_codes_like(input, bits)};
}

std::tuple<at::Tensor, at::Tensor> hard_activation_forward_meta(
    const at::Tensor& input, std::string_view function, Doubles parameters) {
  constexpr const char* op = ops::hard_activation_forward.name;
  check_float_tensor(op, "input", input);
  return {activation_value(find_exact(op, function, parameters), input, parameters), empty_codes_like(input, 1)};
}

std::tuple<at::Tensor, at::Tensor> fused_activation_forward_meta(
    const at::Tensor& input, std::string_view function, Doubles boundaries, int64_t bits, bool /*fast*/) {
  check_fused_forward(input, boundaries, bits);
  visit_fused(function, [](auto /*known*/) {});
  const Activation& activation = find_activation(ops::fused_activation_forward.name, function, {});
  return {activation_value(activation, input, {}), empty_codes_like(input, bits)};
}

at::Tensor step_codes_meta(const at::Tensor& input, Doubles boundaries, int64_t bits) {
  check_encoding(ops::step_codes.name, input, boundaries, bits);
  return empty_codes_like(input, bits);
}

at::Tensor band_codes_meta(const at::Tensor& input, double low, double high) {
  check_band(ops::band_codes.name, input, low, high);
  return empty_codes_like(input, 1);
}

at::Tensor step_activation_backward_meta(
    const at::Tensor& grad_output, const at::Tensor& codes, Doubles levels, int64_t bits) {
  check_step_backward(ops::step_activation_backward.name, grad_output, codes, levels, bits);
  return at::empty_symint(grad_output.sym_sizes(), grad_output.options());
}

// Ops named as in LowMemoryBP -----------------------------------------------------------------------------------------

at::Tensor regelu2_op(const at::Tensor& input, std::string_view approximate, bool fast) {
  return regelu2(input, approximate, fast);
}

at::Tensor resilu2_op(const at::Tensor& input, bool fast) {
  return resilu2(input, fast);
}

TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  m.impl("step_activation", &step_activation_value);
  m.impl("step_activation_forward", &step_activation_forward_value);
  m.impl("hard_activation", &hard_activation_value);
  m.impl("hard_activation_forward", &hard_activation_forward_value);
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("step_activation_forward", &step_activation_forward_meta);
  m.impl("hard_activation_forward", &hard_activation_forward_meta);
  m.impl("fused_activation_forward", &fused_activation_forward_meta);
  m.impl("step_codes", &step_codes_meta);
  m.impl("band_codes", &band_codes_meta);
  m.impl("step_activation_backward", &step_activation_backward_meta);
}

TORCH_LIBRARY_IMPL(lomem, CompositeImplicitAutograd, m) {
  m.impl("regelu2", &regelu2_op);
  m.impl("resilu2", &resilu2_op);
}

}  // namespace
}  // namespace lomem::detail
