// What the step activations of the library are: one struct each, shared by every backend.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/silu.h>
#include <lomem/core/step.h>

#include <array>
#include <string>
#include <string_view>
#include <tuple>

#include "dispatch.h"

namespace lomem::detail {

/// `activation` is the torch op that the forward pass is, bit for bit; `forward` is the op that
/// also makes codes; `name` is how errors call the public op.
struct ReGELU2Op {
  using Step = ReGELU2;
  static constexpr const char* name = "lomem::regelu2";
  static constexpr const char* forward_name = "lomem::regelu2_forward";
  static constexpr const char* node_name = "ReGELU2Backward";

  static void check(const char* op, std::string_view approximate, bool /*fast*/) {
    TORCH_CHECK_VALUE(
        approximate == "none" || approximate == "tanh", op, ": approximate is '", approximate,
        "', expected 'none' or 'tanh'");
  }
  static at::Tensor activation(const at::Tensor& input, std::string_view approximate, bool /*fast*/) {
    return at::gelu(input, approximate);
  }
  static at::Tensor call(const at::Tensor& input, std::string_view approximate, bool fast) {
    return regelu2(input, approximate, fast);
  }
  static std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& input, std::string_view approximate, bool fast) {
    return regelu2_forward(input, approximate, fast);
  }
};

struct ReSiLU2Op {
  using Step = ReSiLU2;
  static constexpr const char* name = "lomem::resilu2";
  static constexpr const char* forward_name = "lomem::resilu2_forward";
  static constexpr const char* node_name = "ReSiLU2Backward";

  static void check(const char* /*op*/, bool /*fast*/) {}
  static at::Tensor activation(const at::Tensor& input, bool /*fast*/) {
    return at::silu(input);
  }
  static at::Tensor call(const at::Tensor& input, bool fast) {
    return resilu2(input, fast);
  }
  static std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& input, bool fast) {
    return resilu2_forward(input, fast);
  }
};

/// The levels of a step function as the backward op takes them.
template <class Step>
constexpr std::array<double, Step::levels> step_levels() {
  std::array<double, Step::levels> levels{};
  for (int code = 0; code < Step::levels; ++code) {
    levels[code] = Step::level(code);
  }
  return levels;
}

}  // namespace lomem::detail
