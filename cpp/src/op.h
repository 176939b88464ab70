// The library's ops as C++ functions with symbolic sizes: ops::name(arguments) is one call of the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymIntArrayRef.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

namespace lomem::detail {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;
using OptionalDoubles = std::optional<at::ArrayRef<double>>;

/// A string as a template argument.
template <std::size_t size>
struct OpName {
  char text[size];

  consteval OpName(const char (&name)[size]) {  // NOLINT(google-explicit-constructor)
    std::copy_n(name, size, text);
  }
};

template <OpName name, class Signature>
struct Op;

template <OpName op_name, class Result, class... Args>
struct Op<op_name, Result(Args...)> {
  /// Name with namespace, as used in errors.
  static constexpr const char* name = op_name.text;

  Result operator()(Args... args) const {
    // The handle is looked up once; it stays valid for the life of the library.
    static const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Args...)>();
    return handle.call(std::forward<Args>(args)...);
  }
};

namespace ops {

#define LOMEM_OP(name, traits, schema, ...) inline constexpr Op<"lomem::" #name, __VA_ARGS__> name{};
#include "ops.def"
#undef LOMEM_OP

}  // namespace ops
}  // namespace lomem::detail
