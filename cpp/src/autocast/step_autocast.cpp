// Autocast of the step activations: none. They keep their input's dtype, as torch's do, whatever
// autocast does; said here so that it does not rest on a default.
#include <torch/library.h>

namespace lomem::detail {
namespace {

void keep_dtype(torch::Library& m) {
  for (const char* op : {"regelu2", "resilu2"}) {
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
