// Packing on the CPU.
#include <ATen/ops/empty.h>
#include <ATen/ops/max.h>
#include <lomem/cpu/kernels.h>
#include <torch/library.h>

#include <atomic>

#include "../checks.h"
#include "../cpu/parallel.h"

namespace lomem::detail {
namespace {

at::Tensor pack_bits_cpu(const at::Tensor& codes, int64_t bits) {
  constexpr const char* op = "lomem::pack_bits";
  check_bits(op, bits);
  check_byte_tensor(op, "codes", codes);
  const at::Tensor source = codes.contiguous();
  const int64_t n = source.numel();
  const int width = static_cast<int>(bits);
  at::Tensor packed = at::empty({packed_bytes(n, width)}, source.options());

  const auto* in = source.const_data_ptr<uint8_t>();
  auto* out = packed.mutable_data_ptr<uint8_t>();
  std::atomic<uint8_t> any{0};
  parallel_over_elements(n, group_size, [&](int64_t begin, int64_t end) {
    any |= cpu::pack_bits(in + begin, end - begin, width, out + begin / group_size * width);
  });
  if (any > max_code(width)) {
    TORCH_CHECK_VALUE(
        false, op, ": codes has the value ", static_cast<int>(source.max().item<uint8_t>()), ", expected at most ",
        static_cast<int>(max_code(width)), " for ", bits, " bits");
  }
  return packed;
}

at::Tensor unpack_bits_cpu(const at::Tensor& packed, int64_t bits, int64_t numel) {
  check_unpack("lomem::unpack_bits", packed, bits, numel);
  const at::Tensor source = packed.contiguous();
  const int width = static_cast<int>(bits);
  at::Tensor codes = at::empty({numel}, source.options());

  const auto* in = source.const_data_ptr<uint8_t>();
  auto* out = codes.mutable_data_ptr<uint8_t>();
  parallel_over_elements(numel, group_size, [&](int64_t begin, int64_t end) {
    cpu::unpack_bits(in + begin / group_size * width, end - begin, width, out + begin);
  });
  return codes;
}

TORCH_LIBRARY_IMPL(lomem, CPU, m) {
  m.impl("pack_bits", &pack_bits_cpu);
  m.impl("unpack_bits", &unpack_bits_cpu);
}

}  // namespace
}  // namespace lomem::detail
