// Autocast of the family of activations: none, as of the step activations.
#include <torch/library.h>

namespace lomem::detail {
namespace {

void keep_dtype(torch::Library& m) {
  for (const char* op : {"step_activation", "hard_activation"}) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
}

TORCH_LIBRARY_IMPL(lomem, AutocastCPU, m) {
  keep_dtype(m);
}

TORCH_LIBRARY_IMPL(lomem, AutocastCUDA, m) {
  keep_dtype(m);
}

}  // namespace
}  // namespace lomem::detail
