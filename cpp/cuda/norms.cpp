// Norms on CUDA.
#include <lomem/cuda/norm_plan.h>

#include "../src/norms/backend.h"
#include "call.h"

namespace lomem::detail {
namespace {

struct CudaNorms {
  using Scope = CudaScope;

  /// Not checked here: looking at the weights would synchronize with the device. If a weight is too small, all of
  /// grad_input and that weight's gradient are NaN (see norm_inverse).
  static void check_recoverable(const char* /*op*/, const OptionalTensor& /*weight*/, const at::Tensor& /*output*/) {}

  template <Norm norm>
  static void forward(const char* op, const NormForward& args, int64_t rows, const at::Tensor& like) {
    check_launch(op, like, cuda::norm_forward<norm>(args, rows, current_stream(like)));
  }

  template <Norm norm>
  static void backward(
      const char* op, const NormBackward& args, int64_t rows, const MutableArray& grad_weight,
      const MutableArray& grad_bias, const at::Tensor& like) {
    cuda::NormParameterGradients parameters{grad_weight, grad_bias, nullptr};
    at::Tensor workspace;
    if (const int64_t bytes = cuda::norm_backward_workspace(args, rows, parameters); bytes > 0) {
      workspace = at::empty({bytes}, like.options().dtype(at::kByte));
      parameters.workspace = workspace.mutable_data_ptr();
    }
    check_launch(op, like, cuda::norm_backward<norm>(args, rows, parameters, current_stream(like)));
  }
};

TORCH_LIBRARY_IMPL(lomem, CUDA, m) {
  NormOps<CudaNorms>::implement(m);
}

}  // namespace
}  // namespace lomem::detail
