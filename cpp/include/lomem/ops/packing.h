// Codes of 1 to 8 bits and bytes. The same ops as torch.ops.lomem in Python.
//
// Every function raises c10::Error that names op, argument, the value it got and the value it wants.
#pragma once

#include <ATen/core/Tensor.h>
#include <lomem/config.h>
#include <lomem/ops/registration.h>

#include <cstdint>

namespace lomem {

/// 1-D uint8 tensor of ceil(bits * numel / 8) bytes from a uint8 tensor of codes below 2^bits, in
/// the layout of core/packing.h. bits = 1..8.
LOMEM_API at::Tensor pack_bits(const at::Tensor& codes, int64_t bits);

/// 1-D uint8 tensor of `numel` codes, the inverse of pack_bits.
LOMEM_API at::Tensor unpack_bits(const at::Tensor& packed, int64_t bits, int64_t numel);

}  // namespace lomem
