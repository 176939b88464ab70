// Step activations on the CPU: tensors in, kernels on pointers out.
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/gelu_cpu_dispatch.h>
#include <ATen/ops/silu_cpu_dispatch.h>
#include <lomem/kernels.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks.h"
#include "../step_ops.h"
#include "parallel.h"

namespace lomem::detail {
namespace {

// The torch op in tiles, so that the codes of a tile are made while it is in the cache: x is then read
// from memory once. A tile must give the bits that one call gives. Most of torch's kernels evaluate
// what is left over at the end of a thread's range by another formula, so that last bits depend on
// where ranges end. What does not:
//   - GELU of float32 and bfloat16 is oneDNN's, which treats every element alike (but not one alone);
//   - SiLU of 16-bit types: the formulas differ by less than rounding shows, for all 65,536 inputs;
//   - one thread: there is one range, and tiles that are multiples of every vector's length leave only
//     its own end over.
// Said of x86, where the tests look at them.

struct Tiling {
  bool with_threads;     // else with one thread only
  int64_t largest_tile;  // in elements
  int64_t least_input;   // smaller ones, which stay in the last cache, are faster whole
};

constexpr int64_t smallest_tile = int64_t{1} << 16;

/// Tiles that the cache of a core holds.
constexpr Tiling by_vectors(bool with_threads) {
  return {with_threads, int64_t{1} << 17, int64_t{1} << 19};
}

/// Large ones: a call of oneDNN costs what some 30,000 elements cost.
constexpr Tiling by_onednn{true, int64_t{1} << 19, int64_t{1} << 23};

Tiling tiling(const ReGELU2Op& /*op*/, at::ScalarType dtype, std::string_view approximate, bool /*fast*/) {
  const bool onednn = approximate == "none" && (dtype == at::kFloat || dtype == at::kBFloat16) && at::hasMKLDNN() &&
                      at::globalContext().userEnabledMkldnn();
  return onednn ? by_onednn : by_vectors(false);
}

Tiling tiling(const ReSiLU2Op& /*op*/, at::ScalarType dtype, bool /*fast*/) {
  return by_vectors(dtype == at::kBFloat16 || dtype == at::kHalf);
}

bool may_tile([[maybe_unused]] const at::Tensor& input, [[maybe_unused]] const Tiling& tiling) {
#if defined(LOMEM_X86_KERNELS)
  if (!input.is_contiguous() || input.numel() < tiling.least_input) {
    return false;
  }
  return tiling.with_threads || at::get_num_threads() == 1 || at::in_parallel_region();
#else
  return false;
#endif
}

int64_t tile_elements(int64_t n, const Tiling& tiling) {
  const int64_t several_a_thread = n / (4 * at::get_num_threads());
  return std::clamp(several_a_thread, smallest_tile, tiling.largest_tile) / cache_line_elements * cache_line_elements;
}

void activation_out(
    ReGELU2Op /*op*/, at::Tensor& output, const at::Tensor& input, std::string_view approximate, bool /*fast*/) {
  at::cpu::gelu_out(output, input, approximate);
}

void activation_out(ReSiLU2Op /*op*/, at::Tensor& output, const at::Tensor& input, bool /*fast*/) {
  at::cpu::silu_out(output, input);
}

// (Past the dispatcher: it costs as much as a small activation.)

at::Tensor activation_cpu(ReGELU2Op /*op*/, const at::Tensor& input, std::string_view approximate, bool /*fast*/) {
  return at::cpu::gelu(input, approximate);
}

at::Tensor activation_cpu(ReSiLU2Op /*op*/, const at::Tensor& input, bool /*fast*/) {
  return at::cpu::silu(input);
}

// (So are tensors made.)

template <class Step>
at::Tensor empty_codes(int64_t n) {
  return at::Tensor(at::detail::empty_cpu({packed_bytes(n, Step::bits)}, at::kByte));
}

/// Codes of x[0, n): the same ones whatever the thread does with subnormal numbers.
template <class Step>
void encode(DType dtype, const void* x, int64_t n, uint8_t* packed) {
  const SubnormalsScope as_they_are(Subnormals::kept());
  cpu::step_encode<Step>(dtype, x, n, packed);
}

/// A tensor with the strides of what torch's elementwise ops make of a dense `input`: theirs are not the input's where
/// a dimension of one element has another stride.
at::Tensor empty_result(const at::Tensor& input) {
  if (input.is_contiguous()) {
    return at::Tensor(at::detail::empty_cpu(input.sizes(), input.scalar_type()));
  }
  if (input.is_contiguous(at::MemoryFormat::ChannelsLast)) {
    return at::empty_like(input, input.options(), at::MemoryFormat::ChannelsLast);
  }
  return at::empty_like(input);
}

/// A 1-D tensor of `count` elements at `data`, which somebody else owns.
at::Tensor view_of(void* data, int64_t count, const at::Tensor& like) {
  return at::from_blob(data, {count}, at::TensorOptions().dtype(like.scalar_type()));
}

template <class Op, class... Args>
std::tuple<at::Tensor, at::Tensor> step_forward_in_tiles(const at::Tensor& input, const Tiling& tiling, Args... args) {
  using Step = typename Op::Step;
  const int64_t n = input.numel();
  const int64_t size = input.element_size();
  const DType dtype = to_dtype(input.scalar_type());
  at::Tensor output = empty_result(input);
  at::Tensor codes = empty_codes<Step>(n);
  const auto* x = static_cast<const char*>(input.const_data_ptr());
  auto* y = static_cast<char*>(output.mutable_data_ptr());
  auto* packed = codes.mutable_data_ptr<uint8_t>();

  // The last tile takes what is left, so that none is short.
  const int64_t tile_size = tile_elements(n, tiling);
  const int64_t tiles = n / tile_size;
  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * tile_size;
      const int64_t count = tile + 1 == tiles ? n - begin : tile_size;
      // (Not written to: a tensor of constant data there is not.)
      const at::Tensor source = view_of(const_cast<char*>(x + begin * size), count, input);
      at::Tensor target = view_of(y + begin * size, count, input);
      activation_out(Op{}, target, source, args...);
      encode<Step>(dtype, x + begin * size, count, packed + begin / group_size * Step::bits);
    }
  });
  return {output, codes};
}

