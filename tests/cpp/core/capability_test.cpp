// Run with ATEN_CPU_CAPABILITY set: the kernels that run must be the first ones, of those named as
// arguments, that this CPU has.
#include <lomem/cpu/kernels.h>

#include <cstdio>
#include <string_view>

#include "kernel_table.h"

int main(int count, char** wanted) {
  for (int i = 1; i < count; ++i) {
    for (const auto* const* table = lomem::cpu::runnable_kernels(); *table != nullptr; ++table) {
      if (std::string_view((*table)->capability) == wanted[i]) {
        const std::string_view chosen = lomem::cpu::capability();
        std::printf("%s runs, expected %s\n", lomem::cpu::capability(), wanted[i]);
        return chosen == wanted[i] ? 0 : 1;
      }
    }
  }
  std::printf("this CPU has none of the kernels named\n");
  return 1;
}
