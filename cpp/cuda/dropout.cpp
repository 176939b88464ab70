// Dropout on CUDA with a given mask, by torch's kernel.
#include <ATen/ops/native_dropout_backward.h>
#include <lomem/core/dropout.h>
#include <torch/library.h>

#include "../src/checks.h"
#include "../src/op.h"
#include "call.h"

namespace lomem::detail {
namespace {

at::Tensor dropout_apply_cuda(const at::Tensor& input, const at::Tensor& mask, double p) {
  check_dropout_apply(ops::dropout_apply.name, input, mask, p);
  const CudaScope scope(input);
  const at::Tensor dense = input.contiguous();
  const at::Tensor kept = ops::unpack_bits(mask, 1, dense.numel()).view(at::kBool).view(dense.sizes());
  const double scale = visit_dtype(to_dtype(dense.scalar_type()), [&](auto element) -> double {
    return dropout_scale<typename decltype(element)::type>(p);
  });
  return at::native_dropout_backward(dense, kept, scale);
}

TORCH_LIBRARY_IMPL(lomem, CUDA, m) {
  m.impl("dropout_apply", &dropout_apply_cuda);
}

}  // namespace
}  // namespace lomem::detail
