#include "norm_kernel.cuh"

namespace lomem::cuda {

template LOMEM_API cudaError_t norm_forward<Norm::layer>(const NormForward&, std::int64_t, cudaStream_t);
template LOMEM_API cudaError_t
norm_backward<Norm::layer>(const NormBackward&, std::int64_t, const NormParameterGradients&, cudaStream_t);

std::int64_t norm_backward_workspace(
    const NormBackward& args, std::int64_t rows, const NormParameterGradients& parameters) {
  if (!detail::needs_sums(parameters)) {
    return 0;
  }
  const NormPlan plan = plan_backward(args, true);
  const std::int64_t strips = detail::strips_on_device(plan, rows, args.cols);
  const int arrays = (parameters.grad_weight.data != nullptr ? 1 : 0) + (parameters.grad_bias.data != nullptr ? 1 : 0);
  return arrays * strips * args.cols * static_cast<std::int64_t>(plan.in_double ? sizeof(double) : sizeof(float));
}

}  // namespace lomem::cuda
