// Norms on the CPU.
#include <ATen/TensorIndexing.h>
#include <ATen/ops/zeros.h>
#include <lomem/cpu/kernels.h>

#include <algorithm>

#include "../cpu/parallel.h"
#include "backend.h"

namespace lomem::detail {
namespace {

int64_t rows_per_thread(int64_t cols) {
  return std::max<int64_t>(1, elements_per_thread / std::max<int64_t>(1, cols));
}

struct CpuNorms {
  struct Scope {
    explicit Scope(const at::Tensor& /*like*/) {}
  };

  /// The backward pass recovers the normalized input by dividing the saved output by weight. Raises if a weight is 0,
  /// or so small that the output is mostly subnormal: clamping the weight instead would give wrong gradients.
  static void check_recoverable(const char* op, const OptionalTensor& weight, const at::Tensor& output) {
    if (!has_tensor(weight)) {
      return;
    }
    const at::Tensor gamma = weight->contiguous();
    const double smallest = smallest_normal(to_dtype(output.scalar_type()));
    const int64_t index = cpu::find_below(array(gamma), gamma.numel(), smallest);
    if (index >= 0) {
      TORCH_CHECK_VALUE(
          false, op, ": weight is ", gamma.flatten()[index].item<double>(), " at element ", index,
          ", expected magnitudes of at least ", smallest,
          ", the smallest normal number of the output's dtype: the backward pass divides by weight (use torch's "
          "norm for this layer; in a model converted by lomem.convert, call lomem.restore and lomem.convert again, "
          "which then saves this norm's normalized input)");
    }
  }

  template <Norm norm>
  static void forward(const char* /*op*/, const NormForward& args, int64_t rows, const at::Tensor& /*like*/) {
    const bool stream = should_stream(args.output.dtype, rows, args.cols);
    parallel_for(rows, rows_per_thread(args.cols), [&](int64_t begin, int64_t end) {
      cpu::norm_forward<norm>(args, begin, end, stream);
    });
  }

  template <Norm norm>
  static void backward(
      const char* /*op*/, const NormBackward& args, int64_t rows, const MutableArray& grad_weight,
      const MutableArray& grad_bias, const at::Tensor& like) {
    const int64_t cols = args.cols;
    const bool stream = args.grad_input.data != nullptr && should_stream(args.grad_input.dtype, rows, cols);
    if (grad_weight.data == nullptr && grad_bias.data == nullptr) {
      parallel_for(rows, rows_per_thread(cols), [&](int64_t begin, int64_t end) {
        cpu::norm_backward<norm>(args, begin, end, nullptr, nullptr, stream);
      });
      return;
    }

    // Blocks of rows, whose number does not depend on the number of threads, are summed into separate buffers; a second
    // pass adds the blocks in order. Small blocks would cost more than their rows.
    constexpr int64_t max_blocks = 64;
    constexpr int64_t min_block_elements = int64_t{1} << 17;
    constexpr int64_t max_buffer_elements = int64_t{1} << 22;
    const int64_t blocks = std::max<int64_t>(
        1, std::min(
               {max_blocks, rows, rows * cols / min_block_elements, max_buffer_elements / std::max<int64_t>(1, cols)}));
    const at::Tensor sums = at::zeros({2, blocks, cols}, like.options().dtype(at::kDouble));
    double* weight_sums = grad_weight.data != nullptr ? sums.mutable_data_ptr<double>() : nullptr;
    double* bias_sums = grad_bias.data != nullptr ? sums.mutable_data_ptr<double>() + blocks * cols : nullptr;
    const auto block_sums = [&](double* all, int64_t block) { return all != nullptr ? all + block * cols : nullptr; };
    const int64_t blocks_per_thread = std::max<int64_t>(1, blocks * rows_per_thread(cols) / std::max<int64_t>(1, rows));
    parallel_for(blocks, blocks_per_thread, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        cpu::norm_backward<norm>(
            args, block * rows / blocks, (block + 1) * rows / blocks, block_sums(weight_sums, block),
            block_sums(bias_sums, block), stream);
      }
    });
    add_blocks(weight_sums, blocks, cols, grad_weight);
    add_blocks(bias_sums, blocks, cols, grad_bias);
  }

 private:
  static bool should_stream(DType dtype, int64_t rows, int64_t cols) {
    return cpu::should_stream(element_size(dtype) * static_cast<size_t>(rows) * static_cast<size_t>(cols));
  }

  static void add_blocks(double* sums, int64_t blocks, int64_t cols, const MutableArray& target) {
    if (sums == nullptr) {
      return;
    }
    parallel_over_elements(cols, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = 1; block < blocks; ++block) {
        for (int64_t col = begin; col < end; ++col) {
          sums[col] += sums[block * cols + col];
        }
      }
      cpu::store(sums + begin, end - begin, target, begin);
    });
  }
};

TORCH_LIBRARY_IMPL(lomem, CPU, m) {
  implement_norms<NormKernels<CpuNorms>>(m);
}

}  // namespace
}  // namespace lomem::detail
