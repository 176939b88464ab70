// Kernels around the bodies of lomem/cuda/norm.cuh, and their launchers. Instantiated in two files,
// which compile side by side.
#pragma once

#include <lomem/cuda/kernels.h>
#include <lomem/cuda/norm.cuh>
#include <lomem/cuda/norm_plan.h>

namespace lomem::cuda {

inline constexpr int warps_per_block = 4;

/// Whether the plans give rows of this tiling to a warp: see norm_plan.h.
template <class Tiling>
inline constexpr bool by_warps = Tiling::in_registers || sizeof(typename Tiling::C) == sizeof(double);

// (The second number of launch bounds: see launch.cuh.)

template <Norm norm, class Tiling>
__global__ void __launch_bounds__(warps_per_block* warp_size, 2)
    norm_forward_by_warps(const __grid_constant__ NormForward args, std::int64_t rows) {
  const std::int64_t row = std::int64_t{blockIdx.x} * warps_per_block + threadIdx.x / warp_size;
  if (row < rows) {  // the same for all threads of a warp
    WarpGroup<NormForwardState<Tiling>> group;
    norm_forward_row<norm, Tiling>(args, row, group);
  }
}

template <Norm norm, class Tiling>
__global__ void __launch_bounds__(max_threads_per_row, 1)
    norm_forward_by_block(const __grid_constant__ NormForward args) {
  BlockGroup<NormForwardState<Tiling>, typename Tiling::C> group;
  norm_forward_row<norm, Tiling>(args, blockIdx.x, group);
}

template <Norm norm, class Tiling>
__global__ void __launch_bounds__(warps_per_block* warp_size, 2)
    norm_backward_by_warps(const __grid_constant__ NormBackward args, std::int64_t rows) {
  const std::int64_t row = std::int64_t{blockIdx.x} * warps_per_block + threadIdx.x / warp_size;
  if (row < rows) {
    WarpGroup<NormBackwardState<Tiling, false>> group;
    norm_backward_row<norm, Tiling, false>(args, row, group);
  }
}

template <Norm norm, class Tiling>
__global__ void __launch_bounds__(max_threads_per_row, 1)
    norm_backward_by_block(const __grid_constant__ NormBackward args) {
  BlockGroup<NormBackwardState<Tiling, false>, typename Tiling::C> group;
  norm_backward_row<norm, Tiling, false>(args, blockIdx.x, group);
}

template <Norm norm, class Tiling>
__global__ void __launch_bounds__(warps_per_block* warp_size, 2) norm_backward_strips_by_warps(
    const __grid_constant__ NormBackward args, std::int64_t rows, StripSums<typename Tiling::C> sums) {
  const std::int64_t strip = std::int64_t{blockIdx.x} * warps_per_block + threadIdx.x / warp_size;
  if (strip < sums.strips) {
    WarpGroup<NormBackwardState<Tiling, true>> group;
    norm_backward_strip<norm, Tiling>(args, rows, sums, strip, group);
  }
}

template <Norm norm, class Tiling>
__global__ void __launch_bounds__(max_threads_per_row, 1) norm_backward_strips_by_block(
    const __grid_constant__ NormBackward args, std::int64_t rows, StripSums<typename Tiling::C> sums) {
  BlockGroup<NormBackwardState<Tiling, true>, typename Tiling::C> group;
  norm_backward_strip<norm, Tiling>(args, rows, sums, blockIdx.x, group);
}

/// Blocks of warps for `groups` warps, or blocks.
struct Grid {
  unsigned blocks;
  unsigned threads;

