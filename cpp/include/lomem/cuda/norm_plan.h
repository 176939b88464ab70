// Chooses the kernels for given rows: how many threads work on a row, with what vector width, how much of it each
// thread keeps in registers, and in what order kernels run. Host code: a `Runner` launches the kernels or, for tests,
// executes them on the CPU.
#pragma once

#include <lomem/core/norm.h>
#include <lomem/cuda/group.cuh>
#include <lomem/cuda/norm.cuh>
#include <lomem/cuda/vector.cuh>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace lomem::cuda {

template <class... Tilings>
struct TilingList {
  static constexpr int size = sizeof...(Tilings);
};

/// The tilings of NormForwardRows and NormBackwardRows, with the longest row that each has room for: the first of the
/// right arithmetic type and width that has room is chosen. There are kernels for these and no others. A warp, which
/// needs no barrier, works on the short ones.
using RowTilings = TilingList<
    Tiling<float, 8, 1, warp_size>,              // 256 columns
    Tiling<float, 8, 2, warp_size>,              // 512
    Tiling<float, 8, 4, warp_size>,              // 1024
    Tiling<float, 8, 2, max_block_threads / 2>,  // 4096
    Tiling<float, 8, 4>,                         // 16384
    Tiling<float, 8, 0>,                         // any number
    Tiling<float, 4, 2, warp_size>,              // 256
    Tiling<float, 4, 4, warp_size>,              // 512
    Tiling<float, 4, 8, warp_size>,              // 1024
    Tiling<float, 4, 4, max_block_threads / 2>,  // 4096
    Tiling<float, 4, 8>,                         // 16384
    Tiling<float, 4, 0>,                         // any number
    Tiling<float, 1, 16, warp_size>,             // 512
    Tiling<float, 1, 16>,                        // 8192
    Tiling<float, 1, 0>,                         // any number
    Tiling<double, 2, 8, warp_size>,             // 512
    Tiling<double, 2, 0>,                        // any number
    Tiling<double, 1, 0, warp_size>,             // 256
    Tiling<double, 1, 0>>;                       // any number

/// The tilings of NormBackwardStrips. They have few elements, because a thread keeps gradient, output and two sums for
/// each. Rows for which there is no room are read once more for the sums.
using StripTilings = TilingList<
    Tiling<float, 8, 1, warp_size>,  // 256 columns
    Tiling<float, 8, 2, warp_size>,  // 512
    Tiling<float, 8, 1>,             // 4096
    Tiling<float, 4, 2, warp_size>,  // 256
    Tiling<float, 4, 4, warp_size>,  // 512
    Tiling<float, 4, 2>>;            // 4096

struct NormPlan {
  bool in_double = false;
  int width = 1;
  /// Number of elements that a thread keeps in registers; 0 if the row is read again in each phase.
  int elements = 0;
  int threads = warp_size;
  /// Whether the sums for weight and bias are computed in the same pass over the rows.
  bool parameters = false;
  /// Index of the tiling in StripTilings (with `parameters`) or RowTilings.
  int tiling = 0;
};

namespace detail {

/// Arrays of the size of the input determine the width; weight and bias only have to be aligned.
inline int vector_width(
    std::int64_t cols, bool in_double, std::initializer_list<Array> arrays, std::initializer_list<Array> parameters) {
  std::size_t largest = 2;
  for (const Array& array : arrays) {
    largest = std::max(largest, array.data == nullptr ? 0 : element_size(array.dtype));
  }
  const int width = in_double ? 2 : static_cast<int>(max_access / largest);
  const auto fits = [&](const Array& array) {
    const int bytes = width * static_cast<int>(element_size(array.dtype));
    return is_aligned(array.data, std::min(bytes, max_access));
  };
  const bool all_fit =
      std::all_of(arrays.begin(), arrays.end(), fits) && std::all_of(parameters.begin(), parameters.end(), fits);
  return all_fit && cols % width == 0 ? width : 1;
}

inline bool any_double(std::initializer_list<Array> arrays) {
  return std::any_of(arrays.begin(), arrays.end(), [](const Array& array) {
    return array.data != nullptr && array.dtype == DType::float64;
  });
}

inline Array as_array(const MutableArray& array) {
  return {array.data, array.dtype};
}

/// Completes a plan with the tiling number `index` if it has room for a row. Blocks that read a row again in each phase
/// have room for every row.
template <class Tiling>
constexpr bool plan_tiling(NormPlan& plan, std::int64_t cols, int index) {
  constexpr std::int64_t elements = Tiling::in_registers ? Tiling::elements : 8 * Tiling::width;
  constexpr bool for_every_row = !Tiling::in_registers && !Tiling::by_warps;
  if (plan.in_double != std::is_same_v<typename Tiling::C, double> || plan.width != Tiling::width ||
      (cols > elements * Tiling::max_threads && !for_every_row)) {
    return false;
  }
  const std::int64_t warps = (cols + elements * warp_size - 1) / (elements * warp_size);
  plan.elements = Tiling::in_registers ? Tiling::elements : 0;
  plan.threads = static_cast<int>(std::clamp<std::int64_t>(warps * warp_size, warp_size, Tiling::max_threads));
  plan.tiling = index;
  return true;
}

/// Completes a plan with the first tiling that has room for a row, if there is one.
template <class... Tilings>
constexpr bool plan_tiling(TilingList<Tilings...> /*tilings*/, NormPlan& plan, std::int64_t cols) {
  int index = 0;
  return (plan_tiling<Tilings>(plan, cols, index++) || ...);
}

}  // namespace detail

