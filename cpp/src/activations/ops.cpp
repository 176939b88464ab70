// The activations on every backend, composed of other ops, and the ops named as in LowMemoryBP.
#include "ops.h"

#include <ATen/ops/empty_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <lomem/ops/activations.h>
#include <torch/library.h>

#include <memory>

#include "../checks.h"

namespace lomem::detail {

at::Tensor activation_value(const Activation& activation, const at::Tensor& input, Doubles parameters) {
  // (Autocast would run some of them in float32.)
  const c10::impl::ExcludeDispatchKeyGuard keep_dtype(c10::autocast_dispatch_keyset);
  return activation.value(input, parameters);
}

at::Tensor step_activation_value(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels, bool /*fast*/) {
  constexpr const char* op = ops::step_activation.name;
  check_float_tensor(op, "input", input);
  const Activation& activation = find_activation(op, function, parameters);
  check_step_arguments(op, activation, {bits, criterion, boundaries, levels});
  return activation_value(activation, input, parameters);
}

namespace {

/// The elements of `input` in the memory order of `output`, which is dense, as a 1-D tensor.
at::Tensor in_memory_order(const at::Tensor& input, const at::Tensor& output) {
  const at::Tensor dense = input.strides() == output.strides() ? input : at::empty_like(output).copy_(input);
  return dense.as_strided({dense.numel()}, {1});
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

TORCH_LIBRARY_IMPL(lomem, CompositeImplicitAutograd, m) {
  m.impl("regelu2", &regelu2_op);
  m.impl("resilu2", &resilu2_op);
}

}  // namespace
}  // namespace lomem::detail
