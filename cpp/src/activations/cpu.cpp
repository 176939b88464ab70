// Activation ops on the CPU: unpack tensors and run the kernels on raw pointers.
#include <ATen/ops/empty_like.h>
#include <lomem/cpu/kernels.h>
#include <torch/library.h>

#include "../checks.h"
#include "../cpu/parallel.h"
#include "fused.h"
#include "ops.h"
#include "tiles.h"

namespace lomem::detail {
namespace {

// Codes ---------------------------------------------------------------------------------------------------------------

/// Computes the codes of some elements. The result does not depend on how the thread treats subnormal numbers.
class Encoder {
 public:
  using Published = void (*)(DType, const void* x, int64_t n, uint8_t* packed);

  /// `published` is the kernel of a step function known at compile time; null for other boundaries.
  Encoder(Doubles boundaries, int64_t bits, Published published = nullptr)
      : bits_(static_cast<int>(bits)), published_(published) {
    if (published == nullptr) {
      boundaries_ = filled_boundaries(boundaries, bits);
    }
  }

  int bits() const {
    return bits_;
  }

  /// Encodes x[0, n), the elements from index `first` on of the whole input. `first` is a multiple of group_size.
  void operator()(DType dtype, const void* x, int64_t first, int64_t n, uint8_t* packed) const {
    const SubnormalsScope as_they_are(Subnormals::kept());
    uint8_t* const target = packed + first / group_size * bits_;
    if (published_ != nullptr) {
      published_(dtype, x, n, target);
    } else {
      cpu::step_search_encode(dtype, x, n, boundaries_.data(), bits_, target);
    }
  }

