// Trains a small network on handwritten digits with torch's modules and with lomem's, from the same seed, and compares
// test accuracy and the memory saved for backward.
//
//   train_digits [digits.csv]
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <lomem/lomem.h>
#include <torch/torch.h>

#include <iomanip>
#include <iostream>
#include <memory>
#include <string>
#include <unordered_map>

#include "digits.h"

namespace {

/// Bytes of live tensors on the CPU, as torch's allocator reports them.
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

constexpr int64_t width = 256;
constexpr int64_t depth = 4;

/// Both nets have the same parameters, including weight and bias of the norms.
template <class Norm, class NormOptions, class Activation>
torch::nn::Sequential make_net() {
  torch::nn::Sequential net(torch::nn::Linear(64, width));
  for (int64_t layer = 0; layer < depth; ++layer) {
    net->push_back(Norm(NormOptions({width}).elementwise_affine(true)));
    net->push_back(torch::nn::Linear(width, 2 * width));
    net->push_back(Activation());
    net->push_back(torch::nn::Linear(2 * width, width));
  }
  net->push_back(torch::nn::Linear(width, 10));
  return net;
}

struct Result {
  double accuracy;
  int64_t saved_bytes;
};

Result train(torch::nn::Sequential net, const Digits& train_set, const Digits& test_set) {
  constexpr int64_t batch = 128;
  constexpr int epochs = 20;
  torch::optim::AdamW optimizer(net->parameters(), torch::optim::AdamWOptions(1e-3));
  const auto live = std::make_shared<LiveBytes>();
  c10::DebugInfoGuard count_memory(c10::DebugInfoKind::PROFILER_STATE, live);
  int64_t saved_bytes = 0;
  for (int epoch = 0; epoch < epochs; ++epoch) {
    const auto order = torch::randperm(train_set.labels.size(0));
    for (int64_t begin = 0; begin + batch <= order.size(0); begin += batch) {
      const auto index = order.slice(0, begin, begin + batch);
      const auto images = train_set.images.index_select(0, index);
      const auto labels = train_set.labels.index_select(0, index);
      optimizer.zero_grad();
      auto loss = torch::cross_entropy_loss(net->forward(images), labels);
      loss.backward();
      optimizer.step();
      if (epoch == 0 && begin == 0) {
        // What is freed with the graph is what the graph saved.
        auto graph = torch::cross_entropy_loss(net->forward(images), labels);
        const int64_t with_graph = live->bytes;
        graph.reset();
        saved_bytes = with_graph - live->bytes;
      }
    }
  }
  torch::NoGradGuard no_grad;
  const auto predicted = net->forward(test_set.images).argmax(1);
  return {predicted.eq(test_set.labels).to(torch::kDouble).mean().item<double>(), saved_bytes};
}

void print(const std::string& name, const Result& result) {
  std::cout << std::left << std::setw(8) << name << std::right << std::fixed << std::setprecision(2) << std::setw(10)
            << 100 * result.accuracy << " %" << std::setw(14) << result.saved_bytes << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  const Digits digits = read_digits(argc > 1 ? argv[1] : DIGITS_CSV);
  const int64_t split = digits.labels.size(0) * 4 / 5;
  const Digits train_set{digits.images.slice(0, 0, split), digits.labels.slice(0, 0, split)};
  const Digits test_set{digits.images.slice(0, split), digits.labels.slice(0, split)};

  torch::manual_seed(0);
  const Result plain =
      train(make_net<torch::nn::LayerNorm, torch::nn::LayerNormOptions, torch::nn::GELU>(), train_set, test_set);
  torch::manual_seed(0);
  const Result lean =
      train(make_net<lomem::nn::MSLayerNorm, lomem::nn::MSLayerNormOptions, lomem::nn::GELU>(), train_set, test_set);

  std::cout << "            accuracy   saved bytes\n";
  print("torch", plain);
  print("lomem", lean);
  std::cout << std::setprecision(1) << "lomem keeps "
            << 100 - 100.0 * static_cast<double>(lean.saved_bytes) / static_cast<double>(plain.saved_bytes)
            << " % less for the backward pass of a batch of 128.\n";
  return 0;
}
