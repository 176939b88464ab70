// How the CPU's forward passes go through the elements of a tensor.
//
// Encode is a class that computes the codes of some elements: encode(dtype, x, first, n, packed) those of x[0, n), the
// elements from number `first` on, a multiple of group_size, of a tensor whose codes are at `packed`; encode.bits()
// bits each.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <lomem/core/packing.h>
#include <lomem/cpu/kernels.h>

#include <tuple>

#include "../checks.h"
#include "../cpu/parallel.h"
#include "../cpu/value_table.h"

namespace lomem::detail {

// (Bypasses the dispatcher, which costs as much as a small activation.)
inline at::Tensor empty_codes(int64_t n, int64_t bits) {
  return at::Tensor(at::detail::empty_cpu({packed_bytes(n, static_cast<int>(bits))}, at::kByte));
}

/// Encodes the `n` elements at `x`.
template <class Encode>
void encode_all(const Encode& encode, at::ScalarType scalar_type, const void* x, int64_t n, uint8_t* packed) {
  const DType dtype = to_dtype(scalar_type);
  const auto size = static_cast<int64_t>(element_size(dtype));
  parallel_over_elements(n, cache_line_elements, [&](int64_t begin, int64_t end) {
    encode(dtype, static_cast<const char*>(x) + begin * size, begin, end - begin, packed);
  });
}

/// A tensor with the strides of the result of torch's elementwise ops for a dense `input`. They differ from the input's
/// strides where a dimension of size 1 has an unusual stride.
inline at::Tensor empty_result(const at::Tensor& input) {
  if (input.is_contiguous()) {
    return at::Tensor(at::detail::empty_cpu(input.sizes(), input.scalar_type()));
  }
  if (input.is_contiguous(at::MemoryFormat::ChannelsLast)) {
    return at::empty_like(input, input.options(), at::MemoryFormat::ChannelsLast);
  }
  return at::empty_like(input);
}

/// Values and codes of an input that goes in tiles, so that its elements are read from memory once.
template <class Function, class Encode>
std::tuple<at::Tensor, at::Tensor> forward_in_tiles(const at::Tensor& input, const Encode& encode) {
  const int64_t size = input.element_size();
  const DType dtype = to_dtype(input.scalar_type());
  at::Tensor output = empty_result(input);
  at::Tensor codes = empty_codes(input.numel(), encode.bits());
  const auto* x = static_cast<const char*>(input.const_data_ptr());
  auto* packed = codes.mutable_data_ptr<uint8_t>();
  values_in_tiles<Function>(
      input, output, [&](int64_t begin, int64_t count) { encode(dtype, x + begin * size, begin, count, packed); });
  return {output, codes};
}

}  // namespace lomem::detail
