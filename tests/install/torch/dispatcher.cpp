// Calls an op through torch's dispatcher alone, without any header of lomem.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <iostream>
#include <string_view>

int main() {
  const auto op = c10::Dispatcher::singleton().findSchema({"lomem::hard_activation", ""});
  if (!op) {
    std::cout << "lomem::hard_activation is not registered\n";
    return 1;
  }
  const auto x = torch::randn({5});
  const auto y = op->typed<at::Tensor(const at::Tensor&, std::string_view, at::ArrayRef<double>)>().call(x, "relu", {});
  return torch::equal(y, torch::relu(x)) ? 0 : 1;
}