  Grid(const NormPlan& plan, std::int64_t groups)
      : blocks(static_cast<unsigned>(
            plan.threads == warp_size ? (groups + warps_per_block - 1) / warps_per_block : groups)),
        threads(static_cast<unsigned>(plan.threads == warp_size ? warps_per_block * warp_size : plan.threads)) {}
};

template <Norm norm>
cudaError_t norm_forward(const NormForward& args, std::int64_t rows, cudaStream_t stream) {
  if (rows == 0) {
    return cudaSuccess;
  }
  const NormPlan plan = plan_forward(args);
  const Grid grid(plan, rows);
  return visit_tiling(plan, [&](auto tiling) {
    using Tiling = decltype(tiling);
    if constexpr (by_warps<Tiling>) {
      if (plan.threads == warp_size) {
        norm_forward_by_warps<norm, Tiling><<<grid.blocks, grid.threads, 0, stream>>>(args, rows);
        return cudaGetLastError();
      }
    }
    norm_forward_by_block<norm, Tiling><<<grid.blocks, grid.threads, 0, stream>>>(args);
    return cudaGetLastError();
  });
}

namespace detail {

inline bool needs_sums(const NormParameterGradients& parameters) {
  return parameters.grad_weight.data != nullptr || parameters.grad_bias.data != nullptr;
}

inline std::int64_t strips_on_device(const NormPlan& plan, std::int64_t rows, std::int64_t cols) {
  int device = 0;
  int multiprocessors = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  return plan_strips(plan, rows, cols, multiprocessors);
}

template <class C>
StripSums<C> strip_sums(const NormParameterGradients& parameters, std::int64_t strips, std::int64_t cols) {
  C* weight = static_cast<C*>(parameters.workspace);
  C* bias = parameters.grad_weight.data != nullptr ? weight + strips * cols : weight;
  return {
      parameters.grad_weight.data != nullptr ? weight : nullptr, parameters.grad_bias.data != nullptr ? bias : nullptr,
      strips};
}

/// grad_input alone.
template <Norm norm>
cudaError_t launch_rows(const NormBackward& args, std::int64_t rows, const NormPlan& plan, cudaStream_t stream) {
  const Grid grid(plan, rows);
  return visit_tiling(plan, [&](auto tiling) {
    using Tiling = decltype(tiling);
    if constexpr (by_warps<Tiling>) {
      if (plan.threads == warp_size) {
        norm_backward_by_warps<norm, Tiling><<<grid.blocks, grid.threads, 0, stream>>>(args, rows);
        return cudaGetLastError();
      }
    }
    norm_backward_by_block<norm, Tiling><<<grid.blocks, grid.threads, 0, stream>>>(args);
    return cudaGetLastError();
  });
}

/// grad_input and the strips' sums in one pass.
template <Norm norm>
cudaError_t launch_strips(
    const NormBackward& args, std::int64_t rows, const NormPlan& plan, const StripSums<float>& sums,
    cudaStream_t stream) {
  const Grid grid(plan, sums.strips);
  return visit_tiling(plan, [&](auto tiling) {
    using Tiling = decltype(tiling);
    if constexpr (Tiling::in_registers && Tiling::width > 1 && Tiling::elements <= 16 && sizeof(typename Tiling::C) == 4) {
      if (plan.threads == warp_size) {
        norm_backward_strips_by_warps<norm, Tiling><<<grid.blocks, grid.threads, 0, stream>>>(args, rows, sums);
      } else if constexpr (Tiling::elements == 8) {
        norm_backward_strips_by_block<norm, Tiling><<<grid.blocks, grid.threads, 0, stream>>>(args, rows, sums);
      }
    }
    return cudaGetLastError();
  });
}

template <class C, int width>
cudaError_t launch_strip_sums(
    const NormBackward& args, std::int64_t rows, const StripSums<C>& sums, cudaStream_t stream) {
  return launch(StripSumsBody<C, width>{args, rows, sums}, stream);
}

/// The strips' sums in a pass of their own.
template <class C>
cudaError_t launch_strip_sums(
    const NormBackward& args, std::int64_t rows, const NormPlan& plan, const StripSums<C>& sums, cudaStream_t stream) {
  if constexpr (sizeof(C) == sizeof(double)) {
    return plan.width > 1 ? launch_strip_sums<C, 2>(args, rows, sums, stream)
                          : launch_strip_sums<C, 1>(args, rows, sums, stream);
  } else {
    return plan.width == 8   ? launch_strip_sums<C, 8>(args, rows, sums, stream)
           : plan.width == 4 ? launch_strip_sums<C, 4>(args, rows, sums, stream)
                             : launch_strip_sums<C, 1>(args, rows, sums, stream);
  }
}

template <class C>
cudaError_t launch_add_strips(
    const C* sums, std::int64_t strips, std::int64_t cols, const MutableArray& result, cudaStream_t stream) {
  return sums == nullptr ? cudaSuccess : launch(AddStripsBody<C>{sums, strips, cols, result}, stream);
}

template <Norm norm, class C>
cudaError_t launch_backward(
    const NormBackward& args, std::int64_t rows, const NormPlan& plan, const NormParameterGradients& parameters,
    cudaStream_t stream) {
  const std::int64_t strips = strips_on_device(plan, rows, args.cols);
  const StripSums<C> sums = strip_sums<C>(parameters, strips, args.cols);
  cudaError_t error = cudaSuccess;
  if constexpr (sizeof(C) == sizeof(float)) {
    if (plan.parameters) {
      error = launch_strips<norm>(args, rows, plan, sums, stream);
    }
  }
  if (!plan.parameters) {
    if (args.grad_input.data != nullptr) {
      error = launch_rows<norm>(args, rows, plan, stream);
    }
    if (error == cudaSuccess) {
      error = launch_strip_sums<C>(args, rows, plan, sums, stream);
    }
  }
  if (error == cudaSuccess) {
    error = launch_add_strips(sums.grad_weight, strips, args.cols, parameters.grad_weight, stream);
  }
  return error != cudaSuccess ? error
                              : launch_add_strips(sums.grad_bias, strips, args.cols, parameters.grad_bias, stream);
}

}  // namespace detail

template <Norm norm>
cudaError_t norm_backward(
    const NormBackward& args, std::int64_t rows, const NormParameterGradients& parameters, cudaStream_t stream) {
  if (args.cols == 0) {
    return cudaSuccess;
  }
  const bool sums = detail::needs_sums(parameters);
  const NormPlan plan = plan_backward(args, sums);
  if (sums) {  // also without rows: the sums are then 0
    return plan.in_double ? detail::launch_backward<norm, double>(args, rows, plan, parameters, stream)
                          : detail::launch_backward<norm, float>(args, rows, plan, parameters, stream);
  }
  return rows == 0 || args.grad_input.data == nullptr ? cudaSuccess
                                                      : detail::launch_rows<norm>(args, rows, plan, stream);
}

}  // namespace lomem::cuda
