// Dropout on the CPU with a given mask or seed.
#include <ATen/EmptyTensor.h>
#include <lomem/core/dropout.h>
#include <lomem/cpu/kernels.h>
#include <torch/library.h>

#include "../checks.h"
#include "../cpu/parallel.h"
#include "../op.h"

namespace lomem::detail {
namespace {

/// Calls kernel(source, begin, end, target, stream) for ranges of elements that start at multiples of 64.
template <class Kernel>
at::Tensor multiplied(const at::Tensor& input, const Kernel& kernel) {
  const at::Tensor dense = input.contiguous();
  at::Tensor output(at::detail::empty_cpu(dense.sizes(), dense.scalar_type()));
  const auto size = static_cast<int64_t>(dense.element_size());
  const auto* source = static_cast<const char*>(dense.const_data_ptr());
  auto* target = static_cast<char*>(output.mutable_data_ptr());
  const bool stream = cpu::should_stream(dense.nbytes());
  parallel_over_elements(dense.numel(), cache_line_elements, [&](int64_t begin, int64_t end) {
    kernel(source + begin * size, begin, end, target + begin * size, stream);
  });
  return output;
}

at::Tensor dropout_apply_cpu(const at::Tensor& input, const at::Tensor& mask, double p) {
  check_dropout_apply(ops::dropout_apply.name, input, mask, p);
  const DType dtype = to_dtype(input.scalar_type());
  const double scale = visit_dtype(
      dtype, [&](auto element) -> double { return rounded_dropout_scale<typename decltype(element)::type>(p); });
  const at::Tensor packed = mask.contiguous();
  const auto* bits = packed.const_data_ptr<uint8_t>();
  return multiplied(input, [&](const char* source, int64_t begin, int64_t end, char* target, bool stream) {
    cpu::mask_multiply(dtype, source, bits + begin / group_size, scale, end - begin, target, stream);
  });
}

at::Tensor seeded_dropout_apply_cpu(const at::Tensor& input, const at::Tensor& seed, double p) {
  check_seeded_dropout_apply(ops::seeded_dropout_apply.name, input, seed, p);
  const DType dtype = to_dtype(input.scalar_type());
  const double scale =
      visit_dtype(dtype, [&](auto element) -> double { return dropout_scale<typename decltype(element)::type>(p); });
  const auto number = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  const uint32_t bound = dropout_bound(p);
  return multiplied(input, [&](const char* source, int64_t begin, int64_t end, char* target, bool stream) {
    cpu::seed_multiply(dtype, source, number, begin, bound, scale, end - begin, target, stream);
  });
}

TORCH_LIBRARY_IMPL(lomem, CPU, m) {
  m.impl("dropout_apply", &dropout_apply_cpu);
  m.impl("seeded_dropout_apply", &seeded_dropout_apply_cpu);
}

}  // namespace
}  // namespace lomem::detail
