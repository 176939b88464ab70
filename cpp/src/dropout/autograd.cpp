// Gradients of dropout, computed from its mask or seed.
#include "../autograd.h"

namespace lomem::detail {
namespace {

struct WithMask {
  static constexpr const char* name = "DropoutBackward";
  static constexpr const auto& forward = ops::dropout_forward;
  static constexpr const auto& apply = ops::dropout_apply;
  static constexpr auto check_apply = check_dropout_apply;
};

struct WithSeed {
  static constexpr const char* name = "SeededDropoutBackward";
  static constexpr const auto& forward = ops::seeded_dropout_forward;
  static constexpr const auto& apply = ops::seeded_dropout_apply;
  static constexpr auto check_apply = check_seeded_dropout_apply;
};

/// input -> apply(input, kept) is linear and self-adjoint, so it is its own backward pass.
template <class Kind>
variable_list dropped_gradient(AutogradContext* ctx, const variable_list& grad_outputs) {
  if (!grad_outputs[0].defined()) {
    return {at::Tensor()};
  }
  return {Kind::apply(grad_outputs[0], ctx->get_saved_variables()[0], ctx->saved_data["p"].toDouble())};
}

template <class Kind>
struct Dropout : torch::autograd::Function<Dropout<Kind>> {
  static constexpr bool is_traceable = true;
  static constexpr const char* name = Kind::name;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, double p) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, kept] = Kind::forward(input, p);
    ctx->save_for_backward({kept});
    ctx->saved_data["p"] = p;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    return dropped_gradient<Kind>(ctx, grad_outputs);
  }
};

at::Tensor dropout_autograd(const at::Tensor& input, double p, std::string_view saves) {
  constexpr const char* op = ops::dropout.name;
  check_dropout(op, input, p);
  const bool with_seed = check_dropout_options(op, p, saves) == DropoutSaves::seed;
  check_no_tangent(op, "input", input);
  if (!needs_grad(input)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return ops::dropout(input, p, saves);
  }
  if (p == 0) {
    return input.clone();
  }
  return with_seed ? apply_function<Dropout<WithSeed>>(input, p) : apply_function<Dropout<WithMask>>(input, p);
}

template <class Kind>
struct DropoutApply : torch::autograd::Function<DropoutApply<Kind>> {
  static constexpr bool is_traceable = true;
  static constexpr const char* name = Kind::name;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const at::Tensor& kept, double p) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->save_for_backward({kept});
    ctx->saved_data["p"] = p;
    return Kind::apply(input, kept, p);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    return dropped_gradient<Kind>(ctx, grad_outputs);
  }
};

template <class Kind>
at::Tensor dropout_apply_autograd(const at::Tensor& input, const at::Tensor& kept, double p) {
  constexpr const char* op = Kind::apply.name;
  Kind::check_apply(op, input, kept, p);
  check_no_tangent(op, "input", input);
  if (needs_grad(input)) {
    return apply_function<DropoutApply<Kind>>(input, kept, p);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return Kind::apply(input, kept, p);
}

TORCH_LIBRARY_IMPL(lomem, Autograd, m) {
  m.impl("dropout", &dropout_autograd);
  m.impl("dropout_apply", &dropout_apply_autograd<WithMask>);
  m.impl("seeded_dropout_apply", &dropout_apply_autograd<WithSeed>);
}

}  // namespace
}  // namespace lomem::detail