 private:
  std::vector<double> boundaries_;
  int bits_;
  Published published_;
};

at::Tensor step_codes_cpu(const at::Tensor& input, Doubles boundaries, int64_t bits) {
  check_encoding(ops::step_codes.name, input, boundaries, bits);
  const at::Tensor source = input.contiguous();
  at::Tensor codes = empty_codes(source.numel(), bits);
  encode_all(
      Encoder(boundaries, bits), source.scalar_type(), source.const_data_ptr(), source.numel(),
      codes.mutable_data_ptr<uint8_t>());
  return codes;
}

at::Tensor band_codes_cpu(const at::Tensor& input, double low, double high) {
  check_band(ops::band_codes.name, input, low, high);
  const at::Tensor source = input.contiguous();
  at::Tensor codes = empty_codes(source.numel(), 1);
  const auto encode = [&](DType dtype, const void* x, int64_t first, int64_t n, uint8_t* packed) {
    const SubnormalsScope as_they_are(Subnormals::kept());
    cpu::band_encode(dtype, x, n, low, high, packed + first / group_size);
  };
  encode_all(encode, source.scalar_type(), source.const_data_ptr(), source.numel(), codes.mutable_data_ptr<uint8_t>());
  return codes;
}

// Values and codes in one pass ----------------------------------------------------------------------------------------

/// Computes the fast forward into `output` and, if `codes` is not null, codes of the published step function. Returns
/// false if there is no fast kernel.
template <class Function>
bool run_fast(const at::Tensor& input, at::Tensor& output, uint8_t* codes) {
  const DType dtype = to_dtype(input.scalar_type());
  const auto size = static_cast<int64_t>(element_size(dtype));
  const auto* x = static_cast<const char*>(input.const_data_ptr());
  auto* y = static_cast<char*>(output.mutable_data_ptr());
  const bool stream = cpu::should_stream(input.nbytes());
  // (A call with no elements tells whether there is a kernel.)
  if (!cpu::fast_forward<Function>(dtype, x, 0, y, nullptr, false)) {
    return false;
  }
  parallel_over_elements(input.numel(), cache_line_elements, [&](int64_t begin, int64_t end) {
    const SubnormalsScope as_they_are(Subnormals::kept());
    cpu::fast_forward<Function>(
        dtype, x + begin * size, end - begin, y + begin * size, codes == nullptr ? nullptr : codes + begin / 4, stream);
  });
  return true;
}

/// Strided inputs take the exact path, which produces the strides of torch's results.
bool may_be_fast(const at::Tensor& input) {
  return input.is_non_overlapping_and_dense();
}

template <class Function>
std::tuple<at::Tensor, at::Tensor> fused_forward(const at::Tensor& input, Doubles boundaries, int64_t bits, bool fast) {
  const bool published = are_published_boundaries<Function>(boundaries, bits);
  const Encoder encode(boundaries, bits, published ? &cpu::step_encode<Function> : nullptr);
  const int64_t n = input.numel();
  if (fast && may_be_fast(input)) {
    at::Tensor output = empty_result(input);
    at::Tensor codes = empty_codes(n, bits);
    auto* packed = codes.mutable_data_ptr<uint8_t>();
    if (run_fast<Function>(input, output, published ? packed : nullptr)) {
      if (!published) {
        encode_all(encode, input.scalar_type(), input.const_data_ptr(), n, packed);
      }
      return {output, codes};
    }
  }
  if (goes_in_tiles<Function>(input)) {
    return forward_in_tiles<Function>(input, encode);
  }

  // Calls the torch op on the original tensor: torch picks its kernel by strides, and kernels differ in the last bits.
  const at::Tensor output = Values<Function>::value(input);
  // The output is dense and, if the input is dense too, has its strides; otherwise (sliced, expanded) the input is
  // copied to the output's strides, so that both are in the same order.
  const at::Tensor dense = input.strides() == output.strides() ? input : at::empty_like(output).copy_(input);
  at::Tensor codes = empty_codes(n, bits);
  encode_all(encode, input.scalar_type(), dense.const_data_ptr(), n, codes.mutable_data_ptr<uint8_t>());
  return {output, codes};
}

std::tuple<at::Tensor, at::Tensor> fused_activation_forward_cpu(
    const at::Tensor& input, std::string_view function, Doubles boundaries, int64_t bits, bool fast) {
  check_fused_forward(input, boundaries, bits);
  return visit_fused(
      function, [&](auto type) { return fused_forward<typename decltype(type)::type>(input, boundaries, bits, fast); });
}

/// Used if no gradient is needed. The values are the same as with a gradient.
at::Tensor step_activation_cpu(
    const at::Tensor& input, std::string_view function, Doubles parameters, int64_t bits, std::string_view criterion,
    OptionalDoubles boundaries, OptionalDoubles levels, bool fast) {
  constexpr const char* op = ops::step_activation.name;
  check_float_tensor(op, "input", input);
  const Activation& activation = find_activation(op, function, parameters);
  check_step_arguments(op, activation, {bits, criterion, boundaries, levels});
  if (!activation.fused) {
    return activation_value(activation, input, parameters);
  }
  return visit_fused(function, [&](auto type) {
    using Function = typename decltype(type)::type;
    if (fast && may_be_fast(input)) {
      at::Tensor output = empty_result(input);
      if (run_fast<Function>(input, output, nullptr)) {
        return output;
      }
    }
    return torch_values<Function>(input);
  });
}

// Gradients -----------------------------------------------------------------------------------------------------------

at::Tensor step_activation_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& codes, Doubles levels, int64_t bits) {
  check_step_backward(ops::step_activation_backward.name, grad_output, codes, levels, bits);
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor packed_codes = codes.contiguous();
  at::Tensor grad_input(at::detail::empty_cpu(grad.sizes(), grad.scalar_type()));

  const DType dtype = to_dtype(grad.scalar_type());
  const int64_t size = static_cast<int64_t>(element_size(dtype));
  const auto* source = static_cast<const char*>(grad.const_data_ptr());
  const auto* packed = packed_codes.const_data_ptr<uint8_t>();
  auto* target = static_cast<char*>(grad_input.mutable_data_ptr());
  const bool stream = cpu::should_stream(grad.nbytes());
  parallel_over_elements(grad.numel(), cache_line_elements, [&](int64_t begin, int64_t end) {
    cpu::step_decode_multiply(
        dtype, source + begin * size, packed + begin / group_size * bits, levels.data(), static_cast<int>(bits),
        end - begin, target + begin * size, stream);
  });
  return grad_input;
}

TORCH_LIBRARY_IMPL(lomem, CPU, m) {
  m.impl("step_activation", &step_activation_cpu);
  m.impl("fused_activation_forward", &fused_activation_forward_cpu);
  m.impl("step_codes", &step_codes_cpu);
  m.impl("band_codes", &band_codes_cpu);
  m.impl("step_activation_backward", &step_activation_backward_cpu);
}

}  // namespace
}  // namespace lomem::detail
