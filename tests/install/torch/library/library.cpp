#include "library.h"

#include <lomem/ops.h>
#include <torch/torch.h>

bool works() {
  const auto x = torch::randn({5});
  return torch::equal(lomem::silu(x), torch::silu(x));
}
