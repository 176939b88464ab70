// What dropout is apart from its backends: the C++ functions, drawing the mask by torch's ops, and the shapes of
// results with symbolic sizes.
#include <ATen/core/stack.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/native_dropout.h>
#include <ATen/ops/zeros.h>
#include <lomem/core/packing.h>
#include <lomem/ops/dropout.h>
#include <torch/library.h>

#include "../checks.h"
#include "../op.h"
#include "../packing/ops.h"
#include "draws.h"

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

std::tuple<at::Tensor, at::Tensor> seeded_dropout_forward(const at::Tensor& input, double p) {
  return detail::ops::seeded_dropout_forward(input, p);
}

at::Tensor seeded_dropout_apply(const at::Tensor& input, const at::Tensor& seed, double p) {
  return detail::ops::seeded_dropout_apply(input, seed, p);
}

namespace detail {
namespace {

/// Whether torch draws no numbers.
bool draws_nothing(const at::Tensor& input, double p) {
  return p == 0 || input.numel() == 0;
}

/// Used if no gradient is needed: the torch op itself, if it draws from torch's generator.
at::Tensor dropout_value(const at::Tensor& input, double p, std::string_view saves) {
  constexpr const char* op = ops::dropout.name;
  check_dropout(op, input, p);
  if (check_dropout_options(op, p, saves) == DropoutSaves::seed) {
    return std::get<0>(ops::seeded_dropout_forward(input, p));
  }
  // (Ops return no input, so that is copied.)
  return draws_nothing(input, p) ? input.clone() : at::dropout(input, p, /*train=*/true);
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
    at::Tensor mask = draw_mask(input.sizes(), input.scalar_type(), 1 - p);
    return {ops::dropout_apply(input, mask, p), mask};
  }
  // As torch does it, with its strides.
  at::Tensor noise = at::empty_like(input).bernoulli_(1 - p);
  at::Tensor mask = ops::step_codes(noise, {{0.5}}, 1);
  return {input.mul(noise.div_(1 - p)), mask};
}

std::tuple<at::Tensor, at::Tensor> seeded_dropout_forward_value(const at::Tensor& input, double p) {
  check_dropout(ops::seeded_dropout_forward.name, input, p);
  if (draws_nothing(input, p)) {
    return {input.clone(), at::zeros({}, input.options().dtype(at::kLong))};
  }
  // From torch's generator, whose state a checkpoint restores for its second forward pass, which draws the same seed.
  at::Tensor seed = at::empty({}, input.options().dtype(at::kLong)).random_();
  const at::Tensor output = ops::seeded_dropout_apply(input, seed, p);
  return {input.is_contiguous() ? output : at::empty_like(input).copy_(output), seed};
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

std::tuple<at::Tensor, at::Tensor> seeded_dropout_forward_meta(const at::Tensor& input, double p) {
  check_dropout(ops::seeded_dropout_forward.name, input, p);
  return {at::empty_like(input), at::empty({}, input.options().dtype(at::kLong))};
}

at::Tensor seeded_dropout_apply_meta(const at::Tensor& input, const at::Tensor& seed, double p) {
  check_seeded_dropout_apply(ops::seeded_dropout_apply.name, input, seed, p);
  return at::empty_symint(input.sym_sizes(), input.options());
}

TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  m.impl("dropout", &dropout_value);
  m.impl("dropout_forward", &dropout_forward_value);
  m.impl("seeded_dropout_forward", &seeded_dropout_forward_value);
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("dropout", &dropout_meta);
  m.impl("dropout_forward", &dropout_forward_meta);
  m.impl("dropout_apply", &dropout_apply_meta);
  m.impl("seeded_dropout_forward", &seeded_dropout_forward_meta);
  m.impl("seeded_dropout_apply", &seeded_dropout_apply_meta);
}

// torch.func.vmap has a say in what is random: torch's own ops ask it, and a loop over calls of this one would not.

void refuse_vmap(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(), ": got a call inside torch.func.vmap, expected one outside, or torch's dropout");
}

TORCH_LIBRARY_IMPL(lomem, FuncTorchVmapMode, m) {
  for (const char* op : {"dropout", "dropout_forward", "seeded_dropout_forward"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse_vmap>());
  }
}

}  // namespace
}  // namespace detail
}  // namespace lomem
