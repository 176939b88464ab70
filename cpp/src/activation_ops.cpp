// The family of activations with few-bit derivatives, on every backend: the torch op itself, and codes of
// its input, which is all that backends differ in.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <lomem/core/packing.h>
#include <torch/library.h>

#include "activations.h"
#include "checks.h"
#include "dispatch.h"

namespace lomem::detail {
namespace {

using Parameters = at::ArrayRef<double>;
using OptionalDoubles = std::optional<at::ArrayRef<double>>;

template <class Function>
at::Tensor value(const Function& activation, const at::Tensor& input, Parameters parameters) {
  // (For some of them autocast would have float32.)
  const c10::impl::ExcludeDispatchKeyGuard keep_dtype(c10::autocast_dispatch_keyset);
  return activation.value(input, parameters);
}

/// The elements of `input` in the memory order of `output`, which is dense.
at::Tensor in_memory_order(const at::Tensor& input, const at::Tensor& output) {
  const at::Tensor dense = input.strides() == output.strides() ? input : at::empty_like(output).copy_(input);
  return dense.as_strided({dense.numel()}, {1});
}

at::Tensor step_activation_value(
    const at::Tensor& input, std::string_view function, Parameters parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels) {
  constexpr const char* op = "lomem::step_activation";
  check_float_tensor(op, "input", input);
  const Activation& activation = find_activation(op, function, parameters);
  choose_steps(op, activation, parameters, bits, criterion, boundaries, levels);
  return value(activation, input, parameters);
}

struct Forward {
  at::Tensor output;
  StepFunction steps;
};

Forward forward_of(
    const at::Tensor& input, std::string_view function, Parameters parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels) {
  constexpr const char* op = "lomem::step_activation_forward";
  check_float_tensor(op, "input", input);
  const Activation& activation = find_activation(op, function, parameters);
  StepFunction steps = choose_steps(op, activation, parameters, bits, criterion, boundaries, levels);
  return {value(activation, input, parameters), std::move(steps)};
}

std::tuple<at::Tensor, at::Tensor> step_activation_forward_any(
    const at::Tensor& input, std::string_view function, Parameters parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels) {
  const auto [output, steps] = forward_of(input, function, parameters, bits, criterion, boundaries, levels);
  return {output, step_codes(in_memory_order(input, output), steps.boundaries, bits)};
}

at::Tensor empty_codes(const at::Tensor& input, int64_t bits) {
  return at::empty_symint({packed_bytes(input.sym_numel(), static_cast<int>(bits))}, input.options().dtype(at::kByte));
}

std::tuple<at::Tensor, at::Tensor> step_activation_forward_meta(
    const at::Tensor& input, std::string_view function, Parameters parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels) {
  const auto [output, steps] = forward_of(input, function, parameters, bits, criterion, boundaries, levels);
  return {output, empty_codes(input, bits)};
}

at::Tensor hard_activation_value(const at::Tensor& input, std::string_view function, Parameters parameters) {
  constexpr const char* op = "lomem::hard_activation";
  check_float_tensor(op, "input", input);
  return value(find_hard_activation(op, function, parameters), input, parameters);
}

constexpr const char* hard_forward_op = "lomem::hard_activation_forward";

std::tuple<at::Tensor, at::Tensor> hard_activation_forward_any(
    const at::Tensor& input, std::string_view function, Parameters parameters) {
  check_float_tensor(hard_forward_op, "input", input);
  const HardActivation& activation = find_hard_activation(hard_forward_op, function, parameters);
  const at::Tensor output = value(activation, input, parameters);
  const Band band = band_of(activation, parameters, input.scalar_type(), input.is_cuda());
  return {output, band_codes(in_memory_order(input, output), band.low, band.high)};
}

std::tuple<at::Tensor, at::Tensor> hard_activation_forward_meta(
    const at::Tensor& input, std::string_view function, Parameters parameters) {
  check_float_tensor(hard_forward_op, "input", input);
  const HardActivation& activation = find_hard_activation(hard_forward_op, function, parameters);
  return {value(activation, input, parameters), empty_codes(input, 1)};
}

at::Tensor step_codes_meta(const at::Tensor& input, Parameters boundaries, int64_t bits) {
  check_step_codes(input, boundaries, bits);
  return empty_codes(input, bits);
}

at::Tensor band_codes_meta(const at::Tensor& input, double low, double high) {
  check_band_codes(input, low, high);
  return empty_codes(input, 1);
}

TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  m.impl("step_activation", &step_activation_value);
  m.impl("step_activation_forward", &step_activation_forward_any);
  m.impl("hard_activation", &hard_activation_value);
  m.impl("hard_activation_forward", &hard_activation_forward_any);
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("step_activation_forward", &step_activation_forward_meta);
  m.impl("hard_activation_forward", &hard_activation_forward_meta);
  m.impl("step_codes", &step_codes_meta);
  m.impl("band_codes", &band_codes_meta);
}

}  // namespace
}  // namespace lomem::detail
