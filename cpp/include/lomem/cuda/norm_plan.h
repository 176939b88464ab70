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

struct NormPlan {
  bool in_double = false;
  int width = 1;
  /// Number of elements that a thread keeps in registers; 0 if the row is read again in each phase.
  int elements = 0;
  int threads = warp_size;
  /// Whether the sums for weight and bias are computed in the same pass over the rows.
  bool parameters = false;
};

namespace detail {

constexpr int threads_for(std::int64_t cols, int elements) {
  const std::int64_t warps = (cols + std::int64_t{elements} * warp_size - 1) / (elements * warp_size);
  return static_cast<int>(std::clamp<std::int64_t>(warps * warp_size, warp_size, max_block_threads));
}

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

/// Plans rows that threads keep in registers if possible.
inline NormPlan plan_rows(NormPlan plan, std::int64_t cols) {
  // Up to 1024 columns, a warp works on a row, which needs no barrier.
  const auto warp_fits = [&](int elements) { return cols <= std::int64_t{elements} * warp_size; };
  if (plan.in_double) {
    plan.elements = plan.width > 1 && warp_fits(16) ? 16 : 0;
  } else if (plan.width > 1) {
    plan.elements = warp_fits(8)                                   ? 8
                    : warp_fits(16)                                ? 16
                    : warp_fits(32)                                ? 32
                    : cols <= 16 * (max_block_threads / 2)         ? 16
                    : cols <= std::int64_t{32} * max_block_threads ? 32
                                                                   : 0;
  } else {
    plan.elements = cols <= std::int64_t{16} * max_block_threads ? 16 : 0;
  }
  plan.threads = threads_for(cols, plan.elements > 0 ? plan.elements : 8 * plan.width);
  return plan;
}

}  // namespace detail

inline NormPlan plan_forward(const NormForward& args) {
  const Array output = detail::as_array(args.output);
  NormPlan plan;
  plan.in_double = detail::any_double({args.input, output, args.weight, args.bias});
  plan.width = detail::vector_width(args.cols, plan.in_double, {args.input, output}, {args.weight, args.bias});
  return detail::plan_rows(plan, args.cols);
}

