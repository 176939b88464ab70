// Calls an op through torch's dispatcher alone, without any header of lomem.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <iostream>

int main() {
  const auto op = c10::Dispatcher::singleton().findSchema({"lomem::resilu2", ""});
  if (!op) {
    std::cout << "lomem::resilu2 is not registered\n";
    return 1;
  }
  const auto x = torch::randn({5});
  const auto y = op->typed<at::Tensor(const at::Tensor&, bool)>().call(x, /*fast=*/false);
  return torch::equal(y, torch::silu(x)) ? 0 : 1;
}
