// From a DType value to an element type.
#pragma once

#include <lomem/core/dtype.h>

namespace lomem::cpu {

template <class T>
struct Type {
  using type = T;
};

/// Calls visitor(Type<T>{}) with the element type of `dtype`.
template <class Visitor>
decltype(auto) visit_dtype(DType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DType::float64: return visitor(Type<double>{});
    case DType::float32: return visitor(Type<float>{});
    case DType::bfloat16: return visitor(Type<bfloat16>{});
    default: return visitor(Type<float16>{});
  }
}

}  // namespace lomem::cpu