inline NormPlan plan_forward(const NormForward& args) {
  const Array output = detail::as_array(args.output);
  NormPlan plan;
  plan.in_double = detail::any_double({args.input, output, args.weight, args.bias});
  plan.width = detail::vector_width(args.cols, plan.in_double, {args.input, output}, {args.weight, args.bias});
  detail::plan_tiling(RowTilings{}, plan, args.cols);
  return plan;
}

/// `parameters`: whether the sums for weight and bias are needed too.
inline NormPlan plan_backward(const NormBackward& args, bool parameters) {
  const Array grad_input = detail::as_array(args.grad_input);
  NormPlan plan;
  plan.in_double = detail::any_double({args.grad_output, args.output, grad_input, args.weight, args.bias});
  plan.width = detail::vector_width(
      args.cols, plan.in_double, {args.grad_output, args.output, grad_input}, {args.weight, args.bias});
  plan.parameters = parameters && detail::plan_tiling(StripTilings{}, plan, args.cols);
  if (!plan.parameters) {
    detail::plan_tiling(RowTilings{}, plan, args.cols);
  }
  return plan;
}

/// Number of strips of rows in which the sums for weight and bias are computed on a device with `multiprocessors`. A
/// few rows are not worth a strip.
inline std::int64_t plan_strips(const NormPlan& plan, std::int64_t rows, std::int64_t cols, int multiprocessors) {
  constexpr std::int64_t min_rows = 4;
  std::int64_t strips = 0;
  if (plan.parameters) {
    // As many groups as fit on the device at once (limited by their registers: 65536 per multiprocessor), so that none
    // waits for another to finish.
    const int groups = plan.threads != warp_size ? std::max(1, 640 / plan.threads) : plan.elements == 16 ? 12 : 16;
    strips = std::int64_t{multiprocessors} * groups;
  } else {
    const std::int64_t blocks = (cols / plan.width + threads_per_block - 1) / threads_per_block;
    strips = std::int64_t{multiprocessors} * 8 / std::max<std::int64_t>(1, blocks);
  }
  return std::clamp<std::int64_t>(strips, 1, std::max<std::int64_t>(1, rows / min_rows));
}

/// Gradients of weight and bias; without data if not needed. `workspace`, in device memory, has norm_backward_bytes()
/// bytes (norm_backward_workspace() bytes for the launchers of kernels.h), aligned to 16.
struct NormParameterGradients {
  MutableArray grad_weight;
  MutableArray grad_bias;
  void* workspace = nullptr;

  bool needed() const {
    return grad_weight.data != nullptr || grad_bias.data != nullptr;
  }
};

/// Calls visitor(Tiling<...>{}) with the tiling number `index` of a list.
template <class First, class... Rest, class Visitor>
decltype(auto) visit_tiling(TilingList<First, Rest...> /*tilings*/, int index, Visitor&& visitor) {
  if constexpr (sizeof...(Rest) > 0) {
    if (index > 0) {
      return visit_tiling(TilingList<Rest...>{}, index - 1, visitor);
    }
  }
  return visitor(First{});
}

// A Runner has
//     using Error; static constexpr Error ok, invalid                  invalid: the arguments are
//     int multiprocessors
//     Error body(const Body&)                                          see launch.cuh
//     Error groups(const Work&, int64_t count > 0, int threads)        see group.cuh

/// Executes everything on the CPU, as a device with `multiprocessors` would. For tests.
struct HostRunner {
  using Error = bool;
  static constexpr Error ok = true;
  static constexpr Error invalid = false;

  int multiprocessors = 1;

  template <class Body>
  Error body(const Body& body) const {
    execute_on_host(body);
    return ok;
  }
  template <class Work>
  Error groups(const Work& work, std::int64_t count, int threads) const {
    execute_groups_on_host(work, count, threads);
    return ok;
  }
};

#if defined(__CUDACC__)

/// Launches kernels on a stream of the current device.
struct DeviceRunner {
  using Error = cudaError_t;
  static constexpr Error ok = cudaSuccess;
  static constexpr Error invalid = cudaErrorInvalidValue;

  cudaStream_t stream;
  int multiprocessors;

  template <class Body>
  Error body(const Body& body) const {
    return launch(body, stream);
  }
  template <class Work>
  Error groups(const Work& work, std::int64_t count, int threads) const {
    return launch_groups(work, count, threads, stream);
  }
};

#endif

