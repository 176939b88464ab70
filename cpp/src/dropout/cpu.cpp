// Dropout on the CPU with a given mask.
#include <ATen/EmptyTensor.h>
#include <lomem/core/dropout.h>
#include <lomem/cpu/kernels.h>
#include <torch/library.h>

#include "../checks.h"
#include "../cpu/parallel.h"
#include "../op.h"

namespace lomem::detail {
namespace {

at::Tensor dropout_apply_cpu(const at::Tensor& input, const at::Tensor& mask, double p) {
  check_dropout_apply(ops::dropout_apply.name, input, mask, p);
  const at::Tensor dense = input.contiguous();
  const at::Tensor packed = mask.contiguous();
  at::Tensor output(at::detail::empty_cpu(dense.sizes(), dense.scalar_type()));

  const DType dtype = to_dtype(dense.scalar_type());
  const double scale = visit_dtype(
      dtype, [&](auto element) -> double { return rounded_dropout_scale<typename decltype(element)::type>(p); });
  const auto size = static_cast<int64_t>(element_size(dtype));
  const auto* source = static_cast<const char*>(dense.const_data_ptr());
  const auto* bits = packed.const_data_ptr<uint8_t>();
  auto* target = static_cast<char*>(output.mutable_data_ptr());
  const bool stream = cpu::should_stream(dense.nbytes());
  parallel_over_elements(dense.numel(), cache_line_elements, [&](int64_t begin, int64_t end) {
    cpu::mask_multiply(
        dtype, source + begin * size, bits + begin / group_size, scale, end - begin, target + begin * size, stream);
  });
  return output;
}

TORCH_LIBRARY_IMPL(lomem, CPU, m) {
  m.impl("dropout_apply", &dropout_apply_cpu);
}

}  // namespace
}  // namespace lomem::detail
