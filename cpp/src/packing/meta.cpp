// Shapes of packing's results, with symbolic sizes.
#include <ATen/ops/empty.h>
#include <lomem/core/packing.h>
#include <torch/library.h>

#include "../checks.h"

namespace lomem::detail {
namespace {

at::Tensor pack_bits_meta(const at::Tensor& codes, int64_t bits) {
  check_bits("lomem::pack_bits", bits);
  check_byte_tensor("lomem::pack_bits", "codes", codes);
  return at::empty_symint({packed_bytes(codes.sym_numel(), static_cast<int>(bits))}, codes.options());
}

at::Tensor unpack_bits_meta(const at::Tensor& packed, int64_t bits, c10::SymInt numel) {
  check_unpack("lomem::unpack_bits", packed, bits, numel);
  return at::empty_symint({numel}, packed.options());
}

TORCH_LIBRARY_IMPL(lomem, Meta, m) {
  m.impl("pack_bits", &pack_bits_meta);
  m.impl("unpack_bits", &unpack_bits_meta);
}

}  // namespace
}  // namespace lomem::detail