/// RMSNorm with a bias is invalid.
template <Norm norm, class Runner>
typename Runner::Error run_norm_forward(const NormForward& args, std::int64_t rows, const Runner& runner) {
  if (!has_bias(norm) && args.bias.data != nullptr) {
    return Runner::invalid;
  }
  if (rows == 0) {
    return Runner::ok;
  }
  const NormPlan plan = plan_forward(args);
  return visit_tiling(RowTilings{}, plan.tiling, [&](auto tiling) {
    return runner.groups(NormForwardRows<norm, decltype(tiling)>{args}, rows, plan.threads);
  });
}

/// Size of the workspace of run_norm_backward in bytes. It depends on dtypes, sizes and pointers (which of them are
/// null and how they are aligned): pass the arguments of the actual run.
inline std::int64_t norm_backward_bytes(
    const NormBackward& args, std::int64_t rows, const NormParameterGradients& parameters, int multiprocessors) {
  if (!parameters.needed()) {
    return 0;
  }
  const NormPlan plan = plan_backward(args, true);
  const int sums = (parameters.grad_weight.data != nullptr ? 1 : 0) + (parameters.grad_bias.data != nullptr ? 1 : 0);
  const std::int64_t element = plan.in_double ? sizeof(double) : sizeof(float);
  return sums * element * args.cols * plan_strips(plan, rows, args.cols, multiprocessors);
}

namespace detail {

/// Assigns the workspace to the sums that are needed.
template <class C>
StripSums<C> strip_sums(const NormParameterGradients& parameters, std::int64_t strips, std::int64_t cols) {
  StripSums<C> sums;
  sums.strips = strips;
  C* next = static_cast<C*>(parameters.workspace);
  if (parameters.grad_weight.data != nullptr) {
    sums.grad_weight = next;
    next += strips * cols;
  }
  if (parameters.grad_bias.data != nullptr) {
    sums.grad_bias = next;
  }
  return sums;
}

template <class C, class Runner>
typename Runner::Error run_add_strips(
    const StripSums<C>& sums, std::int64_t cols, const NormParameterGradients& parameters, const Runner& runner) {
  auto error = Runner::ok;
  if (sums.grad_weight != nullptr) {
    error = runner.body(AddStripsBody<C>{sums.grad_weight, sums.strips, cols, parameters.grad_weight});
  }
  if (error == Runner::ok && sums.grad_bias != nullptr) {
    error = runner.body(AddStripsBody<C>{sums.grad_bias, sums.strips, cols, parameters.grad_bias});
  }
  return error;
}

/// grad_input and the strips' sums in one pass.
template <Norm norm, class Runner>
typename Runner::Error run_strips(
    const NormBackward& args, std::int64_t rows, const NormPlan& plan, const NormParameterGradients& parameters,
    const Runner& runner) {
  const std::int64_t strips = plan_strips(plan, rows, args.cols, runner.multiprocessors);
  return visit_tiling(StripTilings{}, plan.tiling, [&](auto tiling) {
    using Tiling = decltype(tiling);
    const auto sums = strip_sums<typename Tiling::C>(parameters, strips, args.cols);
    const auto error = runner.groups(NormBackwardStrips<norm, Tiling>{args, rows, sums}, strips, plan.threads);
    return error != Runner::ok ? error : run_add_strips(sums, args.cols, parameters, runner);
  });
}

/// grad_input and, in a pass of their own, the strips' sums; each if it is needed.
template <Norm norm, class Runner>
typename Runner::Error run_rows(
    const NormBackward& args, std::int64_t rows, const NormPlan& plan, const NormParameterGradients& parameters,
    const Runner& runner) {
  return visit_tiling(RowTilings{}, plan.tiling, [&](auto tiling) {
    using Tiling = decltype(tiling);
    using C = typename Tiling::C;
    auto error = Runner::ok;
    if (rows > 0 && args.grad_input.data != nullptr) {
      error = runner.groups(NormBackwardRows<norm, Tiling>{args}, rows, plan.threads);
    }
    if (error != Runner::ok || !parameters.needed()) {
      return error;
    }
    const auto sums = strip_sums<C>(parameters, plan_strips(plan, rows, args.cols, runner.multiprocessors), args.cols);
    error = runner.body(StripSumsBody<norm, C, Tiling::width>{args, rows, sums});
    return error != Runner::ok ? error : run_add_strips(sums, args.cols, parameters, runner);
  });
}

}  // namespace detail

/// With no rows, the gradients of weight and bias are 0. RMSNorm with a bias, or its gradient, is invalid.
template <Norm norm, class Runner>
typename Runner::Error run_norm_backward(
    const NormBackward& args, std::int64_t rows, const NormParameterGradients& parameters, const Runner& runner) {
  if (!has_bias(norm) && (args.bias.data != nullptr || parameters.grad_bias.data != nullptr)) {
    return Runner::invalid;
  }
  if (args.cols == 0) {
    return Runner::ok;
  }
  const NormPlan plan = plan_backward(args, parameters.needed());
  return plan.parameters ? detail::run_strips<norm>(args, rows, plan, parameters, runner)
                         : detail::run_rows<norm>(args, rows, plan, parameters, runner);
}

}  // namespace lomem::cuda
