// Dropout on CUDA with a given mask or seed.
#include <ATen/ops/empty.h>
#include <lomem/core/dropout.h>
#include <torch/library.h>

#include "../src/checks.h"
#include "../src/op.h"
#include "call.h"

namespace lomem::detail {
namespace {

double dropout_scale_of(at::ScalarType dtype, double p) {
  return visit_dtype(
      to_dtype(dtype), [&](auto element) -> double { return dropout_scale<typename decltype(element)::type>(p); });
}

at::Tensor dropout_apply_cuda(const at::Tensor& input, const at::Tensor& mask, double p) {
  constexpr const char* op = ops::dropout_apply.name;
  check_dropout_apply(op, input, mask, p);
  const CudaScope scope(input);
  const at::Tensor dense = input.contiguous();
  const at::Tensor packed = mask.contiguous();
  at::Tensor output = at::empty(dense.sizes(), dense.options());
  const cudaError_t error = cuda::mask_multiply(
      to_dtype(dense.scalar_type()), dense.const_data_ptr(), packed.const_data_ptr<uint8_t>(),
      dropout_scale_of(dense.scalar_type(), p), dense.numel(), output.mutable_data_ptr(), current_stream(dense));
  check_launch(op, dense, error);
  return output;
}

at::Tensor seeded_dropout_apply_cuda(const at::Tensor& input, const at::Tensor& seed, double p) {
  constexpr const char* op = ops::seeded_dropout_apply.name;
  check_seeded_dropout_apply(op, input, seed, p);
  const CudaScope scope(input);
  const at::Tensor dense = input.contiguous();
  at::Tensor output = at::empty(dense.sizes(), dense.options());
  const cudaError_t error = cuda::seed_multiply(
      to_dtype(dense.scalar_type()), dense.const_data_ptr(), seed.const_data_ptr<int64_t>(), dropout_bound(p),
      dropout_scale_of(dense.scalar_type(), p), dense.numel(), output.mutable_data_ptr(), current_stream(dense));
  check_launch(op, dense, error);
  return output;
}

TORCH_LIBRARY_IMPL(lomem, CUDA, m) {
  m.impl("dropout_apply", &dropout_apply_cuda);
  m.impl("seeded_dropout_apply", &seeded_dropout_apply_cuda);
}

}  // namespace
}  // namespace lomem::detail
