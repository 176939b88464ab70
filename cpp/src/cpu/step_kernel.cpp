// Step activations on the CPU: instantiations of core/step.h.
#include <lomem/kernels.h>

namespace lomem::cpu {

template <class Step>
void step_encode(DType dtype, const void* x, std::int64_t n, std::uint8_t* packed) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    lomem::step_encode<Step>(static_cast<const T*>(x), n, packed);
  });
}

template LOMEM_API void step_encode<ReGELU2>(DType, const void*, std::int64_t, std::uint8_t*);
template LOMEM_API void step_encode<ReSiLU2>(DType, const void*, std::int64_t, std::uint8_t*);

void step_decode_multiply(
    DType dtype, const void* grad_output, const std::uint8_t* packed, const double* levels, int bits, std::int64_t n,
    void* grad_input) {
  visit_dtype(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    compute_t<T> rounded[1 << max_bits] = {};
    for (int code = 0; code <= max_code(bits); ++code) {
      rounded[code] = static_cast<compute_t<T>>(levels[code]);
    }
    visit_bits(bits, [&](auto width) {
      lomem::step_decode_multiply<decltype(width)::value>(
          static_cast<const T*>(grad_output), packed, rounded, n, static_cast<T*>(grad_input));
    });
  });
}

}  // namespace lomem::cpu
