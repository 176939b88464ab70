// What dropout is apart from its backends: the C++ functions, drawing the mask by torch's ops, and the shapes of
// results with symbolic sizes.
#include <ATen/core/stack.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/native_dropout.h>
#include <lomem/core/packing.h>
#include <lomem/ops/dropout.h>
#include <torch/library.h>

#include "../checks.h"
#include "../op.h"
#include "../packing/ops.h"

namespace lomem {

at::Tensor dropout(const at::Tensor& input, double p, bool training, std::string_view saves) {
  detail::check_dropout_options(detail::ops::dropout.name, p, saves);
  return training && p > 0 ? detail::ops::dropout(input, p, saves) : input;
}

std::tuple<at::Tensor, at::Tensor> dropout_forward(const at::Tensor& input, double p) {
  return detail::ops::dropout_forward(input, p);
}

at::Tensor dropout_apply(const at::Tensor& input, const at::Tensor& mask, double p) {
  return detail::ops::dropout_apply(input, mask, p);
}

namespace detail {
namespace {

/// Whether torch draws no numbers.
bool draws_nothing(const at::Tensor& input, double p) {
  return p == 0 || input.numel() == 0;
}

/// Used if no gradient is needed: the torch op itself. (Ops return no input, so that is copied.)
at::Tensor dropout_value(const at::Tensor& input, double p, std::string_view saves) {
  constexpr const char* op = ops::dropout.name;
  check_dropout(op, input, p);
  check_dropout_options(op, p, saves);
  return draws_nothing(input, p) ? input.clone() : at::dropout(input, p, /*train=*/true);
}

/// Draws what torch draws on the CPU for a contiguous input, as a mask.
at::Tensor drawn_mask(const at::Tensor& input, double p) {
  // Of bytes, torch draws the same as of every dtype but float64, which takes twice as many numbers from the generator
  // for its seed.
  const bool bytes = input.scalar_type() != at::kDouble;
  const at::Tensor kept =
      at::empty(input.sizes(), input.options().dtype(bytes ? at::kByte : at::kDouble)).bernoulli_(1 - p);
  return bytes ? packed_mask(kept) : ops::step_codes(kept, {{0.5}}, 1);
}

std::tuple<at::Tensor, at::Tensor> dropout_forward_value(const at::Tensor& input, double p) {
  check_dropout(ops::dropout_forward.name, input, p);
  if (draws_nothing(input, p)) {
    const at::Tensor kept = at::full(input.sizes(), 1, input.options().dtype(at::kByte));
    return {input.clone(), packed_mask(kept)};
  }
  if (!input.is_cpu()) {
    auto [output, kept] = at::native_dropout(input, p, /*train=*/true);
    return {output, packed_mask(kept)};
  }
  if (input.is_contiguous()) {
    at::Tensor mask = drawn_mask(input, p);
    return {ops::dropout_apply(input, mask, p), mask};
  }
  // As torch does it, with its strides.
  at::Tensor noise = at::empty_like(input).bernoulli_(1 - p);
  at::Tensor mask = ops::step_codes(noise, {{0.5}}, 1);
  return {input.mul(noise.div_(1 - p)), mask};
}

// Shapes --------------------------------------------------------------------------------------------------------------

at::Tensor dropout_meta(const at::Tensor& input, double p, std::string_view saves) {
  constexpr const char* op = ops::dropout.name;
  check_dropout(op, input, p);
  check_dropout_options(op, p, saves);
  return at::empty_like(input);
}

std::tuple<at::Tensor, at::Tensor> dropout_forward_meta(const at::Tensor& input, double p) {
  check_dropout(ops::dropout_forward.name, input, p);
  return {
      at::empty_like(input), at::empty_symint({packed_bytes(input.sym_numel(), 1)}, input.options().dtype(at::kByte))};
}

at::Tensor dropout_apply_meta(const at::Tensor& input, const at::Tensor& mask, double p) {
  check_dropout_apply(ops::dropout_apply.name, input, mask, p);
  return at::empty_symint(input.sym_sizes(), input.options());
}

TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  m.impl("dropout", &dropout_value);
  m.impl("dropout_forward", &dropout_forward_value);
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("dropout", &dropout_meta);
  m.impl("dropout_forward", &dropout_forward_meta);
  m.impl("dropout_apply", &dropout_apply_meta);
}

// torch.func.vmap has a say in what is random: torch's own ops ask it, and a loop over calls of this one would not.

void refuse_vmap(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(), ": got a call inside torch.func.vmap, expected one outside, or torch's dropout");
}

TORCH_LIBRARY_IMPL(lomem, FuncTorchVmapMode, m) {
  m.impl("dropout", torch::CppFunction::makeFromBoxedFunction<&refuse_vmap>());
  m.impl("dropout_forward", torch::CppFunction::makeFromBoxedFunction<&refuse_vmap>());
}

}  // namespace
}  // namespace detail
}  // namespace lomem
