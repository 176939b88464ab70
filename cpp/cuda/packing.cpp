// Packing on CUDA.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../src/checks.h"
#include "call.h"

namespace lomem::detail {
namespace {

at::Tensor pack_bits_cuda(const at::Tensor& codes, int64_t bits) {
  constexpr const char* op = "lomem::pack_bits";
  check_bits(op, bits);
  check_byte_tensor(op, "codes", codes);
  const CudaScope scope(codes);
  const at::Tensor source = codes.contiguous();
  const int width = static_cast<int>(bits);
  at::Tensor packed = at::empty({packed_bytes(source.numel(), width)}, source.options());
  const cudaError_t error = cuda::pack_bits(
      source.const_data_ptr<uint8_t>(), source.numel(), width, packed.mutable_data_ptr<uint8_t>(),
      current_stream(source));
  check_launch(op, source, error);
  return packed;
}

at::Tensor unpack_bits_cuda(const at::Tensor& packed, int64_t bits, int64_t numel) {
  check_unpack("lomem::unpack_bits", packed, bits, numel);
  const CudaScope scope(packed);
  const at::Tensor source = packed.contiguous();
  at::Tensor codes = at::empty({numel}, source.options());
  const cudaError_t error = cuda::unpack_bits(
      source.const_data_ptr<uint8_t>(), numel, static_cast<int>(bits), codes.mutable_data_ptr<uint8_t>(),
      current_stream(source));
  check_launch("lomem::unpack_bits", source, error);
  return codes;
}

TORCH_LIBRARY_IMPL(lomem, CUDA, m) {
  m.impl("pack_bits", &pack_bits_cuda);
  m.impl("unpack_bits", &unpack_bits_cuda);
}

}  // namespace
}  // namespace lomem::detail