/// `parameters`: whether the sums for weight and bias are needed too.
inline NormPlan plan_backward(const NormBackward& args, bool parameters) {
  const Array grad_input = detail::as_array(args.grad_input);
  NormPlan plan;
  plan.in_double = detail::any_double({args.grad_output, args.output, grad_input, args.weight, args.bias});
  plan.width = detail::vector_width(
      args.cols, plan.in_double, {args.grad_output, args.output, grad_input}, {args.weight, args.bias});
  if (parameters && !plan.in_double && plan.width > 1 && args.cols <= 8 * max_block_threads) {
    // Few elements per thread, because it keeps gradient, output and two sums for each.
    plan.parameters = true;
    plan.elements = args.cols > 8 * warp_size && args.cols <= 16 * warp_size ? 16 : 8;
    plan.threads = detail::threads_for(args.cols, plan.elements);
    return plan;
  }
  return detail::plan_rows(plan, args.cols);
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

/// Calls visitor(Tiling<...>{}) with the tiling of a plan.
template <class Visitor>
decltype(auto) visit_tiling(const NormPlan& plan, Visitor&& visitor) {
  if (plan.in_double) {
    return plan.elements > 0 ? visitor(Tiling<double, 2, 8>{})
           : plan.width > 1  ? visitor(Tiling<double, 2, 0>{})
                             : visitor(Tiling<double, 1, 0>{});
  }
  switch (plan.width * 100 + plan.elements) {
    case 808: return visitor(Tiling<float, 8, 1>{});
    case 816: return visitor(Tiling<float, 8, 2>{});
    case 832: return visitor(Tiling<float, 8, 4>{});
    case 800: return visitor(Tiling<float, 8, 0>{});
    case 408: return visitor(Tiling<float, 4, 2>{});
    case 416: return visitor(Tiling<float, 4, 4>{});
    case 432: return visitor(Tiling<float, 4, 8>{});
    case 400: return visitor(Tiling<float, 4, 0>{});
    case 116: return visitor(Tiling<float, 1, 16>{});
    default: return visitor(Tiling<float, 1, 0>{});
  }
}

// A Runner has
//     using Error; static constexpr Error ok
//     int multiprocessors
//     Error body(const Body&)                                          see launch.cuh
//     Error groups(const Work&, int64_t count > 0, int threads)        see group.cuh

/// Executes everything on the CPU, as a device with `multiprocessors` would. For tests.
struct HostRunner {
  using Error = bool;
  static constexpr Error ok = true;

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

template <Norm norm, class Runner>
typename Runner::Error run_norm_forward(const NormForward& args, std::int64_t rows, const Runner& runner) {
  if (rows == 0) {
    return Runner::ok;
  }
  const NormPlan plan = plan_forward(args);
  return visit_tiling(plan, [&](auto tiling) {
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

template <Norm norm, class Runner>
typename Runner::Error run_rows(
    const NormBackward& args, std::int64_t rows, const NormPlan& plan, const Runner& runner) {
  if (rows == 0 || args.grad_input.data == nullptr) {
    return Runner::ok;
  }
  return visit_tiling(plan, [&](auto tiling) {
    return runner.groups(NormBackwardRows<norm, decltype(tiling)>{args}, rows, plan.threads);
  });
}

/// Computes the strips' sums, either in the same pass as the rows or in a separate pass after them.
template <Norm norm, class C, class Runner>
typename Runner::Error run_strips(
    const NormBackward& args, std::int64_t rows, const NormPlan& plan, const StripSums<C>& sums, const Runner& runner) {
  if (!plan.parameters) {
    const auto error = run_rows<norm>(args, rows, plan, runner);
    if (error != Runner::ok) {
      return error;
    }
  }
  return visit_tiling(plan, [&](auto tiling) -> typename Runner::Error {
    using Tiling = decltype(tiling);
    if constexpr (std::is_same_v<typename Tiling::C, C>) {
      if constexpr (NormBackwardStrips<norm, Tiling>::by_warps && Tiling::width > 1) {
        if (plan.parameters) {
          return runner.groups(NormBackwardStrips<norm, Tiling>{args, rows, sums}, sums.strips, plan.threads);
        }
      }
      return runner.body(StripSumsBody<C, Tiling::width>{args, rows, sums});
    } else {
      return Runner::ok;  // plan.in_double selects C
    }
  });
}

template <Norm norm, class C, class Runner>
typename Runner::Error run_backward(
    const NormBackward& args, std::int64_t rows, const NormPlan& plan, const NormParameterGradients& parameters,
    const Runner& runner) {
  const std::int64_t strips = plan_strips(plan, rows, args.cols, runner.multiprocessors);
  C* next = static_cast<C*>(parameters.workspace);
  const auto take = [&](const MutableArray& gradient) {
    C* sums = gradient.data != nullptr ? next : nullptr;
    next += gradient.data != nullptr ? strips * args.cols : 0;
    return sums;
  };
  StripSums<C> sums;
  sums.grad_weight = take(parameters.grad_weight);
  sums.grad_bias = take(parameters.grad_bias);
  sums.strips = strips;
  auto error = run_strips<norm, C>(args, rows, plan, sums, runner);
  if (error == Runner::ok && sums.grad_weight != nullptr) {
    error = runner.body(AddStripsBody<C>{sums.grad_weight, strips, args.cols, parameters.grad_weight});
  }
  if (error == Runner::ok && sums.grad_bias != nullptr) {
    error = runner.body(AddStripsBody<C>{sums.grad_bias, strips, args.cols, parameters.grad_bias});
  }
  return error;
}

}  // namespace detail

/// With no rows, the gradients of weight and bias are 0.
template <Norm norm, class Runner>
typename Runner::Error run_norm_backward(
    const NormBackward& args, std::int64_t rows, const NormParameterGradients& parameters, const Runner& runner) {
  if (args.cols == 0) {
    return Runner::ok;
  }
  const NormPlan plan = plan_backward(args, parameters.needed());
  if (!parameters.needed()) {
    return detail::run_rows<norm>(args, rows, plan, runner);
  }
  return plan.in_double ? detail::run_backward<norm, double>(args, rows, plan, parameters, runner)
                        : detail::run_backward<norm, float>(args, rows, plan, parameters, runner);
}

}  // namespace lomem::cuda
