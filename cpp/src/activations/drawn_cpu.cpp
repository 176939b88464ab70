// Codes drawn at random on the CPU, and gradients from them.
#include <torch/library.h>

#include "../cpu/subnormals.h"
#include "../linear/random_seed.h"
#include "drawn.h"
#include "fused.h"
#include "ops.h"
#include "tiles.h"

namespace lomem::detail {
namespace {

RoundingBits random_of(const at::Tensor& seed, int64_t offset) {
  return {static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()), static_cast<uint64_t>(offset)};
}

/// Draws codes. (See tiles.h.)
class DrawnEncoder {
 public:
  DrawnEncoder(const DrawnFunction& drawn, int64_t bits, const at::Tensor& seed, int64_t offset, DType dtype)
      : table_(drawn.table()),
        targets_(drawn.targets(dtype, bits)),
        bits_(static_cast<int>(bits)),
        random_(random_of(seed, offset)) {}

  int bits() const {
    return bits_;
  }

  void operator()(DType dtype, const void* x, int64_t first, int64_t n, uint8_t* packed) const {
    const SubnormalsScope as_they_are(Subnormals::kept());
    cpu::drawn_encode(dtype, table_, targets_, x, first, n, bits_, random_, packed + first / group_size * bits_);
  }

 private:
  const DrawnTable& table_;
  const uint32_t* targets_;
  int bits_;
  RoundingBits random_;
};

at::Tensor drawn_codes_cpu(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, const at::Tensor& seed,
    int64_t offset) {
  constexpr const char* op = ops::drawn_codes.name;
  check_drawing(op, input, bits, seed, offset);
  const auto drawn = resolve_drawn(find_activation(op, function, parameters), parameters);
  const at::Tensor source = input.contiguous();
  at::Tensor codes = empty_codes(source.numel(), bits);
  encode_all(
      DrawnEncoder(*drawn, bits, seed, offset, to_dtype(source.scalar_type())), source.scalar_type(),
      source.const_data_ptr(), source.numel(), codes.mutable_data_ptr<uint8_t>());
  return codes;
}

/// With the results of drawn_activation_forward_value.
std::tuple<at::Tensor, at::Tensor, at::Tensor> drawn_activation_forward_cpu(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, const OptionalTensor& seed,
    int64_t offset) {
  constexpr const char* op = ops::drawn_activation_forward.name;
  const Activation& activation = check_drawn_activation(op, input, function, parameters, bits, seed, offset);
  if (!activation.fused) {
    return drawn_activation_forward_value(input, function, parameters, bits, seed, offset);
  }
  return visit_fused(function, [&](auto type) {
    using Function = typename decltype(type)::type;
    if (!goes_in_tiles<Function>(input)) {
      return drawn_activation_forward_value(input, function, parameters, bits, seed, offset);
    }
    const at::Tensor used_seed = has_tensor(seed) ? seed->clone() : draw_seed(op, input.device());
    const auto drawn = resolve_drawn(activation, parameters);
    auto [output, codes] =
        forward_in_tiles<Function>(input, DrawnEncoder(*drawn, bits, used_seed, offset, to_dtype(input.scalar_type())));
    return std::tuple(output, codes, used_seed);
  });
}

at::Tensor drawn_activation_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& codes, const at::Tensor& seed, double low, double step,
    int64_t bits, int64_t offset) {
  check_drawn_backward(ops::drawn_activation_backward.name, grad_output, codes, seed, bits, offset);
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor packed_codes = codes.contiguous();
  at::Tensor grad_input(at::detail::empty_cpu(grad.sizes(), grad.scalar_type()));
  const RoundingBits random = random_of(seed, offset);
  const DType dtype = to_dtype(grad.scalar_type());
  const auto size = static_cast<int64_t>(grad.element_size());
  const auto* source = static_cast<const char*>(grad.const_data_ptr());
  const auto* packed = packed_codes.const_data_ptr<uint8_t>();
  auto* target = static_cast<char*>(grad_input.mutable_data_ptr());
  const bool stream = cpu::should_stream(grad.nbytes());
  parallel_over_elements(grad.numel(), cache_line_elements, [&](int64_t begin, int64_t end) {
    cpu::drawn_decode_multiply(
        dtype, source + begin * size, packed + begin / group_size * bits, {low, step}, static_cast<int>(bits), begin,
        end - begin, random, target + begin * size, stream);
  });
  return grad_input;
}

TORCH_LIBRARY_IMPL(lomem, CPU, m) {
  m.impl("drawn_activation_forward", &drawn_activation_forward_cpu);
  m.impl("drawn_codes", &drawn_codes_cpu);
  m.impl("drawn_activation_backward", &drawn_activation_backward_cpu);
}

}  // namespace
}  // namespace lomem::detail
