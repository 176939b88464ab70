// Uses the header-only core alone.
#include <lomem/core.h>
#include <lomem/core/activation.h>

#include <cstdio>

int main() {
  const float x[] = {-4, -1, 1, 4, 0};
  std::uint8_t packed[2];
  lomem::step_encode<lomem::GELU::PublishedSteps>(x, 5, packed);
  // Codes 0 1 2 3, and 2 for 0, which is above the boundary -0.00118.
  const bool ok = packed[0] == 0b11100100 && packed[1] == 0b00000010;
  std::printf("lomem %s core: %s\n", LOMEM_VERSION, ok ? "ok" : "wrong codes");
  return ok ? 0 : 1;
}
