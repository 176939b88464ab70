// What the tests of the ops share.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <string>

inline const torch::ScalarType dtypes[] = {torch::kDouble, torch::kFloat, torch::kBFloat16, torch::kHalf};

inline torch::Tensor leaf(torch::IntArrayRef sizes, torch::ScalarType dtype = torch::kFloat) {
  return torch::randn(sizes).to(dtype).requires_grad_();
}

/// The message of the error that `function` throws.
template <class Function>
std::string error_of(Function&& function) {
  try {
    function();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

/// Bytes of tensors that live on the CPU, as torch's allocator reports them.
class LiveBytes : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void* /*ptr*/, int64_t size, size_t /*allocated*/, size_t /*reserved*/, c10::Device) override {
    bytes += size;  // negative when memory is freed
  }
  bool memoryProfilingEnabled() const override {
    return true;
  }
  int64_t bytes = 0;
};

/// How many bytes beside input and output `function` leaves in memory for the backward pass.
inline int64_t saved_bytes(
    const std::function<torch::Tensor(const torch::Tensor&)>& function, const torch::Tensor& input) {
  const auto x = input.detach().requires_grad_();
  const auto live = std::make_shared<LiveBytes>();
  const c10::DebugInfoGuard count_memory(c10::DebugInfoKind::PROFILER_STATE, live);
  const auto output = function(x);
  return live->bytes - static_cast<int64_t>(output.nbytes());
}