// The fast forward, where it is asked for.

/// Strided inputs take the strict way, which knows what strides torch's results have.
bool may_be_fast(const at::Tensor& input, std::string_view /*approximate*/, bool fast) {
  return fast && input.is_non_overlapping_and_dense();
}

bool may_be_fast(const at::Tensor& input, bool fast) {
  return may_be_fast(input, {}, fast);
}

/// `codes` may be null. Returns false where there is no fast kernel.
template <class Function>
bool run_fast_as(const at::Tensor& input, at::Tensor& output, uint8_t* codes) {
  const DType dtype = to_dtype(input.scalar_type());
  const auto size = static_cast<int64_t>(element_size(dtype));
  const auto* x = static_cast<const char*>(input.const_data_ptr());
  auto* y = static_cast<char*>(output.mutable_data_ptr());
  const bool stream = cpu::should_stream(input.nbytes());
  // (Of nothing: whether there is a kernel.)
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

bool run_fast(
    ReGELU2Op /*op*/, const at::Tensor& input, at::Tensor& output, uint8_t* codes, std::string_view approximate,
    bool /*fast*/) {
  return approximate == "tanh" ? run_fast_as<fast::GELUTanh>(input, output, codes)
                               : run_fast_as<fast::GELU>(input, output, codes);
}

bool run_fast(ReSiLU2Op /*op*/, const at::Tensor& input, at::Tensor& output, uint8_t* codes, bool /*fast*/) {
  return run_fast_as<fast::SiLU>(input, output, codes);
}

/// The public op where no gradient is needed: the same values as with one.
template <class Op, class... Args>
at::Tensor step_activation_cpu(const at::Tensor& input, Args... args) {
  check_float_tensor(Op::name, "input", input);
  Op::check(Op::name, args...);
  if (may_be_fast(input, args...)) {
    at::Tensor output = empty_result(input);
    if (run_fast(Op{}, input, output, nullptr, args...)) {
      return output;
    }
  }
  return activation_cpu(Op{}, input, args...);
}

template <class Op, class... Args>
std::tuple<at::Tensor, at::Tensor> step_forward_cpu(const at::Tensor& input, Args... args) {
  using Step = typename Op::Step;
  check_float_tensor(Op::forward_name, "input", input);
  Op::check(Op::forward_name, args...);
  if (may_be_fast(input, args...)) {
    at::Tensor output = empty_result(input);
    at::Tensor codes = empty_codes<Step>(input.numel());
    if (run_fast(Op{}, input, output, codes.mutable_data_ptr<uint8_t>(), args...)) {
      return {output, codes};
    }
  }
  if (const Tiling tiles = tiling(Op{}, input.scalar_type(), args...); may_tile(input, tiles)) {
    return step_forward_in_tiles<Op>(input, tiles, args...);
  }

  // The torch op on the very tensor that came in: torch picks its kernel by strides, and kernels
  // differ in last bits.
  const at::Tensor output = activation_cpu(Op{}, input, args...);
  // The output is dense, and has the input's strides if that is dense too; else (sliced,
  // expanded) the input is copied to the output's strides, so that one order serves both.
  const at::Tensor dense = input.strides() == output.strides() ? input : at::empty_like(output).copy_(input);
  const int64_t n = input.numel();
  at::Tensor codes = empty_codes<Step>(n);

  const DType dtype = to_dtype(input.scalar_type());
  const auto* x = static_cast<const char*>(dense.const_data_ptr());
  auto* packed = codes.mutable_data_ptr<uint8_t>();
  parallel_over_elements(n, group_size, [&](int64_t begin, int64_t end) {
    encode<Step>(
        dtype, x + begin * static_cast<int64_t>(element_size(dtype)), end - begin,
        packed + begin / group_size * Step::bits);
  });
  return {output, codes};
}

at::Tensor step_activation_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& codes, at::ArrayRef<double> levels, int64_t bits) {
  check_step_backward(grad_output, codes, levels, bits);
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
  m.impl("regelu2", &step_activation_cpu<ReGELU2Op, std::string_view, bool>);
  m.impl("regelu2_forward", &step_forward_cpu<ReGELU2Op, std::string_view, bool>);
  m.impl("resilu2", &step_activation_cpu<ReSiLU2Op, bool>);
  m.impl("resilu2_forward", &step_forward_cpu<ReSiLU2Op, bool>);
  m.impl("step_activation_backward", &step_activation_backward_cpu);
}

}  // namespace
}  // namespace lomem::detail
