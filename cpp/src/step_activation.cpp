// The public step activations where no gradient is needed: the torch op itself, on every backend.
#include <torch/library.h>

#include "checks.h"
#include "step_ops.h"

namespace lomem::detail {
namespace {

template <class Op, class... Args>
at::Tensor step_activation(const at::Tensor& input, Args... args) {
  check_float_tensor(Op::name, "input", input);
  Op::check(Op::name, args...);
  return Op::activation(input, args...);
}

TORCH_LIBRARY_IMPL(lomem, CompositeExplicitAutograd, m) {
  m.impl("regelu2", &step_activation<ReGELU2Op, std::string_view, bool>);
  m.impl("resilu2", &step_activation<ReSiLU2Op, bool>);
}

}  // namespace
}  // namespace lomem::detail
