// The C++ functions of packing.
#include <lomem/ops/packing.h>

#include "../op.h"

namespace lomem {

at::Tensor pack_bits(const at::Tensor& codes, int64_t bits) {
  return detail::ops::pack_bits(codes, bits);
}

at::Tensor unpack_bits(const at::Tensor& packed, int64_t bits, int64_t numel) {
  return detail::ops::unpack_bits(packed, bits, numel);
}

}  // namespace lomem
