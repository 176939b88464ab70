// What packing is apart from its backends: the C++ functions, and the shapes of results with symbolic sizes.
#include <ATen/ops/empty.h>
#include <lomem/core/packing.h>
#include <lomem/ops/packing.h>
#include <torch/library.h>

#include "../checks.h"
#include "../op.h"
#include "ops.h"

namespace lomem {

at::Tensor pack_bits(const at::Tensor& codes, int64_t bits) {
  return detail::ops::pack_bits(codes, bits);
}

at::Tensor unpack_bits(const at::Tensor& packed, int64_t bits, int64_t numel) {
  return detail::ops::unpack_bits(packed, bits, numel);
}

namespace detail {

at::Tensor packed_mask(const at::Tensor& mask) {
  return ops::pack_bits(mask.view(at::kByte), 1);
}

namespace {

at::Tensor pack_bits_meta(const at::Tensor& codes, int64_t bits) {
  constexpr const char* op = ops::pack_bits.name;
  check_bits(op, bits);
  check_byte_tensor(op, "codes", codes);
  return at::empty_symint({packed_bytes(codes.sym_numel(), static_cast<int>(bits))}, codes.options());
}

at::Tensor unpack_bits_meta(const at::Tensor& packed, int64_t bits, c10::SymInt numel) {
  check_unpack(ops::unpack_bits.name, packed, bits, numel);
  return at::empty_symint({numel}, packed.options());
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("pack_bits", &pack_bits_meta);
  m.impl("unpack_bits", &unpack_bits_meta);
}

}  // namespace
}  // namespace detail
}  // namespace lomem
