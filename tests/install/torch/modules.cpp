// Uses everything: header lomem.h, modules, gradients.
#include <lomem/lomem.h>
#include <torch/torch.h>

#include <iostream>

int main() {
  torch::nn::Sequential net(
      torch::nn::Linear(8, 16), lomem::nn::MSLayerNorm(16), lomem::nn::GELU(), torch::nn::Linear(16, 4));
  net->forward(torch::randn({3, 8})).sum().backward();
  const bool ok = net->parameters()[0].grad().abs().sum().item<float>() > 0;
  std::cout << "lomem " << LOMEM_VERSION << " modules: " << (ok ? "ok" : "no gradient") << "\n";
  return ok ? 0 : 1;
}
