#include "library.h"

#include <lomem/ops.h>
#include <torch/torch.h>

bool works() {
  const auto x = torch::randn({5});
  return torch::equal(lomem::resilu2(x), torch::silu(x));
}
