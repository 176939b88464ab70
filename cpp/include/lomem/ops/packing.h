// Packing of codes of 1 to 8 bits into bytes. These are the same ops as torch.ops.lomem in Python.
//
// Every function throws a c10::Error that names the op, the argument, its value and the expected value.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>
#include <lomem/ops/registration.h>

#include <cstdint>

namespace lomem {

/// Packs a uint8 tensor of codes below 2^bits into a 1-D uint8 tensor of ceil(bits * numel / 8) bytes, in the layout of
/// core/packing.h. bits = 1..8.
LOMEM_API at::Tensor pack_bits(const at::Tensor& codes, int64_t bits);

/// Unpacks `numel` codes into a 1-D uint8 tensor; the inverse of pack_bits.
LOMEM_API at::Tensor unpack_bits(const at::Tensor& packed, int64_t bits, int64_t numel);

}  // namespace lomem
